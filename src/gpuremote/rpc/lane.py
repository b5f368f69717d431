"""Numbers, sends and takes in reliable messages: what every message goes through."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gpuremote import _clock
from gpuremote._speed import native
from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost, GpuRemoteError
from gpuremote.transport._looking import WITHIN, Looking
from gpuremote.transport.base import Connection, Incoming, Target
from gpuremote.wire.frames import HEADER, Kind

__all__ = ["Lane", "Plain", "Sink"]


class Sink(Protocol):
    """Where the messages of a peer go. Called with the owner's lock held."""

    def on_message(self, kind: int, arg: int, body: memoryview) -> bool:
        """A reliable message without payload; ``body`` is valid during the call only.

        True if it changed nothing but what it was answered with: the next one may be taken in
        before the owner looks after anything else.
        """

    def on_payload(
        self, kind: int, arg: int, body: memoryview, incoming: Incoming
    ) -> tuple[Sequence[Target], object] | None:
        """A message with payload begins: where it goes (what ``incoming.adopt`` gave, or other
        memory) and a token, or None to drop it."""

    def on_payload_done(self, token: object) -> bool:
        """Every byte of the payload is in place.

        True if the other end need not hear of it before the next message, which tells it along
        with whatever else it says (``Peer.owing``). Called once more where Ctrl-C ended it.
        """

    def on_landed(self, number: int, view: memoryview) -> bool | None:
        """A payload that was expected (``Peer.expect``) is in ``view``, all of it, and nothing was
        asked before: as :meth:`on_payload` and :meth:`on_payload_done` in one. None: ask those."""

    def on_payload_cancelled(self, token: object) -> None:
        """The rest of the payload will not come."""

    def on_executed(self, number: int) -> None:
        """The other end has executed every record up to ``number``."""

    def executed(self) -> int:
        """The number to report as executed."""


Plain = tuple[int, int, int, int, BytesLike]
"""A message without payload that is kept: seq, kind, flags, arg, body."""

_BATCH = int(Kind.BATCH)
_PREFIX = HEADER.size
_pack = HEADER.pack


class PythonLane:
    """The state of a peer that each message changes, and the two steps that do it.

    Attributes
    ----------
    connection : Connection or None
    lock : threading.RLock
        The owner's; held where messages are sent and taken in.
    waits : dict of int to Wait, or None
        Who waits for the bytes of which record. The part in C puts them in place by itself.
    wait_type : callable
        Makes one.
    trips : dict of str to int
        Waits by their name.
    batches : int
        Messages that were batches.
    table : dict of int to Slot, or None
        What handles name, where this side answers for them.
    turn : int
        Number of the record that comes next.
    queue : deque
        Records that have not run.
    ready : tuple or None
        What the part in C needs for the next upload (``server.arrivals.Ready``).
    small : int
        Bytes up to which an array may travel inside a message.
    direct : bool
        An array may be sent at once while the queue is empty: a small one by the part in C.
    copied : int
        Bytes that it has put in place so.
    """

    connection: Connection | None
    lock: threading.RLock
    waits: dict[int, Any] | None
    wait_type: Callable[[int, str, memoryview | None], Any]
    trips: dict[str, int]
    batches: int
    table: dict[int, Any] | None
    turn: int
    queue: deque[Any] | None
    ready: tuple[Any, ...] | None
    small: int
    direct: bool
    copied: int
    sent: int
    credit: int
    messages_sent: int
    messages_received: int
    arriving: dict[int, Any]
    _sink: Sink
    _bulk: dict[int, Any]
    _kit: tuple[type, type]
    _seen: int
    _complete: int
    _limit: int
    _got: int
    _granted: int
    _unreported: int
    _ack_after: int
    _low_credit: int

    def __init__(self) -> None:
        self._kept: deque[Plain] = deque()
        self._looking = Looking()

    def post(self, kind: int, body: BytesLike, arg: int = 0, flags: int = 0, /) -> bool:
        """Send a reliable message, and keep it until the other end has it.

        Parameters
        ----------
        body : bytes-like
            Must not be changed afterwards.

        Returns
        -------
        bool
            False if the owner has to see to it: it waits for the kernel or for a connection,
            or there is no credit for more.
        """
        seq = self.sent = self.sent + 1
        self._kept.append((seq, kind, flags, arg, body))
        self.credit -= _PREFIX + len(body)
        self.batches += kind == _BATCH
        connection = self.connection
        if connection is None:
            return False
        self.messages_sent += 1
        try:
            connection.send(_pack(kind, flags, 0, arg, seq, self._complete) + body)
        except ConnectionLost as error:
            self.lost(error)
            return False
        return self.credit > 0 and not connection.pending_output

    def ask(
        self, number: int, name: str, into: memoryview | None, kind: int, body: BytesLike, /
    ) -> Any:
        """As :meth:`post`, with somebody who waits for the bytes of record ``number``.

        Returns
        -------
        Wait
            ``posted`` is what :meth:`post` returned.
        """
        assert self.waits is not None
        self.trips[name] = self.trips.get(name, 0) + 1
        wait = self.waits[number] = self.wait_type(number, name, into)
        wait.posted = self.post(kind, body)
        return wait

    @property
    def kept_count(self) -> int:
        return len(self._kept)

    def kept(self) -> list[Plain]:
        """The messages without payload that the other end may not have, in order."""
        return list(self._kept)

    def settle(self, ack: int, /) -> None:
        """The other end has every message up to ``ack``."""
        kept = self._kept
        while kept and kept[0][0] <= ack:
            kept.popleft()

    def take(self, connection: Connection, wait: float = 0.0, looks: int = 0, /) -> bool:
        """Receive from ``connection``, without the lock, and take in what came, with it.

        After a message that changed nothing but what it was answered with, receive again.

        Parameters
        ----------
        wait : float
            As for ``Connection.receive``.
        looks : int
            Times to look before waiting, for a peer that goes to and fro; left out where it
            does not help (a slower peer, or one on the same core).

        Returns
        -------
        bool
            Whether a message had begun to arrive. The bytes of a payload may have gone into
            place although none had.

        Raises
        ------
        ConnectionLost
        ProtocolError
            The message breaks the protocol; the owner ends the session.
        """
        quiet = True
        while quiet:
            incoming = self._receive(connection, wait, looks)
            if incoming is None:
                return False
            with self.lock:
                try:
                    quiet = self.dispatch(incoming, connection)
                except GpuRemoteError:
                    raise
                except BaseException:
                    if incoming.sizes:
                        connection.abort()  # Ctrl-C: nobody may have said where its bytes go
                    raise
        return True

    def _receive(self, connection: Connection, wait: float, looks: int) -> Incoming | None:
        if not looks:
            return connection.receive(wait)
        looking = self._looking
        begin = _clock.now()
        if looking.due:
            for _ in range(looks):
                incoming = connection.receive(0.0)
                if incoming is not None:
                    looking.looked(True)
                    return incoming
                if _clock.now() - begin > WITHIN:
                    break
                os.sched_yield()
            looking.looked(False)
            begin = _clock.now()
        incoming = connection.receive(wait)
        looking.waited(_clock.now() - begin, incoming is not None)
        return incoming

    # -- what the peer adds ---------------------------------------------------------------------

    def dispatch(self, incoming: Incoming, source: Connection) -> bool:
        raise NotImplementedError

    def lost(self, error: BaseException) -> None:
        raise NotImplementedError


Lane = PythonLane
if not TYPE_CHECKING and native is not None:
    Lane = native.Lane
