"""Bringing a better path up over a connection that is already there.

Two peers that have shaken hands over TCP (or TLS) try the transports that both of them offer,
best first. What a transport has to tell its other end (queue pair numbers, the name of a socket)
travels as small messages over that first connection, so it is as well protected as that is. When
both ends say that the path works it replaces the first connection; when one of them says that it
does not, both go on with what they have, and the reason is known on either side.
"""

from __future__ import annotations

import select
from typing import Any, Final, Protocol

import msgpack

from gpuremote import _clock
from gpuremote.errors import (
    ConnectionLost,
    GpuRemoteError,
    HandshakeTimeout,
    ProtocolError,
    TransportUnavailable,
)
from gpuremote.transport.base import Connection
from gpuremote.transport.lanes.offer import LaneGate, LaneWishes

__all__ = ["Path", "Setup", "Unneeded", "Upgrade", "upgrade"]

MAX_MESSAGE: Final = 64 << 10
MAX_MESSAGES: Final = 64
"""Of one set-up; more is no honest peer."""
_READY: Final = "ready"


class Unneeded(Exception):
    """The client does without, and has told the server so: nothing more is said of it."""


class Path(Protocol):
    """A path that has been tried and works, not in use yet."""

    def connection(self) -> Connection:
        """Take it into use; can't fail. From now on it owns the first connection too (a path
        that has no use for that one closes it here)."""

    def abandon(self) -> None:
        """Give back everything of its own; the first connection stays as it is."""


class Upgrade(Protocol):
    """A transport that is set up over a first connection; what the entry point group
    ``gpuremote.transports`` names (``tcp`` itself offers ``probe`` only)."""

    @staticmethod
    def probe() -> tuple[bool, str]:
        """Whether this side has it, and what was found. Never raises."""

    @staticmethod
    def connect(setup: Setup) -> Path:
        """The client's end.

        Raises
        ------
        TransportUnavailable
            It does not work between these two: why, for people. So does an OSError. Nothing of
            the attempt is left.
        """

    @staticmethod
    def accept(setup: Setup) -> Path:
        """The server's end; as :meth:`connect`."""


class Setup:
    """The messages of one set-up.

    Parameters
    ----------
    connection : Connection
        The first one, on which nothing else is under way.
    blocking : bool
        Whether a thread will wait in ``receive`` of the path's connection; False for a loop.
    deadline : float
        On ``_clock.now()``.

    Attributes
    ----------
    limit : int
        Bytes of its own that a transport may take for buffers; 0: as it thinks best.
    secret : bytes
        Known to both ends of this session alone; for what has to prove itself on another path.
    wishes : LaneWishes or None
        At the client: the further connections that it wants.
    gate : LaneGate or None
        At the server: where they come in.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        blocking: bool,
        deadline: float,
        secret: bytes = b"",
        limit: int = 0,
        wishes: LaneWishes | None = None,
        gate: LaneGate | None = None,
    ) -> None:
        self.connection = connection
        self.blocking = blocking
        self.deadline = deadline
        self.secret = secret
        self.limit = limit
        self.wishes = wishes
        self.gate = gate
        self._heard = 0
        self._over: str | None = None

    @property
    def left(self) -> float:
        """Seconds that are left.

        Raises
        ------
        HandshakeTimeout
            None are.
        """
        left = self.deadline - _clock.now()
        if left <= 0:
            raise HandshakeTimeout(
                "the set-up of a transport took too long", peer=self.connection.peer_address
            )
        return left

    def say(self, message: dict[str, Any]) -> None:
        """Send a message of plain values, 64 KiB packed at most.

        Raises
        ------
        ConnectionLost, HandshakeTimeout
            The first connection is of no use any more.
        """
        self._send({"setup": message})

    def hear(self) -> dict[str, Any]:
        """The other end's next message.

        Raises
        ------
        TransportUnavailable
            The other end gave up; its reason.
        ConnectionLost, HandshakeTimeout, ProtocolError
            The first connection is of no use any more.
        """
        message = self._receive()
        if isinstance(found := message.get("setup"), dict):
            return found
        self._over = str(message.get("over", "no reason given"))
        raise TransportUnavailable(f"the other end: {self._over}")

    def conclude(self, verdict: str) -> str:
        """Tell how it ended here (``"ready"``, or why not) and hear how it ended there."""
        self._send({"over": verdict})
        while self._over is None:
            message = self._receive()
            if "over" in message:
                self._over = str(message["over"])
        theirs, self._over, self._heard = self._over, None, 0
        return theirs

    def _send(self, message: dict[str, Any]) -> None:
        packed = msgpack.packb(message)
        if len(packed) > MAX_MESSAGE:
            raise TransportUnavailable(f"a set-up message of {len(packed)} bytes")
        self.connection.send(packed)
        while not self.connection.flush():
            self._wait(select.POLLOUT)

    def _receive(self) -> dict[str, Any]:
        while (incoming := self.connection.receive(min(self.left, 1.0))) is None:
            pass
        self._heard += 1
        if incoming.sizes or len(incoming.header) > MAX_MESSAGE or self._heard > MAX_MESSAGES:
            raise ProtocolError("no set-up message of a transport")
        try:
            message = msgpack.unpackb(incoming.header)
        except ValueError as error:
            raise ProtocolError(f"a malformed set-up message: {error}") from None
        if not isinstance(message, dict):
            raise ProtocolError("a set-up message that is no map")
        return message

    def _wait(self, wanted: int) -> None:
        poll = select.poll()
        poll.register(self.connection.fileno(), wanted)
        poll.poll(1000 * min(self.left, 1.0))


def upgrade(setup: Setup, transport: type[Upgrade], *, client: bool) -> Connection:
    """Try ``transport``; both ends have to call this for the same one.

    Returns
    -------
    Connection
        The path's, ready for use.

    Raises
    ------
    TransportUnavailable
        It does not work between these two; ``setup.connection`` is as good as before.
    ConnectionLost, HandshakeTimeout, ProtocolError
        ``setup.connection`` is of no use any more.
    """
    path: Path | None = None
    verdict = _READY
    try:
        path = transport.connect(setup) if client else transport.accept(setup)
    except (ConnectionLost, HandshakeTimeout, ProtocolError):
        raise
    except Unneeded as said:
        raise TransportUnavailable(str(said)) from None
    except (GpuRemoteError, OSError) as error:
        verdict = getattr(error, "message", "") or str(error) or type(error).__name__
    try:
        theirs = setup.conclude(verdict)
    except BaseException:
        if path is not None:
            path.abandon()
        raise
    if path is not None and theirs == _READY:
        return path.connection()
    if path is not None:
        path.abandon()
        raise TransportUnavailable(f"the other end: {theirs}")
    raise TransportUnavailable(verdict)
