"""What a program waits for, and where an op was issued."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, Final

__all__ = ["Origin", "Wait", "describe_origin", "origin"]

Origin = tuple[tuple[CodeType, int], ...]
"""Code object and instruction offset of each frame, innermost first; cheap to take."""

_OWN: Final = str(Path(__file__).parent.parent) + os.sep


class Wait:
    """One answer that the program waits for.

    Attributes
    ----------
    number : int
        Record that asked.
    kind : str
        What for, as counted in ``round_trips``.
    into : memoryview or None
        Where the bytes go.
    done : bool
    value : object
        The answer: bytes in place (None), or decoded values.
    error : BaseException or None
    notify : callable or None
        Called once it is done, with the core's lock held.
    """

    __slots__ = ("cancelled", "done", "entry", "error", "into", "kind", "notify", "number", "value")

    def __init__(self, number: int, kind: str, into: memoryview | None = None) -> None:
        self.number = number
        self.kind = kind
        self.into = into
        self.done = False
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.notify: Callable[[], None] | None = None
        self.entry: Any = None
        """The message with the payload, where one is sent (a put)."""

    def finish(self, value: Any = None, error: BaseException | None = None) -> None:
        if self.done:
            return
        self.value = value
        self.error = error
        self.done = True
        if self.notify is not None:
            self.notify()

    def result(self) -> Any:
        """The answer, or its error raised."""
        if self.error is not None:
            raise self.error
        return self.value


def origin(depth: int) -> Origin:
    """The innermost ``depth`` frames outside this package."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_OWN):
        back = frame.f_back
        if back is None:
            return ()
        frame = back
    if depth == 1:
        return ((frame.f_code, frame.f_lasti),)
    found = []
    for _ in range(depth):
        found.append((frame.f_code, frame.f_lasti))
        back = frame.f_back
        if back is None:
            break
        frame = back
    return tuple(found)


def describe_origin(where: Origin) -> str:
    """Lines as in a traceback, innermost last."""
    lines = []
    for code, offset in reversed(where):
        line = next(
            (
                position[0]
                for index, position in enumerate(code.co_positions())
                if index == offset // 2
            ),
            None,
        )
        lines.append(f'  File "{code.co_filename}", line {line}, in {code.co_qualname}')
    return "\n".join(lines)
