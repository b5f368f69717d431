"""A session's streams and events on the server: who runs after whom."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gpuremote._clock import now
from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.server.storage import Storage
from gpuremote.server.streams import EventPoint, Stream, StreamThread
from gpuremote.wire import caps
from gpuremote.wire.batch import ALL_STREAMS, Op

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Ordering"]

TIGHT: Final = 4
"""One part of so many of a session's memory is left to ops that were issued before an upload, and
half of what is free then."""
PATIENCE: Final = 10.0
"""Seconds that an upload waits for ops at most."""
LOOKS: Final = 3
"""In so many the same, and streams are taken to stand still."""
STEP: Final = 0.002
"""Seconds between two looks at what other threads run."""


class Ordering:
    """Streams and events of one session.

    Parameters
    ----------
    wake : callable
        Makes the main thread look at the default stream again.

    Attributes
    ----------
    default : Stream
        The one that the main thread runs.
    streams : dict of int to StreamThread
        All others; those that were dropped too, until what is in them has run.
    current : Stream
        Where records go at the moment.
    """

    def __init__(self, session: WorkerSession, wake: Callable[[], None]) -> None:
        self._session = session
        self._wake = wake
        self._events: dict[int, EventPoint] = {}
        self._waiting: dict[Stream, Any] = {}
        self._running = threading.Lock()
        """Of whoever runs the default stream."""
        self._room = threading.Condition(session.lock)
        self._making_room = False
        self.default = Stream(0, 0, None, self._waiting, wake)
        self.streams: dict[int, StreamThread] = {}
        self.current: Stream = self.default
        self.records: dict[int, Callable[..., None]] = {
            Op.SYNC: self._sync,
            Op.STREAM_USE: self._stream_use,
            Op.STREAM_NEW: self._stream_new,
            Op.STREAM_DROP: self._stream_drop,
            Op.EVENT_RECORD: self._event_record,
            Op.EVENT_WAIT: self._event_wait,
            Op.EVENT_QUERY: self._event_query,
            Op.EVENT_SYNC: self._event_sync,
            Op.EVENT_ELAPSED: self._event_elapsed,
            Op.EVENT_DROP: self._event_drop,
        }

    def executed(self, issued: int) -> int:
        """The number up to which every record has run, of ``issued`` ones."""
        done = issued - self._making_room  # for that record
        for stream in (self.default, *list(self.streams.values())):
            queue = stream.queue
            try:
                done = min(done, queue[0][0] - 1) if queue else done
            except IndexError:
                continue  # its thread has just taken the last one
        return done

    def run_default(self, until: float = math.inf) -> bool:
        """Run what the default stream can run now, up to a time; False if another thread does."""
        if not self._running.acquire(blocking=False):
            return False
        try:
            self.default.run_ready(until)
        finally:
            self._running.release()
        return True

    def room(self, nbytes: int) -> Storage:
        """Memory for what comes from outside; with the session's lock held.

        Ops that were issued before come first where memory is tight: they hold arrays that the
        client has dropped, and need some for their results, of which nothing is known yet.

        Raises
        ------
        OutOfDeviceMemory
            There is none.
        """
        quota = self._session.quota
        free = quota.limit - quota.used
        if self.backlog and free - nbytes < max(free // 2, quota.limit // TIGHT):
            self._making_room = True
            try:
                self._run_all(now() + PATIENCE)
                if quota.used + nbytes > quota.limit:
                    # The thread of a stream takes an item from its queue, and then lets go of it.
                    self._room.wait(STEP)
            finally:
                self._making_room = False
        return Storage(quota, nbytes)

    def _run_all(self, deadline: float) -> None:
        """Have everything run that was issued so far, unless it waits for what is still to come.

        Nothing is received meanwhile, so that has an end, whatever there is to run.
        """
        session = self._session
        seen, idle = -1, 0
        while now() < deadline:
            with session.backend.activate(None):
                mine = self.run_default(deadline)
            streams = [stream for stream in list(self.streams.values()) if stream.queue]
            if mine and not streams:
                return
            if mine and seen == session.ops_executed and not any(s.busy for s in streams):
                idle += 1
                if idle > LOOKS:
                    return  # all that is left stands still
            else:
                seen, idle = session.ops_executed, 0
            for stream in streams:
                stream.wake()
            # Others run something, and may need the lock for it.
            self._room.wait(STEP)

    @property
    def backlog(self) -> int:
        """Items that wait."""
        waiting = len(self.default.queue)
        if self.streams:
            waiting += sum(len(stream.queue) for stream in list(self.streams.values()))
        return waiting

    def wake_threads(self) -> None:
        """Something was queued."""
        for stream in list(self.streams.values()):
            if stream.queue:
                stream.wake()

    def stir(self) -> None:
        """Something changed that a stalled stream may wait for, or the client's credit."""
        self._wake_streams()
        if self.default.queue or self._session.peer.held:
            self._wake()

    def look(self) -> None:
        """The same, and there may be something to send: what another thread left over."""
        self._wake_streams()
        self._wake()

    def _wake_streams(self) -> None:
        for stream in list(self.streams.values()):
            stream.wake()

    def _queue(self, number: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.current.queue.append((number, function, arguments))

    def _stream(self, ident: int) -> Stream:
        if ident == 0:
            return self.default
        stream = self.streams.get(ident)
        if stream is None or stream.closing:
            raise ProtocolError(f"stream {ident} does not exist")
        return stream

    @property
    def count(self) -> int:
        """Streams that can be used, the default one included."""
        return 1 + sum(not stream.closing for stream in list(self.streams.values()))

    def _stream_use(self, number: int, ident: int) -> None:
        self.current = self._stream(ident)
        self._direct()

    def _stream_new(self, number: int, ident: int, device: int) -> None:
        if ident == 0 or ident in self.streams or self.count > caps.MAX_STREAMS:
            raise ProtocolError(f"stream {ident} can't be made ({self.count} exist)")
        if len(self.streams) >= 4 * caps.MAX_STREAMS:
            raise LimitExceeded(f"{len(self.streams)} streams have work left, most of them dropped")
        if device >= len(self._session.backend.devices()):
            raise ProtocolError(f"device {device} does not exist")
        native = self._session.backend.create_stream(device)
        self.streams[ident] = StreamThread(
            ident,
            device,
            native,
            self._waiting,
            lambda: self._session.backend.activate(native),
            self.look,
            self._stream_ended,
        )
        self._direct()

    def _direct(self) -> None:
        """Whether a small array may be sent before anybody looks at the queues."""
        self._session.peer.direct = (
            self.current is self.default
            and not self.streams
            and self._session.backend.exports_memory
        )

    def _stream_drop(self, number: int, ident: int) -> None:
        stream = self._stream(ident)
        if not isinstance(stream, StreamThread):
            raise ProtocolError("the default stream can't be dropped")
        if self.current is stream:
            self.current = self.default
        stream.close()
        self._direct()

    def _stream_ended(self, stream: StreamThread) -> bool:
        with self._session.lock:
            if stream.queue:
                return False  # a SYNC of all streams, for one
            self.streams.pop(stream.ident, None)
            self._direct()
        self._wake()
        return True

    def _event_record(self, number: int, event: int) -> None:
        if len(self._events) >= caps.MAX_EVENTS and event not in self._events:
            raise LimitExceeded(f"more than {caps.MAX_EVENTS} events in one session")
        point = self._events[event] = EventPoint(self.current.ident)
        self._queue(number, self._run_record, point, self.current)

    def _run_record(self, number: int, point: EventPoint, stream: Stream) -> None:
        point.reach(self._session.backend.record(stream.native))
        with self._session.lock:
            asked, point.asked = point.asked, []
        for waiter in asked:
            self._run_event_sync(waiter, point)

    def _point(self, event: int) -> EventPoint | None:
        """The latest recording; an event that was never recorded counts as reached (CUDA)."""
        return self._events.get(event)

    def _event_wait(self, number: int, event: int) -> None:
        point = self._point(event)
        if point is not None:
            self._queue(number, self._run_wait, point, self.current)

    def _run_wait(self, number: int, point: EventPoint, stream: Stream) -> object:
        if not point.reached:
            return point
        self._session.backend.wait(stream.native, point.mark)
        return None

    def _event_query(self, number: int, event: int) -> None:
        point = self._point(event)
        self._session.answers.info(number, point is None or self._passed(point))

    def _passed(self, point: EventPoint) -> bool:
        backend = self._session.backend
        if point.reached and backend.reached(point.mark):
            return True
        stream = self.default if point.stream == 0 else self.streams.get(point.stream)
        if stream is None:
            return False
        # Nothing was before it if the stream has nothing to do but, maybe, to record it: it may
        # have come in one batch with this question.
        try:
            _, function, arguments = stream.queue[0]
        except IndexError:
            return point.reached and backend.idle(stream.native)
        return (
            function == self._run_record and arguments[0] is point and backend.idle(stream.native)
        )

    def _event_sync(self, number: int, event: int) -> None:
        point = self._point(event)
        if point is None or (point.reached and self._session.backend.reached(point.mark)):
            self._session.answers.info(number, True)
        elif not point.reached:
            point.asked.append(number)  # not queued: what comes behind the event is not waited for
        else:
            # The device has yet to come to it: wait where work for that device is issued.
            stream = self.default if point.stream == 0 else self.streams.get(point.stream)
            queue = (stream or self.default).queue
            queue.append((number, self._run_event_sync, (point,)))

    def _run_event_sync(self, number: int, point: EventPoint) -> None:
        self._session.backend.synchronize_event(point.mark)
        with self._session.lock:
            self._session.answers.info(number, True)

    def _event_elapsed(self, number: int, start: int, end: int) -> None:
        first, last = self._point(start), self._point(end)
        if first is None or last is None or not (first.reached and last.reached):
            self._session.answers.info(number, None)
            return
        measured = self._session.backend.elapsed(first.mark, last.mark)
        self._session.answers.info(
            number, measured if measured is not None else (last.when - first.when) / 1e6
        )

    def _event_drop(self, number: int, event: int) -> None:
        self._events.pop(event, None)

    def _sync(self, number: int, ident: int) -> None:
        streams = (
            [self.default, *self.streams.values()]
            if ident == ALL_STREAMS
            else [self._stream(ident)]
        )
        left = [len(streams)]
        for stream in streams:
            stream.queue.append((number, self._run_sync, (stream, left)))

    def _run_sync(self, number: int, stream: Stream, left: list[int]) -> None:
        self._session.backend.synchronize(stream.native)
        with self._session.lock:
            left[0] -= 1
            if left[0] == 0:
                self._session.answers.info(number, True)
