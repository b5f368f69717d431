"""The first connection of one with lanes: as it was, with one more kind of frame. Private."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost, LimitExceeded, ProtocolError
from gpuremote.transport._framing import MAX_HEADER, MAX_REGIONS, encode_sizes
from gpuremote.transport.base import Incoming, Region, flat_view
from gpuremote.transport.lanes.frames import (
    MAX_AHEAD,
    NUMBER,
    SPREAD,
    check_spread,
    decode_spread,
)
from gpuremote.transport.lanes.payload import SpreadPayload
from gpuremote.transport.tcp import StreamConnection, TcpConnection
from gpuremote.transport.tls import TlsConnection

__all__ = ["Control", "control_over"]


class Control(StreamConnection):
    """Announces payloads that go over lanes, and keeps those that are announced to it.

    Attributes
    ----------
    spread : dict of int to SpreadPayload
        Announced by the peer, and not complete.
    announced : int
        How many of them there have been.
    untouched : callable
        Returns when no other thread writes to their memory.
    """

    spread: dict[int, SpreadPayload]
    announced: int
    untouched: Callable[[], None]

    def take_over(self, first: StreamConnection, untouched: Callable[[], None]) -> None:
        """Go on with what ``first`` has received, and not looked at."""
        self.spread = {}
        self.announced = 0
        self.untouched = untouched
        left = bytes(first._rx[first._start : first._end])
        self._rx[: len(left)] = left
        self._start, self._end = 0, len(left)
        self._plain = not left

    def announce(
        self,
        header: BytesLike,
        regions: Sequence[Region],
        number: int,
        done: Callable[[], None],
    ) -> None:
        """Tell of a payload that goes over the lanes, in its turn among the messages.

        Raises
        ------
        ConnectionLost, LimitExceeded
        """
        if type(header) is memoryview:
            header = flat_view(header)
        if len(header) > MAX_HEADER:
            raise LimitExceeded(
                f"a message header of {len(header)} bytes; at most {MAX_HEADER} are sent"
            )
        if len(regions) > MAX_REGIONS:
            raise LimitExceeded(f"{len(regions)} regions; a message takes {MAX_REGIONS}")
        if self._tx_failure is not None:
            raise self._tx_failure
        if self._closed:
            raise self._gone()
        waiting = self._pending
        told = encode_sizes([region.nbytes for region in regions]) + NUMBER.pack(number)
        self._outbox.add_frame(SPREAD, 0, [told, header], done)
        self._pending = True
        self.stats.messages_sent += 1
        if not waiting and not self._calling:
            self._pump()

    def find(self, number: int) -> SpreadPayload | None:
        """The payload that a piece names; None while it is not announced.

        Raises
        ------
        ProtocolError
            It is complete, or no honest sender would be there yet.
        """
        found = self.spread.get(number)
        if found is None and not self.announced <= number < self.announced + MAX_AHEAD:
            raise ProtocolError(f"a piece of payload {number}, which is not on its way")
        return None if found is None or found.undecided else found

    def _release(self) -> None:
        super()._release()
        for payload in list(self.spread.values()):
            payload.release()
        if not self._rx_busy:
            self.spread = {}

    def _check(self, length: int, kind: int, flags: int, channel: int) -> None:
        check_spread(length, kind, flags, channel)

    def _message(self, frame: tuple[int, int, int, int], body: memoryview) -> Incoming | None:
        if frame[1] != SPREAD:
            return super()._message(frame, body)
        sizes, number, header = decode_spread(body)
        if number != self.announced or len(self.spread) >= MAX_AHEAD:
            raise ProtocolError(f"payload {number} is announced after {self.announced} others")
        self.announced += 1
        payload = SpreadPayload(header, sizes, number, self.untouched)
        self.spread[number] = payload
        self._question = payload
        self.stats.messages_received += 1
        return payload


class _TcpControl(Control, TcpConnection):
    """In the clear."""


class _TlsControl(Control, TlsConnection):
    """Encrypted."""


def control_over(first: StreamConnection, untouched: Callable[[], None]) -> Control:
    """The connection that goes on over the socket of ``first``, which is not to be used any more.

    Raises
    ------
    ConnectionLost
        It is broken.
    """
    control: Control
    if isinstance(first, TlsConnection):
        control = _TlsControl(first._tls, blocking=False)
        control.reason = first.reason
    elif isinstance(first, TcpConnection):
        control = _TcpControl(first._sock, blocking=False, reason=first.reason)
    else:
        raise ConnectionLost(f"lanes beside a connection of type {type(first).__name__}")
    control.take_over(first, untouched)
    return control
