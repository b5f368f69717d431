"""TLS 1.3 over a stream socket: messages framed as on plain TCP, and encrypted.

``ssl.SSLObject`` does no I/O: it encrypts and decrypts between the program's memory and two
buffers. What it makes is sent, and what comes is given to it, by the same steps in either driver.
Payload is encrypted right from the sender's memory and decrypted right into the receiver's;
OpenSSL's own copies can't be avoided.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any, Final, cast

from gpuremote import _clock
from gpuremote._types import BytesLike
from gpuremote.errors import ConnectionLost
from gpuremote.transport._sockets import flush_until, tune
from gpuremote.transport._stream import NOW, PythonStream
from gpuremote.transport.certificates import TlsClient, TlsServer, names
from gpuremote.transport.tcp import StreamConnection, TcpConnection

__all__ = ["TlsConnection", "TlsSocket", "is_tls", "stream_connection"]

RECORD: Final = 16 << 10
"""Bytes of a TLS record, at most."""
AHEAD: Final = 256 << 10
"""Bytes encrypted before it is known whether the kernel takes them."""
TAKE: Final = 256 << 10
"""Encrypted bytes of one receive call."""
LINGER: Final = 64 << 10
"""Bytes that are dropped at most before a socket is closed."""
KEY_BYTES: Final = 256 << 30
"""Bytes sent with one key; AES-GCM is good for 2**24.5 records. Renewing a key is nothing that
``ssl`` offers, but a session resumes over a new connection."""


def is_tls(first: bytes) -> bool:
    """Whether these are the first bytes of a TLS client."""
    return first[:1] == b"\x16"


class TlsSocket:
    """A connected socket, encrypted.

    First the handshake and the plain messages that follow it, blocking with the timeout of the
    socket (``settimeout``, ``sendall``, ``recv``); then, as the line of a :class:`TlsConnection`,
    steps that take the flags of a socket. One thread may send while another receives.

    Parameters
    ----------
    raw : socket.socket
        Owned from now on.
    trust : TlsClient or TlsServer
        Which side this is, and whom it trusts.
    host : str
        What the server's certificate has to be for; of a client.

    Attributes
    ----------
    raw : socket.socket
    first : bytes
        The first bytes that came.
    readable : bool
        Whether decrypting gives more without another receive.
    """

    def __init__(self, raw: socket.socket, trust: TlsClient | TlsServer, host: str = "") -> None:
        self.raw = raw
        self.first = b""
        self.readable = False
        self._trust = trust
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject
        if isinstance(trust, TlsServer):
            self._tls = trust.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        else:
            # A zone (fe80::1%eth0) says where this host finds the other, not who that is.
            self._tls = trust.context().wrap_bio(
                self._incoming, self._outgoing, server_hostname=host.partition("%")[0]
            )
        # Given a buffer it returns a number, whatever the stub says.
        self._read = cast(Callable[[int, memoryview], int], self._tls.read)
        self._lock = Lock()  # around every call of OpenSSL
        self._sealed = memoryview(b"")  # encrypted, not taken by the kernel; the sender's
        self._taken = memoryview(bytearray(TAKE))
        self._drained = True  # the latest receive emptied the kernel's buffer
        self._key_bytes = 0

    # -- blocking --------------------------------------------------------------------------------

    def handshake(self, deadline: float) -> None:
        """Find out who is there, until ``deadline`` on ``_clock.now()``.

        Raises
        ------
        ssl.SSLError
            The other side is not trusted, or does not trust this one, or speaks no TLS 1.3.
        OSError
            The connection broke or ended; TimeoutError at the deadline.
        """
        done = False
        while not done:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                with contextlib.suppress(OSError):  # the other side hears why
                    self._send_made(deadline)
                raise
            self._send_made(deadline)
            if not done and not self._take_until(deadline):
                raise ConnectionResetError("it was closed in the middle of the TLS handshake")
        self.readable = self._incoming.pending > 0

    @property
    def certificate(self) -> bytes:
        """The server's, in DER, as this side sees it."""
        if isinstance(self._trust, TlsServer):
            return self._trust.certificate
        return self._tls.getpeercert(binary_form=True) or b""

    def settimeout(self, seconds: float) -> None:
        """For ``sendall`` and ``recv``."""
        self.raw.settimeout(seconds)

    def sendall(self, data: bytes) -> None:
        """Encrypt and send, blocking. Raises OSError."""
        with self._lock:
            self._tls.write(data)
        self._send_made(_clock.now() + (self.raw.gettimeout() or 0.0))

    def recv(self, size: int) -> bytes:
        """Up to ``size`` bytes, blocking; none at the end. Raises OSError."""
        deadline = _clock.now() + (self.raw.gettimeout() or 0.0)
        buffer = memoryview(bytearray(size))
        while (count := self._decrypt(buffer)) is None:
            if not self._take_until(deadline):
                return b""
        return bytes(buffer[:count])

    def linger(self, deadline: float) -> None:
        """Send no more, and drop what comes for a while: closing with unread input would take
        back what was said last. Raises OSError."""
        self.raw.shutdown(socket.SHUT_WR)
        left = LINGER
        while left > 0 and (count := self._take_until(deadline)):
            left -= count

    def close(self) -> None:
        """Give it back, without a goodbye."""
        self.raw.close()

    def _send_made(self, deadline: float) -> None:
        self.raw.settimeout(max(0.001, deadline - _clock.now()))
        self.raw.sendall(self._outgoing.read())

    def _take_until(self, deadline: float) -> int:
        self.raw.settimeout(max(0.001, deadline - _clock.now()))
        count = self._take(0)
        if _clock.now() > deadline:  # somebody who sends a byte now and then
            raise TimeoutError("the TLS handshake took too long")
        return count

    # -- steps -----------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether something encrypted has not been taken by the kernel yet."""
        return bool(self._sealed) or self._outgoing.pending > 0

    def send(self, data: BytesLike, flags: int, /) -> int:
        return self.sendmsg((data,), (), flags)

    def sendmsg(self, buffers: Sequence[BytesLike], ancillary: tuple[()], flags: int, /) -> int:
        """Encrypt and send; gives the bytes that were encrypted, as they will not be looked at
        again. At most ``AHEAD`` of them wait in here."""
        if self._sealed and not self.flush(flags):
            raise BlockingIOError
        if self._key_bytes > KEY_BYTES:
            raise ConnectionLost("the keys of this TLS connection are used up; new ones are needed")
        sealed = 0
        for piece in _pieces(buffers):
            with self._lock:
                done = 0
                while done < len(piece):
                    done += self._tls.write(piece[done:] if done else piece)
                self._sealed = memoryview(self._outgoing.read())
            sealed += done
            self._key_bytes += done
            if not self._hand_over(flags):
                break
        return sealed

    def flush(self, flags: int = NOW) -> bool:
        """Hand over what is encrypted; whether nothing is left."""
        if self._sealed and not self._hand_over(flags):
            return False
        with self._lock:
            self._sealed = memoryview(self._outgoing.read())
        return not self._sealed or self._hand_over(flags)

    def _hand_over(self, flags: int) -> bool:
        try:
            sent = self.raw.send(self._sealed, flags)
        except BlockingIOError:
            return False
        self._sealed = self._sealed[sent:]
        return not self._sealed

    def recv_into(self, buffer: memoryview, size: int, flags: int, /) -> int:
        return self._fill([buffer[:size] if size else buffer], flags)

    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary: int, flags: int, /
    ) -> tuple[int, Any, int, Any]:
        return self._fill(buffers, flags), (), 0, None

    def _fill(self, buffers: Sequence[memoryview], flags: int) -> int:
        """Decrypt into the buffers what is there. Blocks, where the flags allow it, once."""
        filled = 0
        for buffer in buffers:
            start = 0
            while start < len(buffer):
                count = self._decrypt(buffer[start:])
                if count is None:
                    if filled and self._drained:
                        return filled
                    try:
                        taken = self._take(flags)
                    except BlockingIOError:
                        if filled:
                            return filled
                        raise
                    flags = NOW
                    if not taken:
                        return filled
                elif count:
                    start += count
                    filled += count
                else:
                    return filled
        return filled

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Bytes that were there, 0 at the end of them all; None: a record is not complete."""
        with self._lock:
            try:
                count = self._read(len(buffer), buffer)
            except ssl.SSLWantReadError:
                self.readable = False
                return None
            self.readable = self._incoming.pending > 0 or self._tls.pending() > 0
        return count

    def _take(self, flags: int) -> int:
        """One receive call."""
        count = self.raw.recv_into(self._taken, 0, flags)
        self._drained = count < TAKE
        if count:
            with self._lock:
                if not self.first:
                    self.first = bytes(self._taken[: min(count, 16)])
                self._incoming.write(self._taken[:count])
                self.readable = True
        return count

    def say_goodbye(self) -> None:
        """Tell the other side that nothing more comes, if the kernel takes that now."""
        with self._lock, contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        self.flush()

    # -- for people ------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """Version, cipher, and how the other side was verified."""
        cipher = self._tls.cipher()
        trust = self._trust
        if isinstance(trust, TlsServer):
            peer = "clients need no certificate"
            if trust.client_ca:
                peer = f"client {names(self._tls.getpeercert())}, verified by {trust.client_ca}"
        else:
            peer = f"server {self._tls.server_hostname}, verified by {trust.trusted}"
        return {
            "version": self._tls.version() or "",
            "cipher": cipher[0] if cipher else "",
            "peer": peer,
        }


def _pieces(buffers: Sequence[BytesLike]) -> Iterator[BytesLike]:
    """The bytes of the buffers in order. Small ones are joined, as each piece costs a record of
    its own at least; large ones are cut."""
    small: list[BytesLike] = []
    size = 0
    for buffer in buffers:
        start, length = 0, len(buffer)
        if size + length < RECORD:
            small.append(buffer)
            size += length
            continue
        view = memoryview(buffer)
        if small:
            start = RECORD - size
            yield b"".join([*small, view[:start]])
            small, size = [], 0
        while length - start >= RECORD:
            end = min(length, start + AHEAD)
            yield view[start:end]
            start = end
        if start < length:
            small, size = [view[start:]], length - start
    if size:
        yield small[0] if len(small) == 1 else b"".join(small)


class TlsConnection(PythonStream, StreamConnection):
    """A connection over a TLS socket whose handshake is done.

    Parameters
    ----------
    line : TlsSocket
        Owned from now on.
    blocking, reason
        As for ``TcpConnection``.

    Notes
    -----
    ``stats`` counts bytes before encryption. An end of the stream that the peer has not announced
    looks like one that it has: messages are complete or they are not, and a session says goodbye
    in messages of its own.
    """

    def __init__(self, line: TlsSocket, *, blocking: bool, reason: str = "") -> None:
        facts = line.describe()
        text = f"{facts['version']}, {facts['cipher']}, {facts['peer']}"
        reason = f"{text}; {reason}" if reason else text
        super().__init__(line.raw, blocking=blocking, reason=reason, line=line)
        self._tls = line

    @property
    def pending_output(self) -> bool:
        return self._pending or self._tls.pending

    @property
    def buffered(self) -> bool:
        return self._start != self._end or self._tls.readable

    @property
    def restless(self) -> bool:
        return self.pending_output or self.buffered

    def due(self) -> float | None:
        return 0.0 if self._tls.readable else None

    def flush(self) -> bool:
        if not super().flush():
            return False
        self._tx_busy = True
        try:
            if self._closed:
                raise self._gone()
            return self._tls.flush()
        except BaseException as error:
            raise self._broken(error) from None
        finally:
            self._tx_busy = False
            if self._closed:
                self._release()

    def _ready(self, wait: float) -> bool:
        return self._tls.readable or super()._ready(wait)

    def close(self, timeout: float = 1.0) -> None:
        deadline = _clock.now() + timeout
        if not self._closed and flush_until(self.flush, self._sock, deadline):
            with contextlib.suppress(OSError):
                self._tls.say_goodbye()
        super().close(max(0.0, deadline - _clock.now()))

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "tls": self._tls.describe()}


def stream_connection(sock: socket.socket | TlsSocket, *, blocking: bool) -> StreamConnection:
    """A connection over a socket on which both sides have shaken hands, set up for the way
    between them; the socket is its."""
    if isinstance(sock, TlsSocket):
        return TlsConnection(sock, blocking=blocking, reason=tune(sock.raw))
    return TcpConnection(sock, blocking=blocking, reason=tune(sock))
