"""The daemon: takes connections, reads who they are, hands each to a worker, watches workers.

No tensor byte passes here: after the handshake the socket itself goes to the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import logging
import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gpuremote import _clock
from gpuremote.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    ConnectionLost,
    GpuRemoteError,
    HandshakeTimeout,
    ServerBusy,
    ServerDraining,
    SessionLost,
    WorkerDied,
)
from gpuremote.rpc.dial import host_identity
from gpuremote.server.contents import ContentStore, tenant_of
from gpuremote.server.greeting import Caller
from gpuremote.server.options import ServerOptions
from gpuremote.server.processes import WorkerProcess
from gpuremote.server.stock import ATTEMPTS, Stock
from gpuremote.transport import congestion
from gpuremote.transport.certificates import TlsServer
from gpuremote.transport.select import choose, probe
from gpuremote.wire.hello import Attach, Hello, Opened, Route, Starting, choose_version

__all__ = ["DeviceServer"]

log = logging.getLogger("gpuremote.server")

HANDSHAKE_TIMEOUT: Final = 10.0
MAX_HANDSHAKES: Final = 128
"""Connections that may be silent at a time."""
PATIENCE: Final = 1.0
"""Seconds of silence after which a connection is given up if another one needs its place."""
MAX_TOMBSTONES: Final = 1024
START_TIMEOUT: Final = 90.0
"""Seconds that a worker process gets to load its backend, where the client knows of that."""
UNCLAIMED: Final = 15.0
"""Seconds that a session opened over TLS waits for its client to come once more."""


@dataclass(slots=True)
class _Session:
    ident: bytes
    secret: bytes
    worker: WorkerProcess


class DeviceServer:
    """A device server.

    Use as an async context manager, or call :meth:`start` and :meth:`stop`.

    Parameters
    ----------
    options : ServerOptions

    Attributes
    ----------
    port : int
        The port it listens on.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.port = 0
        self._host = host_identity()
        self._sessions: dict[bytes, _Session] = {}
        self._by_worker: dict[int, _Session] = {}
        self._tombstones: OrderedDict[bytes, tuple[bytes, str]] = OrderedDict()
        self._store: ContentStore | None = None
        self._stock = Stock(options, self._worker_ended)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent: dict[asyncio.Task[None], float] = {}
        self._tls: TlsServer | None = None
        self._draining = False
        self._opening = 0
        self._stopping = False
        self._empty = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> DeviceServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """``HOST:PORT`` it listens on."""
        host = self.options.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def sessions(self) -> int:
        """Sessions that have a worker."""
        return len(self._sessions)

    async def start(self) -> None:
        """Listen, and start the first workers.

        Raises
        ------
        ConnectionFailed
            The address can't be listened on.
        ConfigError
            The certificate or its key can't be used.
        """
        options = self.options
        if options.certfile:
            load = functools.partial(
                TlsServer, options.certfile, options.keyfile, options.client_ca
            )
            self._tls = await asyncio.to_thread(load)
        # Looks at files and other packages: not in the loop, and before anybody waits for it.
        await asyncio.to_thread(probe)
        if kept := await asyncio.to_thread(lambda: options.kept_contents):
            self._store = self._stock.store = ContentStore(kept)
        self._listener = _listen(options.host, options.port)
        self.port = self._listener.getsockname()[1]
        self._stock.fill()
        self._accepting = asyncio.create_task(self._accept(self._listener))
        log.info("listening on %s, backend %s", self.address, options.backend)

    async def drain(self, timeout: float | None = None) -> None:
        """Take no new session; return when the present ones have ended, or after ``timeout``.

        Sessions can still resume meanwhile.
        """
        self._draining = True
        seconds = self.options.drain if timeout is None else timeout
        log.info("draining: %d sessions have %.0f s to end", len(self._sessions), seconds)
        for session in list(self._sessions.values()):
            with contextlib.suppress(OSError):
                session.worker.tell({"event": "drain", "seconds": seconds})
        if self._sessions:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), seconds)

    async def stop(self) -> None:
        """End everything now: sessions that still live are lost to their clients."""
        self._draining = self._stopping = True
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._stock.close()
        if self._store is not None:
            await self._store.close()

    def describe(self) -> dict[str, Any]:
        """What ``top`` and tests look at."""
        return {
            "address": self.address,
            "backend": self.options.backend,
            "draining": self._draining,
            "contents": {} if self._store is None else self._store.describe(),
            "sessions": [
                {"worker": s.worker.pid, "alive": s.worker.alive} for s in self._sessions.values()
            ],
        }

    # -- connections ----------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._make_room()
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, or the connection was gone before it was taken.
                log.warning("accept: %s", error)
                await asyncio.sleep(0.05)
                continue
            task = asyncio.create_task(self._greet(sock, f"{address[0]}:{address[1]}"))
            self._tasks.add(task)
            self._silent[task] = loop.time()
            task.add_done_callback(self._greeted)

    async def _make_room(self) -> None:
        """Wait until one more connection may be taken; others wait in the kernel's queue."""
        loop = asyncio.get_running_loop()
        while len(self._silent) >= MAX_HANDSHAKES:
            oldest, since = next(iter(self._silent.items()))
            left = since + PATIENCE - loop.time()
            if left <= 0:
                del self._silent[oldest]
                oldest.cancel()
            else:
                await asyncio.sleep(min(left, 0.01))

    def _greeted(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._silent.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("a handshake failed", exc_info=task.exception())

    async def _greet(self, sock: socket.socket, peer: str) -> None:
        """Read the handshake and bring the socket to its worker."""
        sock.setblocking(False)
        caller = Caller(sock, peer)
        try:
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                    if self._tls is not None and await self._encrypt(caller, self._tls):
                        return
                    hello = await caller.hello(self.options.token)
                self._silent.pop(_current_task(), None)
                if isinstance(hello, Attach):
                    self._attach(caller, hello)
                    return
                choose_version(*hello.versions)
                await self._route(caller, hello)
            except TimeoutError:
                error = HandshakeTimeout(f"no complete handshake in {HANDSHAKE_TIMEOUT:.0f} s")
                await caller.refuse(error)
            except GpuRemoteError as error:
                level = logging.WARNING if isinstance(error, AuthenticationFailed) else logging.INFO
                log.log(level, "refused %s: %s", peer, error.message)
                await caller.refuse(error)
        except OSError as error:
            log.info("%s went away during the handshake: %s", peer, error)
        finally:
            sock.close()

    async def _encrypt(self, caller: Caller, tls: TlsServer) -> bool:
        """Begin TLS. True if that is another process's business: the connection was for a session,
        and is at its worker now."""
        if not await caller.first():
            route = await caller.message()
            if not isinstance(route, Route):
                raise AuthenticationFailed(
                    "this server speaks TLS only: name the file with its CA (or with its "
                    "certificate, if it is self-signed) with cafile= in the URL or GPUREMOTE_CAFILE"
                )
            if self._passed_on(caller.sock, route.session):
                return True
        await caller.encrypt(tls)
        return False

    def _passed_on(self, sock: socket.socket, ident: bytes) -> bool:
        session = self._sessions.get(ident)
        if session is None or not session.worker.alive:
            return False
        # Who is there is for the worker to find out, so nobody here waits for that.
        request = self._request(session, sock)
        try:
            session.worker.tell({"event": "encrypted", **request}, sock)
        except OSError as error:
            log.info("a connection did not get to worker %d: %s", session.worker.pid, error)
        return True

    def _attach(self, caller: Caller, lane: Attach) -> None:
        """Bring a lane to its session's worker, which alone can tell whether it may come in."""
        session = self._sessions.get(lane.session)
        if session is None or caller.encrypted or not session.worker.alive:
            raise SessionLost("a lane of a session that is not there")
        request = {"event": "lane", "lane": lane.lane, "proof": lane.proof}
        session.worker.tell(request, caller.sock)

    async def _route(self, caller: Caller, hello: Hello) -> None:
        heard = _clock.now() - congestion.since_received(caller.sock)
        if hello.session:
            session = self._known(hello)
            if caller.encrypted:
                raise ConnectionLost("the session is there after all; connect once more")
        else:
            if self._draining:
                raise ServerDraining("the server is shutting down and takes no new session")
            if len(self._sessions) + self._opening >= self.options.max_sessions:
                raise ServerBusy(
                    f"all {self.options.max_sessions} sessions of this server are taken; "
                    "try again later or raise --max-sessions"
                )
            session = None
        if caller.encrypted:
            opened = await self._open(caller, hello)
            loop = asyncio.get_running_loop()
            loop.call_later(UNCLAIMED, self._give_up_unclaimed, opened)
            await caller.say(Opened(opened.ident, opened.secret))
            return
        for left in reversed(range(ATTEMPTS)):
            opened = session or await self._open(caller, hello)
            try:
                await self._hand_over(opened, caller.sock, hello, heard)
                return
            except WorkerDied:
                if session is not None or not left:
                    raise
                # It had not begun with this one, so another can.

    def _give_up_unclaimed(self, session: _Session) -> None:
        """The client did not come for its session."""
        if not session.worker.claimed and self._sessions.get(session.ident) is session:
            with contextlib.suppress(OSError):
                session.worker.tell({"event": "end"})

    def _request(self, session: _Session, sock: socket.socket) -> dict[str, Any]:
        host, port = sock.getsockname()[:2]
        return {
            "server": self.address,
            "session": session.ident,
            "secret": session.secret,
            "advertise": self.options.advertise or _join(host, port),
        }

    async def _hand_over(
        self, session: _Session, sock: socket.socket, hello: Hello, heard: float
    ) -> None:
        request = {
            "heard": heard,
            "event": "connection",
            "hello": hello.encode(),
            "choice": choose(
                hello.transports, same_host=hello.host == self._host, lanes=bool(hello.lanes)
            ),
            **self._request(session, sock),
        }
        await session.worker.hand_over(request, sock, HANDSHAKE_TIMEOUT)

    async def _open(self, caller: Caller, hello: Hello) -> _Session:
        ident = secrets.token_bytes(16)
        self._opening += 1
        seconds = START_TIMEOUT if hello.patient else HANDSHAKE_TIMEOUT
        taking = asyncio.ensure_future(self._stock.take(seconds))
        try:
            await asyncio.wait({taking}, timeout=PATIENCE)
            if hello.patient and not taking.done() and not caller.waits:
                caller.waits = True  # the next process, if this one ends, is no news
                await caller.say(Starting(seconds))
            worker = await taking
        finally:
            taking.cancel()
            self._opening -= 1
        if worker.desk is not None:
            worker.desk.tenant = tenant_of(self.options.token, *caller.certificate())
        session = _Session(ident, secrets.token_bytes(32), worker)
        self._sessions[ident] = session
        self._by_worker[worker.pid] = session
        return session

    def _known(self, hello: Hello) -> _Session:
        """The session that a resuming client or a peer server names.

        Raises
        ------
        WorkerDied, SessionLost
        """
        session = self._sessions.get(hello.session)
        secret = session.secret if session is not None else b""
        if session is None:
            secret, end = self._tombstones.get(hello.session, (b"", ""))
            if end and hmac.compare_digest(secret, hello.secret):
                raise WorkerDied(end)
        elif hello.ticket or hmac.compare_digest(secret, hello.secret):
            # A ticket is proved to the worker, which alone knows it.
            return session
        raise SessionLost(
            "the server does not know this session (any more): its grace period passed, or the "
            "server was restarted"
        )

    def _worker_ended(self, worker: WorkerProcess) -> None:
        session = self._by_worker.pop(worker.pid, None)
        if session is None:
            return
        del self._sessions[session.ident]
        if worker.failed and not self._stopping:
            log.warning("worker %d %s", worker.pid, worker.describe_end())
            self._tombstones[session.ident] = (session.secret, worker.died().message)
            while len(self._tombstones) > MAX_TOMBSTONES:
                self._tombstones.popitem(last=False)
        if not self._sessions:
            self._empty.set()


def _current_task() -> asyncio.Task[None]:
    task: asyncio.Task[None] | None = asyncio.current_task()
    assert task is not None
    return task


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionFailed(f"can't listen on {_join(host, port)}: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        congestion.prepare(sock)
        sock.bind(address)
        sock.listen(256)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConnectionFailed(f"can't listen on {_join(host, port)}: {error}") from error
    return sock


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """The factory of the fastest loop there is: uvloop's, or asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
