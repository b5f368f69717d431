"""Connections that come to a worker with TLS: handshakes in threads of their own.

Whoever knows a session's number, which is no secret, gets as far as here. So what they do can hold
up neither the session nor each other: each has a deadline, only a few are looked at at a time, and
nothing of the session is touched before one has shown the session's secret or a ticket.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from gpuremote import _clock
from gpuremote.errors import AuthenticationFailed, GpuRemoteError, ProtocolError, SessionLost
from gpuremote.transport.certificates import TlsServer
from gpuremote.transport.tls import TlsSocket
from gpuremote.wire.hello import (
    Attach,
    Challenge,
    Hello,
    HelloReader,
    Proof,
    Refusal,
    choose_version,
)
from gpuremote.wire.identity import NONCE_SIZE, client_proof, matches, server_proof

__all__ = ["Reception"]

MAX_HANDSHAKES: Final = 24
"""At a time; a further one takes the place of the oldest. The lanes of a session come at once."""
HANDSHAKE_TIMEOUT: Final = 5.0
GOODBYE: Final = 1.0
"""Seconds for telling somebody why not."""

Admit = Callable[[TlsSocket, Hello | Attach, dict[str, Any]], None]


class Reception:
    """Looks who is there, and lets them in.

    Parameters
    ----------
    tls : TlsServer
    token : bytes
        What they have to know; empty: nothing.
    admit : callable
        Called in the thread of the handshake with those who have proved who they are: the socket
        (its from then on), their HELLO, and what the daemon said of the connection. Or with the
        ATTACH of a lane, whose proof nobody has looked at.
    """

    def __init__(self, tls: TlsServer, token: bytes, admit: Admit) -> None:
        self._tls = tls
        self._token = token
        self._admit = admit
        self._lock = threading.Lock()
        self._under_way: dict[int, socket.socket] = {}  # oldest first
        self._number = 0

    def receive(self, sock: socket.socket, request: dict[str, Any]) -> None:
        """Somebody wants in. Returns at once; owns ``sock``."""
        with self._lock:
            self._number += 1
            number = self._number
            if len(self._under_way) >= MAX_HANDSHAKES:
                oldest = self._under_way.pop(next(iter(self._under_way)))
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._under_way[number] = sock
        threading.Thread(
            target=self._greet, args=(number, sock, request), name="gpuremote-tls", daemon=True
        ).start()

    def _greet(self, number: int, sock: socket.socket, request: dict[str, Any]) -> None:
        line = TlsSocket(sock, self._tls)
        try:
            hello = self._identify(line, request, _clock.now() + HANDSHAKE_TIMEOUT)
        except (OSError, GpuRemoteError) as error:
            print(f"gpuremote worker: a connection was not let in: {error}", file=sys.stderr)
            _refuse(line, error)
            line.close()
            return
        finally:
            with self._lock:
                self._under_way.pop(number, None)
        self._admit(line, hello, request)

    def _identify(
        self, line: TlsSocket, request: dict[str, Any], deadline: float
    ) -> Hello | Attach:
        """The HELLO of somebody who may come in, or the ATTACH of a lane.

        Raises
        ------
        AuthenticationFailed, SessionLost, ProtocolError
        OSError
            TLS failed, or the connection broke.
        """
        line.handshake(deadline)
        reader = _read(line, deadline)
        if self._token:
            self._authenticate(line, reader.raw, deadline)
        hello = reader.message()
        if not isinstance(hello, Hello | Attach):
            raise ProtocolError("a server's handshake message came from a client")
        if not hmac.compare_digest(hello.session, request["session"]):
            raise ProtocolError("it names another session than the ROUTE")
        if isinstance(hello, Attach):
            return hello
        choose_version(*hello.versions)
        if not hello.ticket and not hmac.compare_digest(hello.secret, request["secret"]):
            raise SessionLost("the secret is not the one of this session")
        return hello

    def _authenticate(self, line: TlsSocket, hello: bytes, deadline: float) -> None:
        nonce = secrets.token_bytes(NONCE_SIZE)
        certificate = self._tls.certificate
        _say(line, Challenge(nonce), deadline)
        answer = _read(line, deadline).message()
        expected = client_proof(self._token, nonce, hello, certificate)
        if not isinstance(answer, Proof) or not matches(answer.proof, expected):
            raise AuthenticationFailed("the token is not the one that this server knows")
        _say(line, Proof(server_proof(self._token, nonce, hello, certificate)), deadline)


def _read(line: TlsSocket, deadline: float) -> HelloReader:
    """One complete handshake message."""
    reader = HelloReader("client")
    whole = False
    while not whole:
        line.settimeout(max(0.001, deadline - _clock.now()))
        whole = reader.fill(line.recv(reader.missing))
    return reader


def _say(line: TlsSocket, message: Challenge | Proof | Refusal, deadline: float) -> None:
    line.settimeout(max(0.001, deadline - _clock.now()))
    line.sendall(message.encode())


def _refuse(line: TlsSocket, error: OSError | GpuRemoteError) -> None:
    """Say why not, where that can still be said."""
    deadline = _clock.now() + GOODBYE
    with contextlib.suppress(OSError):
        if isinstance(error, GpuRemoteError):
            _say(line, Refusal.of(error), deadline)
        line.linger(deadline)
