"""Streams: ordered queues of work, and events that order them among each other.

The default stream is run by the worker's main thread, between receiving; every other stream
has a thread of its own. An item that can't run yet (an operand whose bytes are still coming,
an event not reached, no credit to send an answer) stalls its stream only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from gpuremote.server.storage import STALLED

__all__ = ["EventPoint", "Stream", "StreamThread"]

Item = tuple[int, Callable[..., Any], tuple[Any, ...]]
"""Record number, function, arguments. The function returns STALLED to be called again."""


class EventPoint:
    """One recording of an event.

    Attributes
    ----------
    reached : bool
        The stream has come to this point.
    when : int
        Then, in nanoseconds.
    mark : object
        The backend's own event, for devices that run behind the host.
    """

    __slots__ = ("mark", "reached", "stream", "when")

    def __init__(self, stream: int) -> None:
        self.reached = False
        self.when = 0
        self.mark: Any = None
        self.stream = stream

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
    """

    __slots__ = ("device", "ident", "native", "queue")

    def __init__(self, ident: int, device: int, native: Any = None) -> None:
        self.ident = ident
        self.device = device
        self.native = native
        self.queue: deque[Item] = deque()

    def run_ready(self) -> bool:
        """Run from the head until the queue is empty (True) or an item stalls (False)."""
        queue = self.queue
        while queue:
            number, function, arguments = queue[0]
            if function(number, *arguments) is STALLED:
                return False
            queue.popleft()
        return True


class StreamThread(Stream):
    """A stream with its own thread.

    Parameters
    ----------
    activate : callable
        Gives a context in which the backend works on this stream.
    idle : callable
        Called when something was run (other streams may wait for it).
    """

    __slots__ = ("_activate", "_closing", "_idle", "_thread", "_wake")

    def __init__(
        self,
        ident: int,
        device: int,
        native: Any,
        activate: Callable[[], AbstractContextManager[Any]] = nullcontext,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(ident, device, native)
        self._activate = activate
        self._idle = idle
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"gpuremote-stream-{ident}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """Look again whether the head can run."""
        self._wake.set()

    def close(self) -> None:
        """End the thread once the queue is empty."""
        self._closing = True
        self._wake.set()

    def _run(self) -> None:
        with self._activate():
            while True:
                self._wake.wait()
                self._wake.clear()
                head = self.queue[0] if self.queue else None
                empty = self.run_ready()
                # Not if it stalled at once: others would wake this thread, and so on for ever.
                if head is not None and not (self.queue and self.queue[0] is head):
                    self._idle()
                if empty and self._closing and not self.queue:
                    return
