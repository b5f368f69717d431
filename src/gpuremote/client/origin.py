"""Where an op was issued: a few words per op, turned into text only if it fails."""

from __future__ import annotations

import os
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

__all__ = ["OWN", "Origin", "caller", "describe", "take"]

Origin = tuple[Any, ...]
"""Record number, plan or name of the op, then code object and instruction offset of each frame,
innermost first."""

OWN: Final = str(Path(__file__).parent.parent) + os.sep
"""How the names of files of this package begin."""


def caller(frame: FrameType) -> FrameType:
    """The innermost frame outside this package."""
    found: FrameType | None = frame
    while found is not None and found.f_code.co_filename.startswith(OWN):
        found = found.f_back
    return found if found is not None else frame


def take(number: int, op: object, frame: FrameType, depth: int) -> Origin:
    """Note ``depth`` frames; frame objects themselves would keep the program's arrays alive."""
    if depth == 2:  # the default, spelled out: this is done for every op
        back = frame.f_back
        if back is not None:
            return (number, op, frame.f_code, frame.f_lasti, back.f_code, back.f_lasti)
    found: list[Any] = [number, op]
    next_: FrameType | None = frame
    while next_ is not None and depth > 0:
        found += (next_.f_code, next_.f_lasti)
        next_ = next_.f_back
        depth -= 1
    return tuple(found)


def describe(origin: Origin) -> str:
    """Lines as in a traceback, innermost last; frames of this package left out."""
    lines = []
    for code, offset in zip(origin[2::2], origin[3::2], strict=True):
        if not code.co_filename.startswith(OWN):
            line = _line_of(code, offset)
            lines.append(f'  File "{code.co_filename}", line {line}, in {code.co_qualname}')
    return "\n".join(reversed(lines))


def _line_of(code: CodeType, offset: int) -> int | None:
    for index, position in enumerate(code.co_positions()):
        if index == offset // 2:
            return position[0]
    return None
