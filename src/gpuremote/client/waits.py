"""What a program waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpuremote._speed import native

__all__ = ["Wait"]


class PythonWait:
    """One answer that the program waits for.

    Attributes
    ----------
    number : int
        Record that asked.
    kind : str
        What for, as counted in ``round_trips``.
    into : memoryview or None
        Where the bytes go.
    posted : bool
        The question has gone out, and there is credit for more.
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
    entries : list of Entry or None
        The messages with the payload, for an upload; ``left`` of them are still on their way.
    refusal : BaseException or None
        Why the server does not take (all of) it; raised once nothing is on its way.
    """

    # Defaults in the class: one of these is made for each wait.
    posted = False
    done = False
    cancelled = False
    value: Any = None
    error: BaseException | None = None
    notify: Callable[[], None] | None = None
    future: Any = None
    entries: list[Any] | None = None
    left = 0
    refusal: BaseException | None = None

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

    def take_error(self) -> BaseException:
        """The error, to be raised. Not kept here: with it, its traceback and the frame that
        holds this wait, the program's buffers would stay alive in a circle."""
        error, self.error = self.error, None
        assert error is not None
        return error

    def result(self) -> Any:
        """The answer, or its error raised."""
        if self.error is not None:
            raise self.take_error()
        return self.value


Wait = PythonWait
if not TYPE_CHECKING and native is not None:
    Wait = native.Wait
