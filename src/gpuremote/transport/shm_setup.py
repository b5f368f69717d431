"""How two processes find out that they share a host, and get to its memory.

The server waits at a Unix socket with a random name, which it tells the client over their first
connection. Over it the client gets a memory file, and says over the first connection which number
it found there: only somebody on the same kernel, who was let in, can know that. Addresses prove
nothing: two containers may have the same one.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
from collections.abc import Iterator
from typing import Final

from gpuremote.errors import ProtocolError, TransportUnavailable
from gpuremote.memory import shared
from gpuremote.transport.base import Connection
from gpuremote.transport.setup import Path, Setup
from gpuremote.transport.shm import ShmConnection

__all__ = ["Shm"]

PATIENCE: Final = 2.0
"""Seconds for the other end to come to the Unix socket."""
PREFIX: Final = b"\0gpuremote-"
"""Of an abstract name: nothing is left of it, and no file is reached with it."""
TICKET: Final = 32
BUFFER: Final = 4 << 20
"""Bytes that the kernel is asked to hold for the socket, where the system allows so many: what is
too large for shared memory goes through it, and a Unix socket's buffer does not grow by itself."""
ATTEMPTS: Final = 8
"""Strangers that may come there before."""


class _ShmPath:
    """A Unix socket and a second one, between two processes that have proved to share a host."""

    def __init__(self, setup: Setup, sock: socket.socket, side: socket.socket) -> None:
        self._setup = setup
        self._sock = sock
        self._side = side

    def connection(self) -> Connection:
        first = self._setup.connection
        setup = self._setup
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        found = ShmConnection(self._sock, self._side, blocking=setup.blocking, limit=setup.limit)
        found.local_address, found.peer_address = first.local_address, first.peer_address
        first.close()
        return found

    def abandon(self) -> None:
        self._sock.close()
        self._side.close()


class Shm:
    """Sets shared memory up: a Unix socket for the messages, and a number in a memory file that
    only somebody on the same kernel can have read."""

    name = "shm"

    @staticmethod
    def probe() -> tuple[bool, str]:
        return shared.probe()

    @staticmethod
    def connect(setup: Setup) -> Path:
        """The client's end; see ``transport.setup.Upgrade``."""
        name = setup.hear().get("unix")
        if not isinstance(name, bytes) or not name.startswith(PREFIX) or len(name) > 100:
            raise ProtocolError("the server names no Unix socket of its own")
        ticket = _ticket(setup, name)
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.settimeout(min(setup.left, PATIENCE))
            try:
                sock.connect(name)
            except OSError as error:
                raise TransportUnavailable(
                    f"the server's Unix socket can't be reached ({error.strerror or error}): the "
                    "two ends are not in one network namespace (containers of their own?)"
                ) from error
            sock.sendall(ticket)
            _, fds, _, _ = socket.recv_fds(sock, 1, 2)
            if len(fds) != 2:
                for fd in fds:
                    os.close(fd)
                raise TransportUnavailable("the server passed no memory over its Unix socket")
            try:
                nonce = os.pread(fds[0], TICKET, 0)
                side = undo.enter_context(socket.socket(fileno=os.dup(fds[1])))
            finally:
                os.close(fds[0])
                os.close(fds[1])
            setup.say({"nonce": nonce})
            undo.pop_all()
            return _ShmPath(setup, sock, side)

    @staticmethod
    def accept(setup: Setup) -> Path:
        """The server's end."""
        name = PREFIX + secrets.token_hex(16).encode()
        ticket = _ticket(setup, name)
        nonce = secrets.token_bytes(TICKET)
        with contextlib.ExitStack() as undo:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(name)
                listener.listen(ATTEMPTS)
                setup.say({"unix": name})
                sock = undo.enter_context(_await_client(setup, listener, ticket))
            side, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(side)
            with theirs, _memory_file(nonce) as fd:
                socket.send_fds(sock, [b"\0"], [fd, theirs.fileno()])
            heard = setup.hear().get("nonce")
            if not isinstance(heard, bytes) or not hmac.compare_digest(heard, nonce):
                raise TransportUnavailable("the client could not read this host's memory")
            undo.pop_all()
            return _ShmPath(setup, sock, side)


def _ticket(setup: Setup, name: bytes) -> bytes:
    """Shows who comes to the Unix socket: others on this host can see its name."""
    return hmac.digest(setup.secret, b"gpuremote shm " + name, "sha256")


@contextlib.contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("gpuremote", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def _await_client(setup: Setup, listener: socket.socket, ticket: bytes) -> socket.socket:
    """The first one to come with the right ticket, unless the client gives up before."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(setup.connection.fileno(), select.POLLIN)
    for _ in range(ATTEMPTS):
        found = dict(poll.poll(1000 * min(setup.left, PATIENCE)))
        if setup.connection.fileno() in found:
            setup.hear()  # raises, unless the client talks out of turn
            raise ProtocolError("the client said something before it came")
        if not found:
            break
        patience = min(setup.left, PATIENCE)
        sock, _ = listener.accept()
        try:
            sock.settimeout(patience)
            heard = sock.recv(TICKET, socket.MSG_WAITALL)
            if hmac.compare_digest(heard, ticket):
                return sock
        except OSError:
            pass
        sock.close()
    raise TransportUnavailable("the client did not come to the Unix socket")
