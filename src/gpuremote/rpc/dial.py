"""Opening a connection to a server: connect, handshake, hand over.

Blocking, with one deadline for all of it; the asyncio driver runs it in a thread of the loop's
executor (a connection is opened once, or after a loss: never on the hot path).
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from gpuremote import _clock
from gpuremote.errors import (
    AuthenticationFailed,
    ConnectionLost,
    GpuRemoteError,
    HandshakeTimeout,
    NotAGpuRemoteServer,
    ProtocolError,
    SessionLost,
    TransportError,
    TransportUnavailable,
    error_from_wire,
)
from gpuremote.transport.base import Connection
from gpuremote.transport.certificates import TlsClient, handshake_failure
from gpuremote.transport.lanes.offer import LanePolicy, LaneWishes
from gpuremote.transport.lanes.rule import LONG_WAY
from gpuremote.transport.select import TCP, climb
from gpuremote.transport.setup import Setup
from gpuremote.transport.tcp import join_address, open_tcp
from gpuremote.transport.tls import TlsSocket, stream_connection
from gpuremote.wire.hello import (
    Attach,
    Challenge,
    Hello,
    HelloReader,
    Message,
    Opened,
    Proof,
    Refusal,
    Route,
    Starting,
    Welcome,
)
from gpuremote.wire.identity import NONCE_SIZE, client_proof, matches, server_proof

__all__ = ["dial", "host_identity", "read_hello"]

log = logging.getLogger("gpuremote.client")

Reached = socket.socket | TlsSocket

MAX_START: Final = 300.0
"""Seconds that a server may ask for to start a process."""
OPENINGS: Final = 3
"""Sessions opened at a server with TLS until one of them welcomes the client, as the process of
one may be killed before it has."""


def host_identity() -> str:
    """Names this host and boot, without telling anything about it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    return hashlib.sha256(boot.encode()).hexdigest()[:32]


class Dialled(NamedTuple):
    """What :func:`dial` brought.

    Attributes
    ----------
    connection : Connection
    welcome : Welcome
    failures : dict of str to str
        Transports that were tried and did not work, with the reason.
    far : bool
        The session goes over sockets, and a long way.
    """

    connection: Connection
    welcome: Welcome
    failures: dict[str, str]
    far: bool


def dial(
    host: str,
    port: int,
    hello: Hello,
    *,
    timeout: float,
    blocking: bool,
    token: bytes = b"",
    tls: TlsClient | None = None,
    lanes: LanePolicy | None = None,
) -> Dialled:
    """Connect to ``host:port``, complete the handshake, and go on over the best transport that
    both ends have and that works between them.

    Parameters
    ----------
    hello : Hello
        What this side says.
    timeout : float
        Seconds for name resolution, connect and handshake together. Where the server says that it
        has to start a process for the session first, that is waited for besides.
    blocking : bool
        Whether the connection will be driven by a blocking thread or by an event loop.
    token : bytes
        The secret that both ends have to know; empty: none.
    tls : TlsClient, optional
        Encrypt, and connect to a server whose certificate is for ``host`` only. Without it nothing
        is encrypted.
    lanes : LanePolicy, optional
        Where tcp is what is used: open further connections for large payloads; takes note of how
        far the server is.

    Raises
    ------
    ConnectionFailed
        Refused, unreachable, no such host.
    HandshakeTimeout
        Connected, and then no answer in time.
    NotAGpuRemoteServer
        Something else answers there.
    UnsupportedVersion
        No common protocol version.
    AuthenticationFailed
        The server wants a token that this side does not have, or does not know this side's. Or
        its certificate is not trusted or for another name, or it does not trust this side's, or
        one of the two speaks TLS and the other does not.
    ConfigError
        The files of ``tls`` can't be used.
    GpuRemoteError
        Whatever the server refuses with.
    """
    deadline = _clock.now() + timeout
    peer = join_address(host, port)
    sock: Reached | None = None
    connection: Connection | None = None
    try:
        offers = lanes is not None and TCP in hello.transports and lanes.worth_offering
        hello = replace(hello, lanes=int(offers), patient=int(not hello.session))
        sock, answer, seconds, deadline = _reach(host, port, hello, deadline, token, tls)

        def dial_lane(number: int, proof: bytes, until: float) -> Reached:
            lane = Attach(answer.session, number, proof)
            return _attach(host, port, lane, min(until, deadline), token, tls)

        connection = stream_connection(sock, blocking=blocking)
        wishes = None
        if offers and lanes is not None:
            lanes.heard(seconds, connection.local_address.rpartition(":")[0])
            wishes = LaneWishes(lanes, dial_lane)
        setup = Setup(
            connection,
            blocking=blocking,
            deadline=deadline,
            secret=answer.secret,
            wishes=wishes,
        )
        connection, failures = climb(setup, _order(answer, hello), client=True)
        # Where the kernel takes the way for a short one, and there is a tunnel at most, a process
        # that was not scheduled at once must not count as one.
        far = connection.name == TCP and seconds >= LONG_WAY * (2 if connection.near else 1)
        return Dialled(connection, answer, failures, far)
    except BaseException as error:
        if connection is not None:
            connection.abort()
        elif sock is not None:
            sock.close()
        if isinstance(error, GpuRemoteError):
            error.peer = error.peer or peer
        raise


def _order(answer: Welcome, hello: Hello) -> list[str]:
    """The transports to try."""
    order = answer.choice.get("order", [])
    if (
        not isinstance(order, list)
        or not all(name in hello.transports for name in order)
        or (TCP in order and not hello.lanes)
    ):
        raise ProtocolError("the server wants a transport that was not offered to it")
    return order


def _reach(
    host: str, port: int, hello: Hello, deadline: float, token: bytes, tls: TlsClient | None
) -> tuple[Reached, Welcome, float, float]:
    """Get to where somebody says welcome; also the seconds that the fastest answer took, and the
    deadline from then on."""
    if tls is not None:
        tls.context()  # before anything is connected
    left = OPENINGS
    while True:
        sock, answer, seconds, deadline = _ask(host, port, hello, deadline, token, tls)
        if isinstance(answer, Welcome):
            return sock, answer, seconds, deadline
        sock.close()
        left -= 1
        coming = replace(hello, session=answer.session, secret=answer.secret, patient=0)
        try:
            sock, answer, again, deadline = _ask(host, port, coming, deadline, token, tls)
        except (TransportError, SessionLost):
            # Nobody has said welcome, so nothing is lost, and another process may have more luck.
            if not left:
                raise
        else:
            assert isinstance(answer, Welcome)
            return sock, answer, min(seconds, again), deadline


def _ask(
    host: str, port: int, hello: Hello, deadline: float, token: bytes, tls: TlsClient | None
) -> tuple[Reached, Welcome | Opened, float, float]:
    """Connect, and shake hands once; also the seconds that the fastest answer took, and the
    deadline from then on."""
    peer = join_address(host, port)
    sock: Reached = open_tcp(host, port, max(0.001, deadline - _clock.now()))
    try:
        if isinstance(sock, socket.socket) and tls is not None:
            if hello.session:
                _say(sock, Route(hello.session).encode(), deadline, peer)
            sock = TlsSocket(sock, tls, host)
            _verify(sock, deadline, peer)
        answer, seconds, deadline = _exchange(sock, hello, deadline, peer, token)
        if isinstance(answer, Refusal):
            raise _refused(answer, peer)
        if isinstance(answer, Opened) and (tls is None or hello.session):
            raise ProtocolError("the server opens a session where none is to be opened")
        return sock, answer, seconds, deadline
    except BaseException as error:
        sock.close()
        if isinstance(error, ssl.SSLError) and tls is not None and isinstance(sock, TlsSocket):
            raise handshake_failure(error, host, tls, sock.first) from error
        raise


def _verify(sock: TlsSocket, deadline: float, peer: str) -> None:
    """The TLS handshake. An ``ssl.SSLError`` says who does not trust whom."""
    try:
        sock.handshake(deadline)
    except TimeoutError as error:
        raise HandshakeTimeout(
            "connected, but no TLS handshake came about in time; is this a gpuremote server with "
            "--certfile, and is it overloaded?",
            peer=peer,
        ) from error
    except ssl.SSLError:
        raise
    except OSError as error:
        raise NotAGpuRemoteServer(
            f"the connection broke during the TLS handshake ({error}); is this a gpuremote server "
            "with --certfile?",
            peer=peer,
        ) from error


def _exchange(
    sock: Reached, hello: Hello, deadline: float, peer: str, token: bytes
) -> tuple[Welcome | Opened | Refusal, float, float]:
    if token:
        hello = replace(hello, nonce=secrets.token_bytes(NONCE_SIZE))
    said = hello.encode()
    begin = _clock.now()
    _say(sock, said, deadline, peer)
    answer = read_hello(sock, deadline, peer)
    seconds = _clock.now() - begin
    if isinstance(answer, Welcome):  # which comes when there is a process for the session
        seconds = max(0.0, seconds - max(0, answer.took) * 1e-6)
    if isinstance(answer, Challenge):
        if not token:
            raise AuthenticationFailed(
                "the server wants a token; set GPUREMOTE_TOKEN to what its --token-file holds"
            )
        refusal = _prove(sock, answer, said, deadline, peer, token)
        answer = refusal or read_hello(sock, deadline, peer)
    elif token and isinstance(answer, Welcome | Opened | Starting):
        raise AuthenticationFailed(
            "GPUREMOTE_TOKEN is set and the server did not ask for a token: start it with "
            "--token-file, or unset the variable"
        )
    if isinstance(answer, Starting) and hello.patient:
        # Which NaN is not, either.
        patience = answer.seconds if 0 <= answer.seconds <= MAX_START else MAX_START
        log.info(
            "%s starts a process for this session, which may take up to %.0f s", peer, patience
        )
        deadline += patience
        answer = read_hello(sock, deadline, peer)
    if not isinstance(answer, Welcome | Opened | Refusal):
        kind = type(answer).__name__.upper()
        raise ProtocolError(f"the server answered the handshake with a {kind}", peer=peer)
    return answer, seconds, deadline


def _prove(
    sock: Reached, challenge: Challenge, said: bytes, deadline: float, peer: str, token: bytes
) -> Refusal | None:
    """Show that this side knows the token, and see that the server does; None, or why not."""
    certificate = sock.certificate if isinstance(sock, TlsSocket) else b""
    nonce = challenge.nonce
    if len(nonce) < NONCE_SIZE:
        raise ProtocolError(f"a challenge of {len(nonce)} bytes", peer=peer)
    _say(sock, Proof(client_proof(token, nonce, said, certificate)).encode(), deadline, peer)
    answer = read_hello(sock, deadline, peer)
    if isinstance(answer, Refusal):
        return answer
    if not isinstance(answer, Proof):
        raise AuthenticationFailed("the server took the proof and gave none of its own")
    if not matches(answer.proof, server_proof(token, nonce, said, certificate)):
        raise AuthenticationFailed(
            "what answers there does not know the token: it is not the server that you mean"
        )
    return None


def _attach(
    host: str, port: int, lane: Attach, deadline: float, token: bytes, tls: TlsClient | None
) -> Reached:
    """Connect, and say which lane of which session this is. Whether it is let in is told over the
    session's first connection."""
    peer = join_address(host, port)
    sock: Reached = open_tcp(host, port, max(0.001, deadline - _clock.now()))
    try:
        if isinstance(sock, socket.socket) and tls is not None:
            _say(sock, Route(lane.session).encode(), deadline, peer)
            sock = TlsSocket(sock, tls, host)
            _verify(sock, deadline, peer)
        said = lane.encode()
        _say(sock, said, deadline, peer)
        if token:
            answer = read_hello(sock, deadline, peer)
            if isinstance(answer, Challenge):
                answer = _prove(sock, answer, said, deadline, peer, token) or answer
            if isinstance(answer, Refusal):
                raise _refused(answer, peer)
            if not isinstance(answer, Challenge):
                raise ProtocolError("the server wants no proof of the token", peer=peer)
        return sock
    except BaseException:
        sock.close()
        raise


def _say(sock: Reached, message: bytes, deadline: float, peer: str) -> None:
    try:
        sock.settimeout(max(0.001, deadline - _clock.now()))
        sock.sendall(message)
    except TimeoutError as error:
        raise HandshakeTimeout("the server does not take the handshake", peer=peer) from error
    except ssl.SSLError:
        raise
    except OSError as error:
        raise NotAGpuRemoteServer(
            f"the connection broke during the handshake ({error}); is this a gpuremote server?",
            peer=peer,
        ) from error


def read_hello(sock: Reached, deadline: float, peer: str) -> Message:
    """Read one handshake message from a socket, and not a byte more.

    Raises
    ------
    HandshakeTimeout, NotAGpuRemoteServer, UnsupportedVersion, ProtocolError
    ssl.SSLError
        The other end does not trust this one: in TLS 1.3 it says so with its first words.
    """
    reader = HelloReader(peer)
    while True:
        remaining = deadline - _clock.now()
        if remaining <= 0:
            raise HandshakeTimeout(
                "connected, but no answer to the handshake came in time; is this a gpuremote "
                "server, and is it overloaded?",
                peer=peer,
            )
        sock.settimeout(remaining)
        try:
            data = sock.recv(reader.missing)
        except TimeoutError:
            continue
        except ssl.SSLError:
            raise
        except OSError as error:
            raise NotAGpuRemoteServer(
                f"the connection broke during the handshake ({error}); is this a gpuremote server?",
                peer=peer,
            ) from error
        found = reader.feed(data)
        if found is not None:
            return found


def _refused(refusal: Refusal, peer: str) -> GpuRemoteError:
    if refusal.code == TransportUnavailable.code:
        return TransportUnavailable(refusal.message, reasons=refusal.reasons, peer=peer)
    if refusal.code == ConnectionLost.code:
        return ConnectionLost(refusal.message, peer=peer)
    return error_from_wire(refusal.code, refusal.message, peer=peer)
