"""Sends and receives small messages on a socket: the common case, spelled out. Private."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from gpuremote import _clock
from gpuremote._speed import native
from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost
from gpuremote.transport._framing import FRAME, MESSAGE
from gpuremote.transport._incoming import Message
from gpuremote.transport._looking import WITHIN, Looking
from gpuremote.transport.base import Incoming, Region, TransportStats

__all__ = ["NOW", "SMALL", "Line", "PythonStream", "Stream"]

NOW: Final = int(socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0))
SMALL: Final = 16 << 10
"""Header bytes up to which a message goes out joined with its frame, in one plain send."""

_PREFIX: Final = FRAME.size
_pack = FRAME.pack
_whole_from = struct.Struct("<Q").unpack_from
_PLAIN: Final = MESSAGE << 32
"""The frame of an empty MESSAGE as one number; the length adds to it."""


class Line(Protocol):
    """What the bytes of a stream go through: a socket, or encryption over one. As of a socket,
    each call takes or gives what is possible, and raises BlockingIOError where nothing is."""

    def send(self, data: BytesLike, flags: int, /) -> int: ...

    def sendmsg(self, buffers: Sequence[BytesLike], ancillary: tuple[()], flags: int, /) -> int: ...

    def recv_into(self, buffer: memoryview, size: int, flags: int, /) -> int: ...

    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary: int, flags: int, /
    ) -> tuple[int, Any, int, Any]: ...


class PythonStream:
    """The two steps of a connection over a stream where nothing else is under way.

    What is rare is left to the methods of ``StreamConnection`` that are declared below. (Those
    are no methods here, or they would hide the ones of a base class that comes later.)
    """

    stats: TransportStats
    _line: Line
    _fd: int
    _blocking: bool
    _closed: bool
    # Sending side; touched by the sending thread only.
    _tx_busy: bool
    _calling: bool
    _pending: bool  # something is queued
    # Receiving side; touched by the receiving thread only.
    _rx_busy: bool
    _rx_touching: int  # the thread that is writing to lent memory
    _hands_off: bool  # another thread waits until it no longer does
    _plain: bool  # nothing is under way: the next bytes begin a frame
    _rx: memoryview
    _idle: int  # bytes asked for then
    _gap_looks: int  # looks between two pieces of a payload
    _gaps: Looking  # and when; in C a field of its own
    _start: int  # what the buffer holds begins here
    _end: int  # and ends here

    def _more_soon(self) -> bool:
        """Whether more of a payload comes while one looks ``_gap_looks`` times.

        On a short way the pieces of a payload come within microseconds of each other. To wake a
        process that sleeps in between costs the sender tens of them, and half of the rate.
        """
        if not self._gap_looks or not self._gaps.due:
            return False
        found, until = False, _clock.now() + WITHIN
        for _ in range(self._gap_looks):
            found = self._ready(0.0)
            if found or _clock.now() > until:
                break
        self._gaps.looked(found)
        return found

    def _end_lending(self) -> None:
        """In C uploads may be lent to the kernel, which takes a pipe."""

    @property
    def pending_output(self) -> bool:
        return self._pending

    @property
    def buffered(self) -> bool:
        return self._start != self._end

    @property
    def restless(self) -> bool:
        return self._pending or self._start != self._end

    @property
    def closed(self) -> bool:
        return self._closed

    def send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        size = len(header)
        if (
            regions
            or done is not None
            or size > SMALL
            or self._calling
            or self._pending
            or type(header) is memoryview
        ):
            self._send(header, regions, done)
            return
        self._tx_busy = True
        try:
            if self._closed:
                raise self._gone()
            try:
                sent = self._line.send(_pack(size, MESSAGE, 0, 0) + header, NOW)
            except BlockingIOError:
                sent = 0
            if sent != size + _PREFIX:
                self._left(header, sent)
        except BaseException as error:
            raise self._broken(error) from None
        finally:
            self._tx_busy = False
            if self._closed:
                self._release()
        stats = self.stats
        stats.sends += 1
        stats.messages_sent += 1
        stats.bytes_sent += sent

    def receive(self, wait: float = 0.0) -> Incoming | None:
        self._rx_busy = True
        try:
            if self._closed:
                raise self._gone()
            if not self._plain or (wait and (wait < 0.5 or not self._blocking)):
                return self._receive(wait)
            try:
                end = self._line.recv_into(self._rx, self._idle, 0 if wait else NOW)
            except BlockingIOError:
                return None
            stats = self.stats
            stats.receives += 1
            stats.bytes_received += end
            if end > _PREFIX and _whole_from(self._rx)[0] == end - _PREFIX + _PLAIN:
                stats.messages_received += 1
                return self._whole(end)
            if not end:
                raise self._ended()
            self._end = end
            self._plain = False
            return self._take_in()
        except BaseException as error:
            raise self._failed(error) from None
        finally:
            self._rx_busy = False
            if self._closed:
                self._release()

    # -- what the connection adds ---------------------------------------------------------------

    if TYPE_CHECKING:

        def _send(
            self,
            header: BytesLike,
            regions: Sequence[Region] = (),
            done: Callable[[], None] | None = None,
        ) -> None:
            """Send in the other cases."""
            raise NotImplementedError

        def _left(self, header: BytesLike, sent: int) -> None:
            """The kernel took ``sent`` bytes of a message with its frame: queue the others."""
            raise NotImplementedError

        def _receive(self, wait: float) -> Incoming | None:
            """Receive while something is under way."""
            raise NotImplementedError

        def _ready(self, wait: float) -> bool:
            """Wait until the socket is readable."""
            raise NotImplementedError

        def _whole(self, end: int) -> Message:
            """The one message that the buffer holds."""
            raise NotImplementedError

        def _take_in(self) -> Incoming | None:
            """Take in what the buffer holds, up to the next header."""
            raise NotImplementedError

        def _gone(self) -> ConnectionLost:
            raise NotImplementedError

        def _ended(self) -> ConnectionLost:
            raise NotImplementedError

        def _broken(self, error: BaseException) -> BaseException:
            raise NotImplementedError

        def _failed(self, error: BaseException) -> BaseException:
            raise NotImplementedError

        def _release(self) -> None:
            raise NotImplementedError


Stream = PythonStream
if not TYPE_CHECKING and native is not None:
    Stream = native.Stream
