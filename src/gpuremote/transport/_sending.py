"""The sending half of a connection over a stream. Private.

What is sent while nothing waits goes to the kernel at once; the rest lies in an ``Outbox``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Final

from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost, LimitExceeded
from gpuremote.transport._framing import MAX_HEADER
from gpuremote.transport._outgoing import Flow, Outbox, one_payload
from gpuremote.transport._sockets import broken
from gpuremote.transport._stream import NOW, Line
from gpuremote.transport.base import Connection, Region, flat_view

__all__ = ["BURST", "Sender"]

BURST: Final = 8 << 20
"""Bytes handed over by one step, so that a fast peer does not keep the caller in it."""


class Sender(Connection):
    """What :class:`~gpuremote.transport.tcp.StreamConnection` does to send. Touched by the sending
    thread only."""

    burst = BURST
    _in_c = False  # has this:
    _push: Callable[..., tuple[int, int, int, int, int, bool]]
    _send_payload: Callable[[BytesLike, memoryview, int, int], tuple[int, int, int]]
    _line: Line
    _closed: bool
    _tx_busy: bool
    _tx_touching: int  # the thread that is reading lent memory
    _tx_failure: ConnectionLost | None
    _calling: bool
    _chunk_size: int
    _outbox: Outbox
    _pending: bool  # as the outbox says

    def _gone(self) -> ConnectionLost:
        return ConnectionLost("the connection was closed on this side", peer=self.peer_address)

    def _release(self) -> None:
        """Give back what no thread in a step needs; such a thread comes here when it leaves."""
        raise NotImplementedError

    def _send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        if type(header) is memoryview:
            header = flat_view(header)
        size = len(header)
        if size > MAX_HEADER:
            raise LimitExceeded(f"a message header of {size} bytes; at most {MAX_HEADER} are sent")
        if self._tx_failure is not None:
            raise self._tx_failure
        if self._closed:
            raise self._gone()
        outbox = self._outbox
        waiting = outbox.pending
        if (
            len(regions) == 1
            and not (waiting or self._calling)
            and regions[0].nbytes > 0
            and self._at_once(regions[0].nbytes)
        ):
            self._send_one(header, size, regions[0], done)
            return
        if regions:
            outbox.add_payload(header, size, regions, done)
        else:
            outbox.add_message(header, size, done)
        self._pending = True
        self.stats.messages_sent += 1
        # Behind others the kernel most likely takes nothing now; trying each time would make a
        # long queue slow.
        if not waiting and not self._calling:
            self._pump()

    def _at_once(self, nbytes: int) -> bool:
        """Whether a payload of so many bytes goes out behind nothing else without a queue."""
        return self._in_c or nbytes <= self._chunk_size

    def _send_one(
        self, header: BytesLike, size: int, region: Region, done: Callable[[], None] | None
    ) -> None:
        """Send a message with one region behind nothing else: what the kernel does not take of it
        is queued. (The common case: the queue costs as much as half a MiB does.)"""
        stats = self.stats
        view = region.view
        self._tx_busy = True
        self._tx_touching = get_ident()
        try:
            if self._closed:
                raise self._gone()
            if self._in_c:
                chunk = self._chunk_size
                sent, payload, calls = self._send_payload(header, view, chunk, self.burst)
            else:
                sent, payload, calls = *self._send_in_one_call(header, size, view), 1
            left = view.nbytes - payload
            if left:
                self.stats.payload_sent += self._outbox.add_begun(header, size, region, done, sent)
                self._pending = True
        except BaseException as error:
            raise self._broken(error) from None
        finally:
            self._tx_touching = 0
            self._tx_busy = False
            if self._closed:
                self._release()
        stats.sends += calls
        stats.messages_sent += 1
        stats.bytes_sent += sent
        if not left:
            stats.payload_sent += view.nbytes
            if done is not None:
                self._call([done])
                if self._outbox.pending:
                    self._pump()  # what it has sent

    def _begun(self, header: BytesLike, region: Region, sent: int) -> None:
        """Queue what the kernel did not take of a message with one region."""
        self.stats.payload_sent += self._outbox.add_begun(header, len(header), region, None, sent)
        self._pending = True

    def _send_in_one_call(self, header: BytesLike, size: int, view: memoryview) -> tuple[int, int]:
        """What went out of a message with one region of one chunk, in all and of the payload."""
        run, total = one_payload(header, size, view)
        try:
            sent = self._line.sendmsg(run, (), NOW)
        except BlockingIOError:
            sent = 0
        return sent, max(0, view.nbytes - (total - sent))

    def _send_frame(self, frame: bytes) -> None:
        """Send a frame behind nothing else: what the kernel does not take of it is queued."""
        self._tx_busy = True
        try:
            if self._closed:
                raise self._gone()
            sent = self._try_frame(frame)
        except BaseException as error:
            raise self._broken(error) from None
        finally:
            self._tx_busy = False
            if self._closed:
                self._release()
        self.stats.sends += 1
        self.stats.bytes_sent += sent

    def _try_frame(self, frame: bytes) -> int:
        """The same in a step that is under way; the bytes that went out."""
        try:
            sent = self._line.send(frame, NOW)
        except BlockingIOError:
            sent = 0
        if sent < len(frame):
            self._outbox.add_begun_frame(memoryview(frame)[sent:])
            self._pending = True
        return sent

    def _left(self, header: BytesLike, sent: int) -> None:
        self._outbox.add_rest(header, len(header), sent, None)
        self._pending = True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        outer, self._calling = self._calling, True
        try:
            yield
        finally:
            self._calling = outer
        if self._pending and not outer:
            self.flush()

    def flush(self) -> bool:
        if self._tx_failure is not None:
            raise self._tx_failure
        if self._closed:
            raise self._gone()
        return not self._outbox.pending or self._pump()

    def _pump(self) -> bool:
        """Send until the kernel takes no more, nothing is left, or a burst is out."""
        stats = self.stats
        outbox = self._outbox
        budget = self.burst
        while budget > 0 and outbox.pending:
            self._tx_busy = True
            self._tx_touching = get_ident()
            try:
                if self._closed:
                    raise self._gone()
                flow, calls = outbox.only(), 1
                if flow is None:
                    sent, payload, more, done = self._send_run(outbox)
                else:
                    sent, payload, more, calls = self._push_flow(flow, budget)
                    done = outbox.pushed(flow)
                stats.sends += calls
                self._pending = outbox.pending
            except BaseException as error:
                raise self._broken(error) from None
            finally:
                self._tx_touching = 0
                self._tx_busy = False
                if self._closed:
                    self._release()
            stats.bytes_sent += sent
            stats.payload_sent += payload
            if done:
                self._call(done)
            if not more:
                return not outbox.pending
            budget -= max(sent, payload)
        return not outbox.pending

    def _push_flow(self, flow: Flow, budget: int) -> tuple[int, int, bool, int]:
        """Of the only payload that is left, up to ``budget`` bytes: the bytes that went out in all
        and of the payload, whether the kernel may take more, and the calls."""
        if self._in_c:
            return flow.push_natively(self._push, self._chunk_size, budget)
        return *flow.push(self._line.sendmsg, NOW, self._chunk_size), 1

    def _send_run(self, outbox: Outbox) -> tuple[int, int, bool, list[Callable[[], None]]]:
        """Messages and chunks of several payloads, many in one call."""
        run, size = outbox.fill()
        try:
            if len(run) > 1:
                sent = self._line.sendmsg(run, (), NOW)
            else:
                sent = self._line.send(run[0], NOW)
        except BlockingIOError:
            sent = 0
        payload, done = outbox.sent(sent)
        return sent, payload, sent == size, done

    def _call(self, callbacks: list[Callable[[], None]]) -> None:
        # What a callback sends is queued: sending it from within could go on without end.
        outer, self._calling = self._calling, True
        try:
            for callback in callbacks:
                callback()
        finally:
            self._calling = outer

    def _broken(self, error: BaseException) -> BaseException:
        """What to raise for an error of a send call."""
        if not isinstance(error, OSError):
            self.abort()
            return error
        if isinstance(error, ConnectionLost):
            return error
        if self._closed:
            return self._gone()
        if self._tx_failure is None:
            self._tx_failure = broken("sending", error, self.peer_address)
        return self._tx_failure
