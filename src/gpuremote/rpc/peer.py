"""Reliable, ordered, exactly-once messages with payloads, over connections that may be lost.

Both ends of a session run the same :class:`Peer`. It numbers what it sends, keeps it until the
other end has it, and when a new connection replaces a broken one both ends exchange receipts
and go on from the exact byte: nothing is applied twice, nothing is left out.

The peer never blocks and owns no thread. Its owner gives it a lock that guards everything here
except ``connection.receive``: the thread that receives calls ``receive`` without the lock and
then :meth:`Peer.dispatch` with what came.
"""

from __future__ import annotations

import contextlib
import copy
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Final

from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost, LimitExceeded, ProtocolError
from gpuremote.rpc.bulk import Arriving, Entry, skip
from gpuremote.rpc.lane import Lane, Plain, Sink
from gpuremote.transport.base import Connection, Incoming, Region, Target
from gpuremote.wire.caps import (
    ACK_BYTES,
    ACK_MESSAGES,
    INLINE_PAYLOAD,
    MAX_BULK,
    MAX_INLINE,
    OVERRUN_BYTES,
    WINDOW_BYTES,
)
from gpuremote.wire.frames import (
    CANCELLED,
    CONTINUED,
    HEADER,
    IGNORABLE,
    NUMBER,
    Kind,
    decode_ack,
    encode_ack,
)
from gpuremote.wire.hello import Receipt

__all__ = ["Connection", "Entry", "Peer", "Region", "Sink"]

_PREFIX: Final = HEADER.size
_pack = HEADER.pack
_unpack = HEADER.unpack_from
_ACK: Final = int(Kind.ACK)
_pack_arrived = struct.Struct(HEADER.format + "3Q").pack
"""An ACK of one payload."""
MAX_LIMIT: Final = 1 << 62
"""Message bytes that nobody sends in a lifetime; more is not counted."""
_LOW_CREDIT: Final = WINDOW_BYTES - ACK_BYTES
_KINDS: Final = frozenset(int(kind) for kind in Kind)


class Peer(Lane):
    """One end of a session.

    Parameters
    ----------
    sink : Sink
        Takes what arrives.
    lock : threading.RLock
        The owner's; every method is to be called with it held.

    Attributes
    ----------
    connection : Connection or None
        The current one; None while there is none.
    failure : BaseException or None
        Why there is none.
    credit : int
        Message bytes that may still be posted before the other end grants more.
    held : bool
        While True no more credit is granted (the owner has a backlog).
    on_lost : callable
        Called with a connection that is about to be aborted, while its descriptor is open.
    sent : int
        Number of the latest reliable message.
    messages_sent, messages_received : int
        Over the life of the session, control messages included.
    last_pong : int
        ``arg`` of the latest PONG.
    arriving : dict of int to object
        Messages whose payload is on its way to this side.
    """

    arriving: dict[int, Arriving]
    _bulk: dict[int, Entry]

    def __init__(self, sink: Sink, lock: threading.RLock) -> None:
        super().__init__()
        self.connection = None
        self.failure: BaseException | None = None
        self.credit = WINDOW_BYTES
        self.held = False
        self.on_lost: Callable[[Connection], None] = _ignore
        self.messages_sent = 0
        self.messages_received = 0
        self._sink = sink
        self.lock = lock
        self.waits = None
        self.trips = {}
        self.batches = 0
        self.table = None
        self.turn = 1
        self.queue = self.ready = None
        self.small = INLINE_PAYLOAD
        self.direct = False
        self.copied = 0
        # Sending side.
        self.sent = 0
        self._bulk, self._kit = {}, (Entry, Region)
        self._limit = WINDOW_BYTES
        # Receiving side.
        self._seen = 0
        self._complete = 0
        self.arriving = {}
        self._got = 0
        self._granted = WINDOW_BYTES
        self._unreported = 0
        self._ack_after = ACK_MESSAGES
        self._low_credit = _LOW_CREDIT
        self._delivered: list[int] = []
        self.last_pong = 0
        self._owing = -1  # the number of the latest message when ``owing`` began

    # -- sending --------------------------------------------------------------------------------

    @property
    def unacknowledged(self) -> int:
        """Messages kept because the other end may not have them."""
        return self.kept_count + len(self._bulk)

    @property
    def bulk_in_flight(self) -> int:
        """Messages with payload that the other end has not got completely."""
        return len(self._bulk)

    def post_payload(
        self,
        kind: Kind,
        body: BytesLike,
        regions: Sequence[Region],
        on_delivered: Callable[[], None] | None = None,
        arg: int = 0,
    ) -> Entry:
        """Send a reliable message with a payload.

        Parameters
        ----------
        regions : sequence of Region
            Payload, lent until ``on_delivered`` (or :meth:`cancel`).
        on_delivered : callable, optional
            Called, with the lock held, when the other end has the message and its payload.
        """
        entry = self.keep(Entry(self.sent + 1, kind, arg, body, regions, on_delivered))
        try:
            self._transmit(entry)
        except BaseException:
            self.spoil(entry)
            raise
        return entry

    def keep(self, entry: Entry) -> Entry:
        """Number and count a message that is about to be sent."""
        self.sent = entry.seq
        self._bulk[entry.seq] = entry
        self.credit -= _PREFIX + len(entry.body)
        return entry

    def spoil(self, entry: Entry) -> None:
        """Ctrl-C: nobody will take it back, and what follows must not overtake it."""
        entry.take_back()
        self.lost(_aborted("interrupted while a message was being sent"))

    def holds(self, body: BytesLike) -> bool:
        """Whether a payload with exactly this object as its body is on its way."""
        return any(entry.body is body and not entry.cancelled for entry in self._bulk.values())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context: what is sent within goes out at its end, in one system call if possible."""
        connection = self.connection
        try:
            with nullcontext() if connection is None else connection.together():
                yield
        except ConnectionLost as error:
            if self.connection is connection:
                self.lost(error)

    def interrupted(self, body: BytesLike, arg: int) -> None:
        """Ctrl-C hit while a batch was being posted: see to it that it is sent, once."""
        if not any(kept is body for *_, kept in self.kept()):
            self.post(Kind.BATCH, body, arg)
        elif self.connection is not None:
            # Whether the connection was given it nobody knows; the next one begins with receipts.
            self.lost(_aborted("interrupted while a message was being sent"))

    def control(self, kind: Kind, body: bytes = b"", arg: int = 0) -> None:
        """Send an unreliable message; dropped where there is no connection."""
        connection = self.connection
        if connection is None:
            return
        self.messages_sent += 1
        try:
            connection.send(_pack(kind, 0, 0, arg, 0, self._complete) + body)
        except ConnectionLost as error:
            self.lost(error)

    def grant(self, limit: int) -> None:
        """The other end takes message bytes up to ``limit`` in total."""
        limit = min(limit, MAX_LIMIT)
        if limit > self._limit:
            self.credit += limit - self._limit
            self._limit = limit

    def acknowledge(self) -> None:
        """Tell the other end what has arrived, and grant credit."""
        if not self.held:
            self._granted = self._got + WINDOW_BYTES
        delivered, self._delivered = self._delivered, []
        self._unreported, self._owing = 0, -1
        self.control(Kind.ACK, encode_ack(self._granted, self._sink.executed(), delivered))

    def cancel(self, entry: Entry) -> None:
        """Take back a payload that is not delivered yet; the regions are free on return.

        If part of it is on the wire, the connection is aborted, as nothing else ends the
        transport's claim on the memory at once; the session then resumes without the payload.
        """
        if entry.cancelled or entry.seq not in self._bulk:
            return
        entry.take_back()
        if entry.started and self.connection is not None:
            self.lost(_aborted("a transfer was cancelled while it was on its way"))

    def _transmit(self, entry: Entry) -> None:
        flags = CANCELLED if entry.cancelled else 0
        entry.started = not entry.cancelled
        self._put_out(entry.kind, flags, entry.arg, entry.seq, entry.body, entry.regions)

    def _put_out(
        self,
        kind: int,
        flags: int,
        arg: int,
        seq: int,
        body: BytesLike,
        regions: Sequence[Region] = (),
    ) -> None:
        """Give a message to the connection, if there is one; it may break at that."""
        if (connection := self.connection) is None:
            return
        self.messages_sent += 1
        try:
            connection.send(_pack(kind, flags, 0, arg, seq, self._complete) + body, regions)
        except ConnectionLost as error:
            self.lost(error)

    # -- receiving ------------------------------------------------------------------------------

    def expect(
        self, kind: Kind, body: bytes, view: memoryview, *, arg: int = 0, tell: bool = False
    ) -> None:
        """The next message most likely brings the bytes of ``view``, as the only region, and it
        is as ``post_payload`` makes it of ``kind``, ``body`` and ``arg``. A hint, from the thread
        that takes messages in.

        Parameters
        ----------
        tell : bool
            Whether the other end waits for all of it to be here.
        """
        connection = self.connection
        if connection is None or self.arriving:
            return
        answer = b""
        seq = self._seen + 1
        if tell:
            executed = self._sink.executed()
            answer = _pack_arrived(_ACK, 0, 0, 0, 0, self._complete, self._granted, executed, seq)
        connection.expect(_pack(kind, 0, 0, arg, seq, 0) + body, view, answer)

    def _take_whole(self, number: int, view: memoryview, told: bool) -> bool:
        """What was expected is in ``view``, all of it; ``number`` is its body. False: it has to be
        taken in as any other payload. As :meth:`_reliable`, and what follows from that."""
        seq = self._seen + 1
        self._owing = -1 if told else self.sent
        later = self._sink.on_landed(number, view)
        if later is None:
            return False
        self._seen = self._complete = seq
        self._got += _PREFIX + NUMBER.size
        self._unreported += 1
        self.messages_received += 1
        if told or later:
            self._report_if_due()
        else:
            self.acknowledge()
        return True

    def charge(self, nbytes: int) -> None:
        """A message that is taken in stands for so many more bytes: they need credit as well."""
        self._got += nbytes

    def dispatch(self, incoming: Incoming, source: Connection) -> bool:
        """Take in a message that ``source.receive`` returned; what the sink said of it.

        What comes from a connection that has been given up meanwhile is dropped: the receipt
        for the next one may be on its way already, and the message will come again.

        Raises
        ------
        ProtocolError
            The message breaks the protocol; the owner ends the session.
        """
        if source is not self.connection:
            return False
        header = incoming.header
        if len(header) < _PREFIX:
            raise ProtocolError(f"a message of {len(header)} bytes, shorter than its header")
        kind, flags, _, arg, seq, ack = _unpack(header)
        self.messages_received += 1
        if ack > self.sent:
            raise ProtocolError(f"message {ack} was acknowledged and {self.sent} were sent")
        self.settle(ack)
        if self._bulk:
            self._settle_up_to(ack)
        body = header[_PREFIX:]
        if seq == self._seen + 1 and not flags and not incoming.sizes and kind in _KINDS:
            # Nearly every message. Counted as here first, so that an answer carries the ack.
            self._seen = seq
            self._got += len(header)
            self._unreported += 1
            self._complete = seq if not self.arriving else min(self.arriving) - 1
            quiet = self._sink.on_message(kind, arg, body)
            if self._unreported >= ACK_MESSAGES or self._granted - self._got < _LOW_CREDIT:
                self._report_if_due()
            return quiet
        if seq == 0:
            self._unreliable(kind, flags, arg, body, incoming)
        elif flags & CONTINUED:
            self._continued(seq, flags, body, incoming)
        elif seq != self._seen + 1:
            raise ProtocolError(f"message {seq} arrived after message {self._seen}")
        elif flags & CANCELLED:
            self._seen = seq
            self._got += len(header)
            self._finish()
            if incoming.sizes:
                raise ProtocolError("a cancelled message with a payload")
        else:
            self._reliable(kind, flags, arg, seq, header, body, incoming)
        return False

    def _reliable(
        self,
        kind: int,
        flags: int,
        arg: int,
        seq: int,
        header: memoryview,
        body: memoryview,
        incoming: Incoming,
    ) -> None:
        if incoming.sizes:
            if len(self.arriving) >= MAX_BULK:
                raise LimitExceeded(f"more than {MAX_BULK} payloads on their way at a time")
            self._begin(kind, arg, seq, body, incoming)
        else:
            self._seen = seq
            self._got += len(header)
            self._unreported += 1
            # Counted as complete first, so that an answer sent from within carries the ack.
            self._finish()
            if kind in _KINDS:
                self._sink.on_message(kind, arg, body)
            elif not flags & IGNORABLE:
                raise ProtocolError(f"message {seq} is of unknown kind {kind}")
        self._report_if_due()

    def _report_if_due(self) -> None:
        if self._got - self._granted > OVERRUN_BYTES:
            raise LimitExceeded(f"{self._got} message bytes came, {self._granted} were granted")
        if self._unreported >= ACK_MESSAGES or (
            not self.held and self._granted - self._got < _LOW_CREDIT
        ):
            self.acknowledge()

    def _begin(self, kind: int, arg: int, seq: int, body: memoryview, incoming: Incoming) -> None:
        total = sum(incoming.sizes)
        taken = self._sink.on_payload(kind, arg, body, incoming)
        buffers, token = taken if taken is not None else (None, None)
        arriving = Arriving(seq, token, buffers, total)
        # No call stands between these lines: Ctrl-C comes before all of them, and then the message
        # again, or behind them, and then what is missing of it.
        self.arriving[seq] = arriving
        self._seen = seq
        self._got += _PREFIX + len(body)
        self._unreported += 1
        self._place(arriving, incoming, buffers)

    def _place(
        self, arriving: Arriving, incoming: Incoming, buffers: Sequence[Target] | None
    ) -> None:
        arriving.incoming = incoming
        if buffers is None:
            incoming.discard(lambda done: self._arrived(arriving, done))
        else:
            incoming.into(buffers, lambda done: self._arrived(arriving, done))

    def _arrived(self, arriving: Arriving, incoming: Incoming) -> None:
        """Called by the transport, from within ``receive``, so without the lock."""
        with self.lock:
            if arriving.incoming is not incoming:
                return  # the connection was given up meanwhile; the next one goes on from a receipt
            try:
                later = self._done(arriving, incoming.told) and not self.arriving
            except KeyboardInterrupt:
                # It does not come again, and another thread may be waiting for it.
                self._done(arriving, incoming.told)
                raise
            if later or incoming.told:
                return
            self._delivered.append(arriving.seq)
            self.acknowledge()

    def _done(self, arriving: Arriving, told: bool) -> bool:
        """Every byte is in place: what the sink said of it."""
        self.arriving.pop(arriving.seq, None)
        self._finish()
        # Before the sink tells whoever is to look after that.
        self._owing = -1 if told else self.sent
        return arriving.buffers is not None and self._sink.on_payload_done(arriving.token)

    @property
    def owing(self) -> bool:
        """Whether a payload arrived, and no message has told the other end since."""
        return self._owing == self.sent

    def _finish(self) -> None:
        """A message is here completely: move the cumulative number."""
        self._complete = min(self.arriving) - 1 if self.arriving else self._seen

    def _continued(self, seq: int, flags: int, body: memoryview, incoming: Incoming) -> None:
        arriving = self.arriving.get(seq)
        if arriving is None or arriving.incoming is not None:
            raise ProtocolError(f"message {seq} goes on and was not interrupted")
        if flags & CANCELLED:
            del self.arriving[seq]
            self._finish()
            if arriving.buffers is not None:
                self._sink.on_payload_cancelled(arriving.token)
            self._delivered.append(seq)
            self.acknowledge()
            return
        offset: int = NUMBER.unpack_from(body)[0] if len(body) >= 8 else -1
        if offset != arriving.base or sum(incoming.sizes) != arriving.total - offset:
            raise ProtocolError(f"message {seq} goes on at byte {offset}, not {arriving.base}")
        rest = None if arriving.buffers is None else skip(arriving.buffers, offset)
        if rest is not None and tuple(v.nbytes for v in rest) != incoming.sizes:
            raise ProtocolError(f"message {seq} goes on with other sizes")
        self._place(arriving, incoming, rest)

    def drop_arriving(self, token: object) -> bool:
        """Stop writing into the buffers given for ``token``; what still comes is dropped."""
        for arriving in self.arriving.values():
            if arriving.token is token and arriving.buffers is not None:
                arriving.buffers = None
                if arriving.incoming is not None:
                    self._place(arriving, arriving.incoming, None)
                return True
        return False

    def _unreliable(
        self, kind: int, flags: int, arg: int, body: memoryview, incoming: Incoming
    ) -> None:
        if incoming.sizes:
            raise ProtocolError("an unreliable message with a payload")
        if kind == Kind.ACK:
            report = decode_ack(body)
            self.grant(report.limit)
            for seq in report.delivered:
                self._settle(seq)
            self._sink.on_executed(report.executed)
        elif kind == Kind.PING:
            # One that does not read gets none, rather than a queue of them.
            if self.connection is not None and not self.connection.pending_output:
                self.control(Kind.PONG, arg=arg)
        elif kind == Kind.PONG:
            self.last_pong = arg
        elif not flags & IGNORABLE:
            raise ProtocolError(f"unreliable message of unknown kind {kind}")

    def _settle_up_to(self, ack: int) -> None:
        for seq in [seq for seq in self._bulk if seq <= ack]:
            self._settle(seq)

    def _settle(self, seq: int) -> None:
        """The other end has message ``seq``, which had a payload."""
        entry = self._bulk.pop(seq, None)
        if entry is None:
            return
        entry.regions = ()
        if entry.on_delivered is not None and not entry.cancelled:
            entry.on_delivered()

    # -- connections that come and go -----------------------------------------------------------

    def lost(self, error: BaseException) -> None:
        """The connection is gone; everything unacknowledged is kept for the next one."""
        connection, self.connection = self.connection, None
        self.failure = copy.copy(error)  # without the frames that it passed, and their buffers
        if connection is not None:
            self.on_lost(connection)
            connection.abort()
        for arriving in self.arriving.values():
            arriving.base = arriving.received
            arriving.incoming = None

    def forget(self) -> None:
        """Nothing will be sent or received any more: let go of all memory that was lent."""
        if self.connection is not None and (self._bulk or self.arriving):
            self.lost(_aborted("the session is over"))
        for entry in self._bulk.values():
            entry.regions = ()
        self._bulk.clear()
        self.settle(self.sent)
        self.arriving.clear()

    def receipt(self) -> Receipt:
        """What this side has; for the handshake of the next connection."""
        partial = [(a.seq, a.received) for a in self.arriving.values()]
        return Receipt(self._seen, partial)

    def attach(self, connection: Connection, theirs: Receipt) -> None:
        """Go on over ``connection``: send again exactly what the other end lacks.

        Raises
        ------
        ProtocolError
            The other end claims to have what was never sent.
        """
        if theirs.seen > self.sent:
            raise ProtocolError(f"the peer claims message {theirs.seen} and {self.sent} were sent")
        offsets = dict(theirs.partial)
        self.connection = connection
        self.small = MAX_INLINE if connection.near else INLINE_PAYLOAD
        self.failure = None
        self.settle(theirs.seen)
        for seq in [seq for seq in self._bulk if seq <= theirs.seen and seq not in offsets]:
            self._settle(seq)
        again: list[Plain | Entry] = [*self.kept(), *self._bulk.values()]
        again.sort(key=lambda item: item.seq if isinstance(item, Entry) else item[0])
        for item in again:
            if self.connection is not connection:
                return  # it broke again; the next attach goes on
            if not isinstance(item, Entry):
                seq, kind, flags, arg, body = item
                self._put_out(kind, flags, arg, seq, body)
            elif item.seq <= theirs.seen:
                self._continue(item, offsets[item.seq])
            else:
                self._transmit(item)
        if self.connection is connection:
            self.acknowledge()

    def _continue(self, entry: Entry, offset: int) -> None:
        """Send the rest of a payload of which the other end has ``offset`` bytes."""
        if entry.cancelled:
            # The other end keeps the unfinished payload until it is told.
            self._put_out(entry.kind, CONTINUED | CANCELLED, 0, entry.seq, NUMBER.pack(offset))
            return
        total = sum(region.nbytes for region in entry.regions)
        if offset > total:
            raise ProtocolError(f"the peer claims {offset} bytes of a payload of {total}")
        body = NUMBER.pack(offset)
        rest = []
        for region in entry.regions:
            rest.append(region.rest(min(offset, region.nbytes)))
            offset -= min(offset, region.nbytes)
        entry.started = True
        self._put_out(entry.kind, CONTINUED, 0, entry.seq, body, rest)


def _ignore(connection: Connection) -> None:
    pass


def _aborted(why: str) -> ConnectionLost:
    error = ConnectionLost(f"aborted: {why}")
    error.deliberate = True
    return error
