"""Copies between two servers: the bytes go from worker to worker, not through the client.

The client gives both sides the same ticket. The sending worker connects to the other server as
a client would, names the session that expects the bytes, and shows the ticket.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from gpuremote import _clock
from gpuremote.errors import GpuRemoteError, InvalidHandle, PeerCopyFailed
from gpuremote.ops.meta import Meta
from gpuremote.rpc.dial import dial
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Slot, Storage
from gpuremote.transport.base import Connection, Region
from gpuremote.transport.certificates import TlsClient
from gpuremote.transport.tls import TlsSocket, stream_connection
from gpuremote.wire.frames import NUMBER
from gpuremote.wire.hello import Hello, Refusal, Welcome

__all__ = ["PeerCopies"]

CONNECT_TIMEOUT: Final = 10.0
PATIENCE: Final = 60.0
"""Seconds without a byte of progress after which a copy is given up."""
MAX_COPIES: Final = 16
"""Copies from here that are under way at a time; more wait for one of these. Copies to here do
not count, or two servers with many for each other would wait for each other."""
TICKET_PATIENCE: Final = 8.0
"""Seconds that a server with an unknown ticket waits for the client to tell of it."""
MAX_WAITING: Final = 64
"""Servers that wait so at a time."""


class PeerCopies:
    """The copies of one session; each has a thread, as long as it lasts.

    Attributes
    ----------
    active : int
        Copies under way.
    """

    def __init__(
        self,
        session: WorkerSession,
        wake: Callable[[], None],
        token: bytes = b"",
        trust: TlsClient | None = None,
    ) -> None:
        self.active = 0
        self._trust = trust or TlsClient()
        self._token = token
        self._waiting = 0
        self._session = session
        self._wake = wake
        self._places = threading.BoundedSemaphore(MAX_COPIES)

    def send(self, number: int, slot: Slot, meta: Meta, target: dict[str, Any]) -> None:
        """Bring ``slot`` to the session that ``target`` names. Returns at once."""
        storage = slot.storage
        assert storage is not None
        with self._session.lock:
            storage.outgoing += 1
            self.active += 1
        # Not the slot: a later op that fails on it takes its value away.
        _start(self._send, number, slot.value, storage, target)

    def receive(self, sock: socket.socket | TlsSocket, hello: Hello) -> None:
        """Take what another server's worker brings over ``sock``. Returns at once."""
        with self._session.lock:
            patience = TICKET_PATIENCE if self._waiting < MAX_WAITING else 0.0
            self._waiting += 1
        _start(self._claim, sock, hello.ticket, patience)

    def _claim(self, sock: socket.socket | TlsSocket, ticket: bytes, patience: float) -> None:
        session = self._session
        with session.lock:
            claimed = session.claim(ticket, patience)
            self._waiting -= 1
            if claimed is not None:
                self.active += 1
        if claimed is not None:
            self._receive(sock, *claimed)
            self._ended()
            return
        error = InvalidHandle("no copy with this ticket is expected here (any more)")
        with contextlib.suppress(OSError):
            _say(sock, Refusal.of(error).encode())
        sock.close()

    def _ended(self) -> None:
        with self._session.lock:
            self.active -= 1
        self._wake()

    def _send(self, number: int, value: Any, storage: Storage, target: dict[str, Any]) -> None:
        try:
            with self._places:
                self._bring(number, value, target)
        finally:
            with self._session.lock:
                storage.outgoing -= 1
            self._session.ordering.stir()
            self._ended()

    def _bring(self, number: int, value: Any, target: dict[str, Any]) -> None:
        session = self._session
        peer = f"{target['host']}:{target['port']}"
        try:
            view, _ = session.backend.send_view(value)
            hello = Hello(session=target["session"], ticket=target["ticket"])
            connection, *_ = dial(
                target["host"],
                target["port"],
                hello,
                timeout=CONNECT_TIMEOUT,
                blocking=True,
                token=self._token,
                tls=self._trust if target.get("tls") else None,
            )
            try:
                connection.send(NUMBER.pack(view.nbytes), [Region(view)])
                _flush(connection)
                # The other side has applied it only when it says so.
                _await_message(connection)
            finally:
                connection.abort()
        except Exception as error:
            text = (
                f"the server could not bring the array to {peer}: {error}; both servers must "
                "reach each other (see --advertise), or go through the client with get and put"
            )
            session.failed(number, "copy_to", PeerCopyFailed(text))

    def _receive(self, sock: socket.socket | TlsSocket, number: int, view: memoryview) -> None:
        try:
            _say(sock, Welcome().encode())
            connection = stream_connection(sock, blocking=True)
            try:
                _take(connection, view)
                # Applied before it is confirmed: the sender's session may end with that.
                self._session.peer_copy_done(number, None)
                number = 0
                connection.send(b"ok")
                connection.close(5.0)
            finally:
                connection.abort()
        except (GpuRemoteError, OSError) as error:
            sock.close()
            if number:
                failure = PeerCopyFailed(f"the copy from the other server broke off: {error}")
                print(f"gpuremote worker: {failure}", file=sys.stderr, flush=True)
                self._session.peer_copy_done(number, failure)


def _start(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, name="gpuremote-copy", daemon=True).start()


def _say(sock: socket.socket | TlsSocket, data: bytes) -> None:
    sock.settimeout(5.0)
    sock.sendall(data)


def _flush(connection: Connection) -> None:
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLOUT)
    last = _clock.now()
    sent = connection.stats.bytes_sent
    while not connection.flush():
        poller.poll(1000)
        if connection.stats.bytes_sent != sent:
            sent, last = connection.stats.bytes_sent, _clock.now()
        elif _clock.now() - last > PATIENCE:
            raise PeerCopyFailed(f"the other server took nothing for {PATIENCE:.0f} s")


def _await_message(connection: Connection) -> None:
    deadline = _clock.now() + PATIENCE
    while connection.receive(1.0) is None:
        if _clock.now() > deadline:
            raise PeerCopyFailed(f"the other server confirmed nothing for {PATIENCE:.0f} s")


def _take(connection: Connection, view: memoryview) -> None:
    """Receive one message whose payload fills ``view``."""
    done: list[bool] = []
    progress = -1
    last = _clock.now()
    arriving = None
    while not done:
        incoming = connection.receive(1.0)
        if incoming is not None and arriving is None:
            if incoming.sizes != (view.nbytes,):
                raise PeerCopyFailed(
                    f"{sum(incoming.sizes)} bytes came and {view.nbytes} were expected"
                )
            arriving = incoming
            incoming.into([view], lambda _: done.append(True))
        received = arriving.received if arriving is not None else 0
        if received != progress:
            progress, last = received, _clock.now()
        elif _clock.now() - last > PATIENCE:
            raise PeerCopyFailed(f"nothing came for {PATIENCE:.0f} s")
