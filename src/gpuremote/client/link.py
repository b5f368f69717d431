"""The way to one server: opens the session's connections, first and after a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from gpuremote import _clock
from gpuremote._version import __version__
from gpuremote.client.core import Core
from gpuremote.errors import (
    GpuRemoteError,
    NotAGpuRemoteServer,
    ProtocolError,
    SessionClosed,
    SessionLost,
    TransportError,
    TransportUnavailable,
    UnsupportedVersion,
    WorkerDied,
)
from gpuremote.rpc.dial import dial, host_identity
from gpuremote.rpc.peer import Connection
from gpuremote.rpc.transports import Explanation, offers
from gpuremote.wire.hello import Hello, Welcome
from gpuremote.wire.state import State, Stimulus

__all__ = ["Link"]

MAX_PAUSE: Final = 1.0
"""Longest pause between two attempts to come back, in seconds."""


@dataclass
class Link:
    """Where a session's connections lead.

    Attributes
    ----------
    connect_timeout : float
        Seconds for one attempt, handshake included.
    grace : float
        Seconds to try for after a loss; the server's own grace period counts if it is shorter.
    transport, require : str or None
        As in the URL: the only transport to try; the one that must be had.
    token : bytes
        What both ends have to know; empty: nothing.
    server_ended : callable
        For a server that this process started: says how it ended, or None while it runs.
    """

    host: str
    port: int
    connect_timeout: float = 10.0
    transport: str | None = None
    require: str | None = None
    memory_limit: int = 0
    grace: float = 60.0
    token: bytes = field(default=b"", repr=False)
    server_ended: Callable[[], str | None] = lambda: None
    welcome: Welcome = field(default_factory=Welcome)
    explanation: Explanation = field(default_factory=Explanation)
    _lost_at: float = 0.0

    @property
    def name(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def open(self, core: Core, *, blocking: bool) -> Connection:
        """Open the session. Blocks for at most ``connect_timeout``.

        Raises
        ------
        GpuRemoteError
            See ``rpc.dial.dial``; TransportUnavailable if a required transport can't be had.
        """
        offered = offers(self.transport, self.require)
        hello = self._hello(transports=offered, memory_limit=self.memory_limit)
        connection, welcome = dial(
            self.host,
            self.port,
            hello,
            timeout=self.connect_timeout,
            blocking=blocking,
            token=self.token,
        )
        self.welcome = welcome
        self.explanation = Explanation.of(welcome.choice, connection)
        wanted = self.require or self.transport
        if wanted is not None and self.explanation.chosen != wanted:
            connection.abort()
            raise TransportUnavailable(
                f"transport {wanted!r} is asked for and the server chose "
                f"{self.explanation.chosen!r}",
                reasons=self.explanation.reasons(),
                peer=self.name,
            )
        with core.lock:
            core.session = welcome.session
            core.advertised = welcome.advertise or self.name
            core.peer.grant(welcome.window)
            core.state.advance(Stimulus.WELCOME)
            try:
                core.peer.attach(connection, welcome.receipt)
            except ProtocolError as error:
                connection.abort()
                error.peer = self.name
                raise
        return connection

    def lost(self, core: Core) -> None:
        """Take note that the connection broke. Once for each loss is enough."""
        with core.lock:
            if core.state.value in (State.OPEN, State.CLOSING):
                self._lost_at = _clock.now()
                core.state.advance(Stimulus.CONNECTION_LOST)
            if core.state.value is State.CLOSED and core.dead is None:
                # Either side closes it after the goodbyes; another thread may have seen that first.
                core.die(SessionClosed("the session was closed meanwhile", peer=self.name))

    def attempt(
        self, core: Core, *, blocking: bool, within: float | None = None
    ) -> tuple[Connection, Welcome]:
        """Try once to come back, for not much longer than ``within`` seconds if that is given.
        Blocks; touches nothing of the core but its receipt.

        Raises
        ------
        SessionLost, WorkerDied, UnsupportedVersion
            Final.
        GpuRemoteError
            Anything else may be tried again until the grace period is over.
        """
        ended = self.server_ended()
        if ended is not None:
            raise SessionLost(f"the local server {ended}", peer=self.name)
        with core.lock:
            receipt = core.peer.receipt()
        hello = self._hello(
            session=self.welcome.session,
            secret=self.welcome.secret,
            receipt=receipt,
            transports=offers(self.transport, self.require),
        )
        timeout = max(0.1, min(self.connect_timeout, self.remaining()))
        if within is not None:
            # A handshake gets a second all the same, or a program that asks again and again
            # with short timeouts would never come back.
            timeout = min(timeout, max(1.0, within))
        return dial(
            self.host, self.port, hello, timeout=timeout, blocking=blocking, token=self.token
        )

    def resumed(self, core: Core, connection: Connection, welcome: Welcome) -> None:
        """Go on over a connection that :meth:`attempt` gave. The session is dead afterwards if
        the server's receipt makes no sense."""
        with core.lock:
            core.stats.reconnects += 1
            core.state.advance(Stimulus.RESUMED)
            self.explanation = Explanation.of(welcome.choice, connection)
            try:
                core.peer.attach(connection, welcome.receipt)
            except ProtocolError as error:
                core.peer.connection = connection
                core.peer.lost(error)
                core.die(error)

    def remaining(self) -> float:
        """Seconds that are left of the grace period."""
        return self._lost_at + min(self.grace, self.welcome.grace) - _clock.now()

    def give_up(self, core: Core, error: GpuRemoteError | None) -> None:
        """The session can't be had back."""
        with core.lock:
            if isinstance(error, WorkerDied):
                core.state.advance(Stimulus.WORKER_DIED)
            elif error is not None:
                core.state.advance(Stimulus.REFUSED)
            else:
                core.state.advance(Stimulus.GRACE_OVER)
                error = SessionLost(
                    "the connection to the server could not be restored within the grace period of "
                    f"{min(self.grace, self.welcome.grace):.0f} s; open a new session (what lived "
                    "in this one is gone)",
                    peer=self.name,
                )
            core.die(error)

    @staticmethod
    def final(error: GpuRemoteError) -> bool:
        """Whether trying again is of no use."""
        return isinstance(error, (SessionLost, UnsupportedVersion)) or not isinstance(
            error, (TransportError, NotAGpuRemoteServer, TimeoutError, ConnectionError)
        )

    def _hello(self, **more: Any) -> Hello:
        return Hello(software=f"gpuremote {__version__}", host=host_identity(), **more)
