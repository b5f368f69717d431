"""The way to one server: opens the session's connections, first and after a loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from gpuremote import _clock
from gpuremote._version import __version__
from gpuremote.client.core import Core
from gpuremote.errors import (
    ConnectionLost,
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
from gpuremote.rpc.cooldown import Cooldowns
from gpuremote.rpc.dial import Dialled, dial, host_identity
from gpuremote.rpc.peer import Connection
from gpuremote.rpc.transports import TCP, Explanation, offers
from gpuremote.transport.base import LONG_BURST
from gpuremote.transport.certificates import TlsClient
from gpuremote.transport.lanes.offer import LanePolicy
from gpuremote.wire.hello import Hello, Welcome
from gpuremote.wire.repeats import new_repeats, offered
from gpuremote.wire.state import State, Stimulus

__all__ = ["Link"]

log = logging.getLogger("gpuremote.transport")

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
    tls : TlsClient or None
        Whom to trust; None: nothing is encrypted.
    lanes : LanePolicy
        Further connections for large payloads, over tcp.
    dedupe : {"auto", "on", "off"}
        Whether large uploads are looked for at the server.
    on_transport : list of callable
        Called with the explanation whenever the transport changes, in whichever thread opens
        connections.
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
    tls: TlsClient | None = None
    lanes: LanePolicy = field(default_factory=LanePolicy)
    dedupe: str = "off"
    server_ended: Callable[[], str | None] = lambda: None
    welcome: Welcome = field(default_factory=Welcome)
    explanation: Explanation = field(default_factory=Explanation)
    on_transport: list[Callable[[Explanation], None]] = field(default_factory=list)
    _lost_at: float = 0.0
    _cooldowns: Cooldowns = field(default_factory=Cooldowns)
    _present: str = ""  # the transport in use
    _broken: str = ""  # the one that was, when the connection broke
    _tried: dict[str, str] = field(default_factory=dict)  # in vain, when the session was opened
    _unusable: dict[str, str] = field(default_factory=dict)
    _warned: set[tuple[str, str]] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def open(self, core: Core, *, blocking: bool) -> Connection:
        """Open the session. Blocks for at most ``connect_timeout``, and while the server says that
        it starts a process.

        Raises
        ------
        GpuRemoteError
            See ``rpc.dial.dial``; TransportUnavailable if a required transport can't be had.
        """
        found = self._dial(self.connect_timeout, blocking, memory_limit=self.memory_limit)
        connection, welcome = found.connection, found.welcome
        self.welcome = welcome
        self._in_use(core, found)
        with core.lock:
            core.session = welcome.session
            core.advertised = welcome.advertise or self.name
            core.encrypted = self.tls is not None
            core.known.enabled = welcome.contents == 1
            core.peer.grant(welcome.window)
            core.inline = welcome.inline
            core.repeats = new_repeats() if welcome.repeats and offered() else None
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
                self._take_note(core.peer.failure)
            if core.state.value is State.CLOSED and core.dead is None:
                # Either side closes it after the goodbyes; another thread may have seen that first.
                core.die(SessionClosed("the session was closed meanwhile", peer=self.name))

    def attempt(self, core: Core, *, blocking: bool, within: float | None = None) -> Dialled:
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
        timeout = max(0.1, min(self.connect_timeout, self.remaining()))
        if within is not None:
            # A handshake gets a second all the same, or a program that asks again and again
            # with short timeouts would never come back.
            timeout = min(timeout, max(1.0, within))
        return self._dial(
            timeout,
            blocking,
            session=self.welcome.session,
            secret=self.welcome.secret,
            receipt=receipt,
        )

    def resumed(self, core: Core, found: Dialled) -> None:
        """Go on over a connection that :meth:`attempt` gave. The session is dead afterwards if
        the server's receipt makes no sense."""
        connection, welcome = found.connection, found.welcome
        self._in_use(core, found)
        with core.lock:
            core.stats.reconnects += 1
            core.state.advance(Stimulus.RESUMED)
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

    def _dial(self, timeout: float, blocking: bool, **more: Any) -> Dialled:
        """Open a connection, over the transport that is wanted if there is one."""
        wanted = self.require or self.transport
        resting = {} if wanted else self._tried | self._cooldowns.resting()
        if self.tls is not None and not wanted:
            # Who asks for encryption gets it, unless he asks for verbs as well.
            resting["rdma"] = "does not encrypt, as TLS would; transport=rdma asks for it"
        offered, self._unusable = offers(wanted, resting)
        hello = Hello(
            software=f"gpuremote {__version__}", host=host_identity(), transports=offered, **more
        )
        found = dial(
            self.host,
            self.port,
            hello,
            timeout=timeout,
            blocking=blocking,
            token=self.token,
            tls=self.tls,
            lanes=self.lanes,
        )
        if blocking:
            found.connection.burst = LONG_BURST
        if wanted in (None, found.connection.name):
            return found
        found.connection.abort()
        explanation = Explanation.of(found.welcome.choice, found.connection, found.failures)
        reasons = explanation.reasons()
        raise TransportUnavailable(
            f"transport {wanted!r} is asked for and can't be had: {reasons.get(wanted)}",
            reasons=reasons,
            peer=self.name,
        )

    def _take_note(self, failure: BaseException | None) -> None:
        """The transport in use broke, unless this side ended the connection."""
        name, self._present = self._present, ""
        deliberate = isinstance(failure, ConnectionLost) and failure.deliberate
        if name not in ("", TCP) and not (self.require or self.transport or deliberate):
            self._broken = name
            self._cooldowns.failed(name, str(failure))

    def _in_use(self, core: Core, found: Dialled) -> None:
        """Take note of which transport the session goes on over."""
        name = found.connection.name
        before = self.explanation.chosen
        for failed, reason in found.failures.items():
            if failed in self._cooldowns.reasons:
                self._cooldowns.failed(failed, reason)
            else:
                self._tried[failed] = reason
            self._fell_back(core, failed, name, reason)
        if self._broken and self._broken != name:
            self._fell_back(core, self._broken, name, self._cooldowns.reasons[self._broken])
        self._broken = ""
        if name != TCP:
            self._cooldowns.used(name)
        core.far = found.far
        self._present = name
        unusable = self._unusable | self._cooldowns.reasons | found.failures
        self.explanation = Explanation.of(found.welcome.choice, found.connection, unusable)
        if name != before:
            for told in self.on_transport:
                told(self.explanation)

    def _fell_back(self, core: Core, name: str, to: str, reason: str) -> None:
        core.stats.fallbacks += 1
        if (name, reason) not in self._warned:
            self._warned.add((name, reason))
            log.warning("transport %s to %s failed, %s is used: %s", name, self.name, to, reason)

    @property
    def better_at(self) -> float | None:
        """When a transport that was lost may be tried again, on ``_clock.now()``; None while
        there is none."""
        return None if self._present != TCP else self._cooldowns.due()

    def leave(self, core: Core) -> None:
        """Give up a connection that works, as the next one may be better."""
        with core.lock:
            if core.state.value is not State.OPEN:
                return  # a session that is closing does not come back
            self._present = ""
            core.peer.lost(ConnectionLost("left, to try a transport that was lost"))
