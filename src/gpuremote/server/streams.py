"""Streams: ordered queues of work, and events that order them among each other.

The default stream is run by the worker's main thread, between receiving; every other stream
has a thread of its own. An item that can't run yet (an operand whose bytes are still coming,
an event not reached, no credit to send an answer) stalls its stream only. If it says what it
waits for, whichever stream brings that wakes it at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from gpuremote._clock import now
from gpuremote._speed import native
from gpuremote.server.storage import STALLED

__all__ = ["EventPoint", "Stream", "StreamThread"]

Item = tuple[int, Callable[..., Any], tuple[Any, ...]]
"""Record number, function, arguments. The function returns None when it is through, and else
what has to be there before it is called again: a slot, an event's point, or STALLED (unknown)."""


def python_run_calls(queue: deque[Item], waiting: dict[Stream, Any], /) -> None:
    """Run calls at the head of a queue, as long as nobody waits for their results; or leave them.
    They are cheaper to run one behind the other (``native/execute.c``)."""


run_calls = python_run_calls
if not TYPE_CHECKING and native is not None:
    run_calls = native.run_calls


class EventPoint:
    """One recording of an event.

    Attributes
    ----------
    reached : bool
        The stream has come to this point.
    when : int
        Then, in nanoseconds.
    asked : list of int
        Records to answer then.
    mark : object
        The backend's own event, for devices that run behind the host.
    """

    __slots__ = ("asked", "mark", "reached", "stream", "when")

    def __init__(self, stream: int) -> None:
        self.asked: list[int] = []
        self.reached = False
        self.when = 0
        self.mark: Any = None
        self.stream = stream

    @property
    def pending(self) -> bool:
        return not self.reached

    def reach(self, mark: Any = None) -> None:
        self.mark = mark
        self.when = time.perf_counter_ns()
        self.reached = True


class Stream:
    """An ordered queue.

    Attributes
    ----------
    ident : int
        The client's name for it; 0 is the default stream.
    device : int
    queue : deque
        What has not been run; the head may be running.
    native : object
        The backend's stream.
    closing : bool
        The client has dropped it: it ends with its queue.
    unfused : int
        Number up to which ops are run one by one: some of them failed together, or they are known
        to be part of no chain.
    wake : callable
        Makes whoever runs it look again whether the head can run.

    Parameters
    ----------
    waiting : dict
        Shared by the streams of a session: what each of those that stand still waits for.
    """

    __slots__ = ("closing", "device", "ident", "native", "queue", "unfused", "waiting", "wake")

    def __init__(
        self,
        ident: int,
        device: int,
        native: Any,
        waiting: dict[Stream, Any],
        wake: Callable[[], None],
    ) -> None:
        self.ident = ident
        self.device = device
        self.native = native
        self.closing = False
        self.unfused = 0
        self.queue: deque[Item] = deque()
        self.waiting = waiting
        self.wake = wake

    def run_ready(self, until: float = math.inf) -> bool:
        """Run from the head until the queue is empty (True), or an item stalls or it is so late
        (False)."""
        queue, waiting = self.queue, self.waiting
        while queue:
            if until is not math.inf and now() > until:
                return False
            run_calls(queue, waiting)
            if waiting:
                self._wake_others()
            if not queue:
                break
            number, function, arguments = queue[0]
            missing = function(number, *arguments)
            if missing is not None:
                if missing is STALLED or self._stand_still(missing):
                    return False
                continue
            del function, arguments
            queue.popleft()  # and what only it held
            if waiting:
                self._wake_others()
        return True

    def _wake_others(self) -> None:
        """Those for which it has come what they wait for."""
        for stream, wanted in list(self.waiting.items()):
            if not wanted.pending:
                self.waiting.pop(stream, None)
                stream.wake()

    def _stand_still(self, missing: Any) -> bool:
        """Have this stream woken when it is there; False if by now it is."""
        self.waiting[self] = missing
        # Entered first and looked at again: whoever brings it does these in the other order.
        if missing.pending:
            return True
        self.waiting.pop(self, None)
        return False


class StreamThread(Stream):
    """A stream with its own thread.

    Parameters
    ----------
    activate : callable
        Gives a context in which the backend works on this stream.
    idle : callable
        Called when something was run (other streams may wait for it).
    ended : callable
        Called when it was closed and everything in it has been run; False if there is more now.

    Attributes
    ----------
    busy : bool
        The thread runs something, or looks whether it can.
    """

    __slots__ = ("_activate", "_ended", "_idle", "_look", "_thread", "busy")

    def __init__(
        self,
        ident: int,
        device: int,
        native: Any,
        waiting: dict[Stream, Any],
        activate: Callable[[], AbstractContextManager[Any]],
        idle: Callable[[], None],
        ended: Callable[[StreamThread], bool],
    ) -> None:
        self._look = threading.Event()
        self.busy = False
        super().__init__(ident, device, native, waiting, self._look.set)
        self._activate = activate
        self._idle = idle
        self._ended = ended
        self._thread = threading.Thread(
            target=self._run, name=f"gpuremote-stream-{ident}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread once the queue is empty."""
        self.closing = True
        self.wake()

    def _run(self) -> None:
        with self._activate():
            while True:
                self._look.wait()
                self.busy = True
                self._look.clear()
                head = self.queue[0] if self.queue else None
                empty = self.run_ready()
                self.busy = False
                # Not if it stalled at once: others would wake this thread, and so on for ever.
                if head is not None and not (self.queue and self.queue[0] is head):
                    self._idle()
                if empty and self.closing:
                    if self._ended(self):
                        return
                    self.wake()
