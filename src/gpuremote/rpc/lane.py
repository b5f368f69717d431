"""Numbers, sends and takes in reliable messages: what every message goes through."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from gpuremote._speed import native
from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost
from gpuremote.transport.base import Connection, Incoming
from gpuremote.wire.frames import HEADER

__all__ = ["Lane", "Plain"]

Plain = tuple[int, int, int, int, BytesLike]
"""A message without payload that is kept: seq, kind, flags, arg, body."""

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
    copied : int
        Bytes that it has put in place so.
    """

    connection: Connection | None
    lock: threading.RLock
    waits: dict[int, Any] | None
    copied: int
    sent: int
    credit: int
    messages_sent: int
    messages_received: int
    arriving: dict[int, Any]
    _sink: Any
    _plain: deque[Plain]
    _bulk: dict[int, Any]
    _seen: int
    _complete: int
    _got: int
    _granted: int
    _unreported: int
    _ack_after: int
    _low_credit: int

    def post(self, kind: int, body: BytesLike, arg: int = 0, flags: int = 0, /) -> None:
        """Send a reliable message. ``body`` must not be changed afterwards."""
        seq = self.sent = self.sent + 1
        self._plain.append((seq, kind, flags, arg, body))
        self.credit -= _PREFIX + len(body)
        connection = self.connection
        if connection is not None:
            self.messages_sent += 1
            try:
                connection.send(_pack(kind, flags, 0, arg, seq, self._complete) + body)
            except ConnectionLost as error:
                self.lost(error)

    def take(self, connection: Connection, wait: float = 0.0, looks: int = 1, /) -> bool:
        """Receive from ``connection``, without the lock, and take in what came, with it.

        Parameters
        ----------
        wait : float
            As for ``Connection.receive``.
        looks : int
            Times to look before nothing is there.

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
        incoming = connection.receive(wait)
        while incoming is None and looks > 1:
            incoming = connection.receive(wait)
            looks -= 1
        if incoming is None:
            return False
        with self.lock:
            self.dispatch(incoming, connection)
        return True

    # -- what the peer adds ---------------------------------------------------------------------

    def dispatch(self, incoming: Incoming, source: Connection) -> None:
        raise NotImplementedError

    def lost(self, error: BaseException) -> None:
        raise NotImplementedError


Lane = PythonLane
if not TYPE_CHECKING and native is not None:
    Lane = native.Lane
