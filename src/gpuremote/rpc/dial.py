"""Opening a connection to a server: connect, handshake, hand over.

Blocking, with one deadline for all of it; the asyncio driver runs it in a thread of the loop's
executor (a connection is opened once, or after a loss: never on the hot path).
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpuremote import _clock
from gpuremote.errors import (
    AuthenticationFailed,
    ConnectionLost,
    GpuRemoteError,
    HandshakeTimeout,
    NotAGpuRemoteServer,
    ProtocolError,
    TransportUnavailable,
    error_from_wire,
)
from gpuremote.transport.base import Connection
from gpuremote.transport.select import climb
from gpuremote.transport.setup import Setup
from gpuremote.transport.tcp import TcpConnection, open_tcp, tune
from gpuremote.wire.hello import (
    Challenge,
    Hello,
    HelloReader,
    Message,
    Proof,
    Refusal,
    Welcome,
)
from gpuremote.wire.identity import NONCE_SIZE, client_proof, matches, server_proof

__all__ = ["dial", "host_identity", "read_hello"]


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
    """

    connection: Connection
    welcome: Welcome
    failures: dict[str, str]


def dial(
    host: str, port: int, hello: Hello, *, timeout: float, blocking: bool, token: bytes = b""
) -> Dialled:
    """Connect to ``host:port``, complete the handshake, and go on over the best transport that
    both ends have and that works between them.

    Parameters
    ----------
    hello : Hello
        What this side says.
    timeout : float
        Seconds for name resolution, connect and handshake together.
    blocking : bool
        Whether the connection will be driven by a blocking thread or by an event loop.
    token : bytes
        The secret that both ends have to know; empty: none.

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
        The server wants a token that this side does not have, or does not know this side's.
    GpuRemoteError
        Whatever the server refuses with.
    """
    deadline = _clock.now() + timeout
    peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    sock = open_tcp(host, port, timeout)
    connection: Connection | None = None
    try:
        answer = _exchange(sock, hello, deadline, peer, token)
        if isinstance(answer, Refusal):
            raise _refused(answer, peer)
        reason = tune(sock)
        connection = TcpConnection(sock, blocking=blocking, reason=reason)
        setup = Setup(connection, blocking=blocking, deadline=deadline, secret=answer.secret)
        connection, failures = climb(setup, _order(answer, hello), client=True)
        return Dialled(connection, answer, failures)
    except BaseException as error:
        if connection is not None:
            connection.abort()
        sock.close()
        if isinstance(error, GpuRemoteError):
            error.peer = error.peer or peer
        raise


def _order(answer: Welcome, hello: Hello) -> list[str]:
    """The transports to try above tcp."""
    order = answer.choice.get("order", [])
    if not isinstance(order, list) or not all(name in hello.transports for name in order):
        raise ProtocolError("the server wants a transport that was not offered to it")
    return order


def _exchange(
    sock: socket.socket, hello: Hello, deadline: float, peer: str, token: bytes
) -> Welcome | Refusal:
    if token:
        hello = replace(hello, nonce=secrets.token_bytes(NONCE_SIZE))
    said = hello.encode()
    _say(sock, said, deadline, peer)
    answer = read_hello(sock, deadline, peer)
    if isinstance(answer, Challenge):
        if not token:
            raise AuthenticationFailed(
                "the server wants a token; set GPUREMOTE_TOKEN to what its --token-file holds"
            )
        nonce = answer.nonce
        if len(nonce) < NONCE_SIZE:
            raise ProtocolError(f"a challenge of {len(nonce)} bytes", peer=peer)
        _say(sock, Proof(client_proof(token, nonce, said)).encode(), deadline, peer)
        answer = read_hello(sock, deadline, peer)
        if isinstance(answer, Proof):
            if not matches(answer.proof, server_proof(token, nonce, said)):
                raise AuthenticationFailed(
                    "what answers there does not know the token: it is not the server that you mean"
                )
            answer = read_hello(sock, deadline, peer)
        elif not isinstance(answer, Refusal):
            raise AuthenticationFailed("the server took the proof and gave none of its own")
    elif token and isinstance(answer, Welcome):
        raise AuthenticationFailed(
            "GPUREMOTE_TOKEN is set and the server did not ask for a token: start it with "
            "--token-file, or unset the variable"
        )
    if not isinstance(answer, Welcome | Refusal):
        kind = type(answer).__name__.upper()
        raise ProtocolError(f"the server answered the handshake with a {kind}", peer=peer)
    return answer


def _say(sock: socket.socket, message: bytes, deadline: float, peer: str) -> None:
    try:
        sock.settimeout(max(0.001, deadline - _clock.now()))
        sock.sendall(message)
    except TimeoutError as error:
        raise HandshakeTimeout("the server does not take the handshake", peer=peer) from error
    except OSError as error:
        raise NotAGpuRemoteServer(
            f"the connection broke during the handshake ({error}); is this a gpuremote server?",
            peer=peer,
        ) from error


def read_hello(sock: socket.socket, deadline: float, peer: str) -> Message:
    """Read one handshake message from a socket, and not a byte more.

    Raises
    ------
    HandshakeTimeout, NotAGpuRemoteServer, UnsupportedVersion, ProtocolError
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
