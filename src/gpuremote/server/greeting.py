"""Somebody who has connected to the daemon: who they are, in the clear or over TLS.

Everything here belongs to a task with a deadline, and looks at nothing but the bytes of a
handshake until the caller has proved to know the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar

from gpuremote.errors import AuthenticationFailed, GpuRemoteError, ProtocolError
from gpuremote.transport.certificates import TlsServer
from gpuremote.transport.tls import is_tls
from gpuremote.wire.hello import (
    Attach,
    Challenge,
    Hello,
    HelloReader,
    Message,
    Opened,
    Proof,
    Refusal,
    Starting,
)
from gpuremote.wire.identity import NONCE_SIZE, client_proof, matches, server_proof

__all__ = ["Caller"]

T = TypeVar("T")

TAKE: Final = 16 << 10
GOODBYE: Final = 1.0
"""Seconds for telling somebody why not."""
LINGER: Final = 64 << 10
"""Bytes that are dropped meanwhile; closing a socket with unread input would take back what was
said there."""


class Caller:
    """One connection to the daemon.

    Parameters
    ----------
    sock : socket.socket
        Non-blocking; stays the owner's.
    peer : str
        Its address, for error texts.

    Attributes
    ----------
    encrypted : bool
    waits : bool
        It was told that a process has to be started.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.encrypted = False
        self.waits = False
        self.sock = sock
        self._peer = peer
        self._reader = HelloReader(peer)
        self._certificate = b""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._whole = False  # the reader has a whole message
        self._failed = False  # what is said would not be understood

    def certificate(self) -> tuple[dict[str, Any] | None, bytes]:
        """The caller's own, if it has shown one that this server trusts, and the same in DER."""
        if self._tls is None:
            return None, b""
        return self._tls.getpeercert(), self._tls.getpeercert(binary_form=True) or b""

    async def first(self) -> bool:
        """Take the first bytes; whether TLS begins."""
        loop = asyncio.get_running_loop()
        data = await loop.sock_recv(self.sock, self._reader.missing)
        if is_tls(data):
            self._incoming.write(data)
            return True
        self._whole = self._reader.fill(data)
        return False

    async def encrypt(self, tls: TlsServer) -> None:
        """The TLS handshake; what follows is a new message.

        Raises
        ------
        AuthenticationFailed
            The two do not trust each other, or this is no TLS 1.3. The other side was told.
        """
        context = tls.context
        made = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        try:
            await self._through(made.do_handshake)
        except ssl.SSLError as error:
            self._failed = True
            await self._send_made()
            raise AuthenticationFailed(
                f"the TLS handshake failed: {error.reason or error}"
            ) from None
        await self._send_made()
        self._tls = made
        self.encrypted = True
        self._certificate = tls.certificate
        self._reader, self._whole = HelloReader(self._peer), False

    async def message(self) -> Message:
        """The message that has begun, or the next one."""
        return (await self._read()).message()

    async def hello(self, token: bytes) -> Hello | Attach:
        """The client's HELLO, or the ATTACH of a lane; looked at only when the client has proved
        that it knows the token.

        Raises
        ------
        AuthenticationFailed
        """
        reader = await self._read()
        if token:
            await self._authenticate(token, reader.raw)
        found = reader.message()
        if isinstance(found, Hello | Attach):
            return found
        raise ProtocolError("a server's handshake message came from a client", peer=self._peer)

    async def say(self, message: Challenge | Proof | Opened | Refusal | Starting) -> None:
        data = message.encode()
        if self._tls is not None:
            self._tls.write(data)
            await self._send_made()
        else:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def refuse(self, error: GpuRemoteError) -> None:
        """Say why not. The peer may be anything, so this waits for nothing it does."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(GOODBYE):
                if not self._failed:
                    await self.say(Refusal.of(error))
                self.sock.shutdown(socket.SHUT_WR)
                await self._linger()

    async def _authenticate(self, token: bytes, hello: bytes) -> None:
        """Challenge the client, and then prove the same to it."""
        nonce = secrets.token_bytes(NONCE_SIZE)
        await self.say(Challenge(nonce))
        try:
            answer = await self.message()
        except GpuRemoteError as error:
            raise AuthenticationFailed(f"no proof of the token came: {error.message}") from None
        expected = client_proof(token, nonce, hello, self._certificate)
        if not isinstance(answer, Proof) or not matches(answer.proof, expected):
            raise AuthenticationFailed("the token is not the one that this server knows")
        await self.say(Proof(server_proof(token, nonce, hello, self._certificate)))

    async def _read(self) -> HelloReader:
        """One complete handshake message."""
        reader, whole = self._reader, self._whole
        while not whole:
            whole = reader.fill(await self._recv(reader.missing))
        self._reader, self._whole = HelloReader(self._peer), False
        return reader

    async def _recv(self, size: int) -> bytes:
        tls = self._tls
        if tls is None:
            return await asyncio.get_running_loop().sock_recv(self.sock, size)
        return await self._through(lambda: tls.read(size))

    async def _through(self, step: Callable[[], T]) -> T:
        """Repeat a step of TLS as more comes."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                pass
            await self._send_made()
            data = await loop.sock_recv(self.sock, TAKE)
            if not data:
                raise ConnectionResetError("it was closed in the middle of the TLS handshake")
            self._incoming.write(data)

    async def _send_made(self) -> None:
        if made := self._outgoing.read():
            await asyncio.get_running_loop().sock_sendall(self.sock, made)

    async def _linger(self) -> None:
        loop = asyncio.get_running_loop()
        left = LINGER
        while left > 0 and (data := await loop.sock_recv(self.sock, TAKE)):
            left -= len(data)
