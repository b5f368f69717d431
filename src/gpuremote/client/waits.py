"""What a program waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Wait"]


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
    cancelled : bool
        The program no longer wants it.
    value : object
        The answer: bytes in place (None), or decoded values.
    error : BaseException or None
    notify : callable or None
        Called once it is done, with the core's lock held.
    future : asyncio.Future or None
        Resolved once it is done (with None: value and error are here).
    entry : Entry or None
        The message with the payload, where one is sent (a put).
    """

    # Defaults in the class: one of these is made for each wait.
    done = False
    cancelled = False
    value: Any = None
    error: BaseException | None = None
    notify: Callable[[], None] | None = None
    future: Any = None
    entry: Any = None

    def __init__(self, number: int, kind: str, into: memoryview | None = None) -> None:
        self.number = number
        self.kind = kind
        self.into = into

    def finish(self, value: Any = None, error: BaseException | None = None) -> None:
        if self.done:
            return
        self.value = value
        self.error = error
        self.done = True
        future = self.future
        if future is not None:
            if not future.done():
                future.set_result(None)
        elif self.notify is not None:
            self.notify()

    def result(self) -> Any:
        """The answer, or its error raised."""
        if self.error is not None:
            raise self.error
        return self.value
