"""The worker process: one session, one connection, executed here and nowhere else.

The main thread receives and runs the default stream. The control thread waits for the daemon
(another connection for the session, the end of the daemon) and takes the connection over while
the main thread is inside a long op, so that pings, acknowledgements, uploads and other streams
go on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import os
import queue
import select
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Final, NoReturn

from gpuremote import _clock
from gpuremote._speed import native
from gpuremote.backend import registry
from gpuremote.backend.base import Backend
from gpuremote.errors import ConnectionLost, GpuRemoteError
from gpuremote.rpc.dial import host_identity
from gpuremote.server import control, heap
from gpuremote.server.peercopy import PeerCopies
from gpuremote.server.reception import Reception
from gpuremote.server.session import WorkerSession
from gpuremote.transport.base import LONG_BURST, Connection
from gpuremote.transport.certificates import TlsClient, TlsServer
from gpuremote.transport.lanes.offer import LaneGate
from gpuremote.transport.select import choose, climb, probe
from gpuremote.transport.setup import Setup
from gpuremote.transport.tls import TlsSocket, stream_connection
from gpuremote.wire import caps
from gpuremote.wire.frames import Kind, pack_info
from gpuremote.wire.hello import Attach, Hello, HelloReader, Welcome, choose_version
from gpuremote.wire.repeats import offered
from gpuremote.wire.state import SessionState, State, Stimulus

__all__ = ["work"]

WAIT: Final = 1.0
"""Seconds of one wait of the main thread."""
LOOKS: Final = 1000
PYTHON_LOOKS: Final = 100
"""Looks that take some 300 µs, before a wait; with and without the part in C. A program that goes
from one small thing to the next comes back within that, and need not wake this process: that
would cost it 30 µs in each send, and some more until its answer is begun."""
MESSAGES_PER_TURN: Final = 64
SETUP_TIMEOUT: Final = 10.0
"""Seconds for answering a client and bringing a transport up with it."""
BUSY_AFTER: Final = 0.02
"""Seconds in an op after which the control thread takes the connection over."""


class Worker:
    """One worker process.

    Parameters
    ----------
    channel : socket.socket
        To the daemon (``server.control``).
    options : argparse.Namespace
        As given on the command line of ``server.forkserver``, and ``contents``: the descriptor by
        which uploads are kept, or -1.
    alone : bool
        The process is for this alone, and may be confined to what its session may hold.
    """

    def __init__(
        self, channel: socket.socket, options: argparse.Namespace, *, alone: bool = False
    ) -> None:
        self._alone = alone
        self.channel = channel
        self.options = options
        self.backend = registry.create(options.backend, devices=options.devices)
        pairs = [allowed.partition("=") for allowed in options.allow_ops]
        spaces = {name: module or name for name, _, module in pairs}
        self.backend.permit(spaces, options.weights, options.allow_kernels)
        self.state = SessionState()
        self._wake_main = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_control = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        limit = options.memory_limit or _default_limit(self.backend)
        self.session = WorkerSession(self.backend, limit, self._wake)
        if options.contents >= 0:
            self.session.sharing.channel = socket.socket(fileno=options.contents)
        token = os.environ.pop("GPUREMOTE_TOKEN", "").encode()
        trust = TlsClient(options.cafile, options.certfile, options.keyfile)
        self.copies = PeerCopies(self.session, self._wake, token, trust)
        self._reception: Reception | None = None
        if options.certfile:
            tls = TlsServer(options.certfile, options.keyfile, options.client_ca)
            self._reception = Reception(tls, token, self._admit)
            probe()  # looks at files and other packages: before anybody waits for it
        self._admitting = threading.Lock()
        self._coming: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = LaneGate()
        self.session.send_to = self.copies.send
        self.session.copying = lambda: self.copies.active
        self.session.peer.on_lost = self._gone
        self._receiving = threading.Lock()
        self._busy_since = 0.0
        self._parked = True
        """The main thread sleeps, so the control thread need not look after it."""
        self._last_idle = 0.0
        self._rested_at, self._rest_after = -1, math.inf
        self._attached = threading.Event()
        self._welcomed = threading.Event()
        """Its client may know of this session, connected or not."""
        self._over = False
        self._left_over = False  # messages may lie here that no descriptor tells of

    # -- main thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the session is over."""
        # What is loaded by now stays: not worth a collector's look.
        gc.freeze()
        control.send(self.channel, {"event": "ready"})
        threading.Thread(target=self._control, name="gpuremote-control", daemon=True).start()
        threading.Thread(target=self._let_in, name="gpuremote-admit", daemon=True).start()
        self._welcomed.wait()
        session, peer = self.session, self.session.peer
        while not self._over:
            connection = peer.connection
            if connection is None:
                if session.goodbye or not self._await_connection():
                    break
                continue
            try:
                if self._quiet(connection):
                    self._serve_quietly(connection)
                else:
                    self._serve_watching(connection)
            except ConnectionLost as error:
                self._lost(connection, error)
            except GpuRemoteError as error:
                self._violated(error)
            if session.goodbye and self._drained():
                break
        self._finish()

    def _quiet(self, connection: Connection) -> bool:
        """Whether only the client can make anything happen."""
        session = self.session
        return not (
            connection.pending_output
            or session.default.queue
            or session.streams
            or session.peer.held
            or self.copies.active
            or session.sharing.active
            or session.goodbye
        )

    def _serve_quietly(self, connection: Connection) -> None:
        """Take messages one by one, in one blocking receive each, while it stays that quiet."""
        session, receiving = self.session, self._receiving
        looks = PYTHON_LOOKS if native is None else LOOKS
        take, arriving, queue = session.peer.take, session.peer.arriving, session.default.queue
        while not self._over:
            with receiving:
                taken = take(connection, WAIT, 0 if arriving else looks)
            if not taken:
                if arriving:
                    continue  # more of a payload is in place
                break
            if self._parked:
                self._unpark()
            if queue:
                self._run_default()
            if not self._quiet(connection):
                self._left_over = connection.buffered
                return
        # A second without any message.
        now = _clock.now()
        self._parked = now - self._last_idle > WAIT / 2
        self._last_idle = now
        self._rest(now)

    def _rest(self, now: float) -> None:
        """Nothing came: when that has been so for a while, give back what is free, once."""
        received = self.session.peer.messages_received
        if received != self._rested_at:
            self._rested_at, self._rest_after = received, now + WAIT
        elif now >= self._rest_after and self._alone and not self.session.ordering.backlog:
            self._rest_after = math.inf
            self.session.ready.drop()
            heap.give_back()

    def _serve_watching(self, connection: Connection) -> None:
        """One round of waiting for the connection or for another thread, then what can be done."""
        poller = select.poll()
        poller.register(
            connection.fileno(),
            select.POLLIN | (select.POLLOUT if connection.pending_output else 0),
        )
        poller.register(self._wake_main, select.POLLIN)
        due = 0.0 if self._left_over else connection.due()
        ready = poller.poll(1000 * (WAIT if due is None else min(due, WAIT)))
        if not ready and due is None:
            self._rest(_clock.now())
        for descriptor, _ in ready:
            if descriptor == self._wake_main:
                _drain(self._wake_main)
        if self._parked:
            self._unpark()
        with self._receiving:
            self._take_in(connection)
        self._run_default()

    def _take_in(self, connection: Connection) -> None:
        """Receive what is there, up to a bound, and send what can be; owner of ``_receiving``."""
        session = self.session
        self._left_over = True
        for _ in range(MESSAGES_PER_TURN):
            if not session.peer.take(connection):
                self._left_over = False
                break
        if connection.pending_output:
            with session.lock:
                connection.flush()

    def _run_default(self) -> None:
        self._busy_since = _clock.now()
        try:
            self.session.run_default()
        finally:
            self._busy_since = 0.0

    def _unpark(self) -> None:
        """The control thread looks at the main thread again."""
        self._parked = False
        os.eventfd_write(self._wake_control, 1)

    def _lost(self, connection: Connection, error: BaseException) -> None:
        with self.session.lock:
            if self.session.peer.connection is connection:
                self.session.peer.lost(error)

    def _gone(self, _: Connection) -> None:
        """The peer has given up its connection, whichever thread noticed."""
        self._attached.clear()
        if self.state.value is State.OPEN:
            self.state.advance(Stimulus.CONNECTION_LOST)

    def _violated(self, error: GpuRemoteError) -> None:
        """The client broke the protocol: say so, and end."""
        with self.session.lock:
            peer = self.session.peer
            peer.post(Kind.GOODBYE, pack_info([error.code, error.message[:4096]]))
            connection = peer.connection
        if connection is not None:
            connection.close(1.0)
        print(f"gpuremote worker: {error}", file=sys.stderr, flush=True)
        self._over = True

    def _await_connection(self) -> bool:
        """Without a connection: run what can be run, and wait for the client to come back."""
        deadline = _clock.now() + self.options.grace
        while not self._over:
            self._run_default()
            if self._attached.wait(min(0.05, max(0.0, deadline - _clock.now()))):
                return True
            if _clock.now() >= deadline:
                return False
        return False

    def _drained(self) -> bool:
        connection = self.session.peer.connection
        return connection is None or not connection.pending_output

    def _finish(self) -> None:
        with self.session.lock:
            connection = self.session.peer.connection
        if connection is not None:
            connection.close(1.0)
        try:
            control.send(self.channel, {"event": "closed", "stats": self.session.stats()})
        except OSError:
            pass  # the daemon has gone; nobody is left to tell

    def _wake(self) -> None:
        os.eventfd_write(self._wake_main, 1)

    # -- control thread -------------------------------------------------------------------------

    def _control(self) -> None:
        poller = select.poll()
        poller.register(self.channel, select.POLLIN)
        poller.register(self._wake_control, select.POLLIN)
        watched: Connection | None = None
        while True:
            connection = self.session.peer.connection
            busy = self._busy_since and _clock.now() - self._busy_since > BUSY_AFTER
            take_over = connection if busy else None
            if watched is not None:
                poller.unregister(self._watched_fd)
                watched = None
            if take_over is not None and not take_over.closed:
                with contextlib.suppress(ConnectionLost):
                    self._watched_fd = take_over.fileno()
                    wanted = select.POLLIN | (select.POLLOUT if take_over.pending_output else 0)
                    poller.register(self._watched_fd, wanted)
                    watched = take_over
            timeout = None if self._parked else BUSY_AFTER
            due = None
            if watched is not None:
                due = 0.0 if self._left_over else watched.due()
            if due is not None:
                timeout = min(due, BUSY_AFTER)
            ready = {fd for fd, _ in poller.poll(None if timeout is None else 1000 * timeout)}
            if self.channel.fileno() in ready:
                self._from_daemon()
            if self._wake_control in ready:
                _drain(self._wake_control)
            if watched is not None and (due is not None or self._watched_fd in ready):
                self._take_over(watched)

    _watched_fd = -1

    def _take_over(self, connection: Connection) -> None:
        """Receive for the main thread, unless it does so itself."""
        if not self._receiving.acquire(blocking=False):
            return
        try:
            self._take_in(connection)
        except ConnectionLost as error:
            self._lost(connection, error)
        except GpuRemoteError as error:
            self._violated(error)
        except BaseException:
            # As in the main thread: without this one nobody would hear of the daemon's end.
            traceback.print_exc()
            os._exit(1)
        finally:
            self._receiving.release()

    def _from_daemon(self) -> None:
        try:
            request, sock = control.receive(self.channel)
        except (OSError, EOFError):
            # Without its daemon nobody could reach this session again.
            self._quit(1)
        match request.get("event"):
            case "connection" if sock is not None:
                hello = HelloReader("daemon").feed(request["hello"])
                assert isinstance(hello, Hello)
                # Not here: lanes of that connection come by here meanwhile.
                self._coming.put(functools.partial(self._admit, sock, hello, request))
            case "lane" if sock is not None:
                self._gate.arrive(sock, request["lane"], request["proof"])
            case "encrypted" if sock is not None and self._reception is not None:
                self._reception.receive(sock, request)
            case "drain":
                with self.session.lock:
                    self.session.answers.notice("draining", seconds=request.get("seconds", 0))
            case "end":
                self._over = True
                self._quit(0)

    def _quit(self, code: int) -> NoReturn:
        """In the midst of whatever the main thread does."""
        self.backend.end()
        os._exit(code)

    def _let_in(self) -> None:
        """One after the other, those whom the daemon has sent."""
        while True:
            self._coming.get()()

    def _admit(
        self, sock: socket.socket | TlsSocket, hello: Hello | Attach, request: dict[str, Any]
    ) -> None:
        """A client (new, or coming back) or another server's worker, who may come in, or a lane."""
        if isinstance(hello, Attach):
            self._gate.arrive(sock, hello.lane, hello.proof)
            return
        number = request.get("number")
        if number is None:  # the daemon has not seen what came encrypted, and waits for nothing
            same_host = hello.host == host_identity()
            request["choice"] = choose(
                hello.transports, same_host=same_host, lanes=bool(hello.lanes)
            )
        told = {"event": "claimed"} if number is None else {"event": "answering", "number": number}
        if hello.ticket:
            if number is not None:
                control.send(self.channel, told)
            self.copies.receive(sock, hello)
            return
        with self._admitting:
            self._attach(sock, hello, request, told)

    def _attach(
        self,
        sock: socket.socket | TlsSocket,
        hello: Hello,
        request: dict[str, Any],
        told: dict[str, Any],
    ) -> None:
        session, peer = self.session, self.session.peer
        with session.lock:
            if peer.connection is not None:
                peer.lost(ConnectionLost("replaced: the client came back over another connection"))
            resumed = self.state.value is not State.NEW
            if not resumed and hello.memory_limit:
                session.quota.limit = min(session.quota.limit, hello.memory_limit)
            if not resumed and self._alone:
                self.backend.confine(session.quota.limit)
                if self.backend.exports_memory:
                    heap.keep(session.quota.limit)
        # Without the lock: what the receipt says stays true, as nothing can come in meanwhile.
        connection: Connection | None = None
        try:
            control.send(self.channel, told)
            sock.settimeout(SETUP_TIMEOUT)
            sock.sendall(self._welcome(hello, request).encode())
            if not resumed:
                # From here on the client may have a session, also if this connection breaks now.
                self.state.advance(Stimulus.WELCOME)
            connection = self._best_path(sock, request)
            with session.lock:
                if resumed:
                    self.state.advance(Stimulus.RESUMED)
                self._left_over = True  # some may have come along with the set-up
                connection.roams = True  # this process is the session's alone
                connection.burst = LONG_BURST
                peer.attach(connection, hello.receipt)
        except (OSError, GpuRemoteError) as error:
            # The client will try again within the grace period.
            print(f"gpuremote worker: a connection came and went: {error}", file=sys.stderr)
            if connection is not None:
                connection.abort()
            else:
                sock.close()
            if self.state.value is State.NEW:
                self._quit(1)
            if self.state.value is State.OPEN:
                self.state.advance(Stimulus.CONNECTION_LOST)
            self._welcomed.set()
            return
        self._unpark()
        self._welcomed.set()
        with session.lock:  # as who gives it up again has, and then clears it
            if peer.connection is not None:
                self._attached.set()
        self._wake()

    def _best_path(self, sock: socket.socket | TlsSocket, request: dict[str, Any]) -> Connection:
        """A connection over the best transport that works; ``sock`` is its, or closed."""
        base = stream_connection(sock, blocking=True)
        deadline = _clock.now() + SETUP_TIMEOUT
        setup = Setup(
            base,
            blocking=True,
            deadline=deadline,
            secret=request["secret"],
            limit=self.session.quota.limit,  # copies of results, beside the results themselves
            gate=self._gate,
        )
        try:
            return climb(setup, request["choice"]["order"], client=False)[0]
        except BaseException:
            base.abort()
            raise

    def _welcome(self, hello: Hello, request: dict[str, Any]) -> Welcome:
        now = _clock.now()
        return Welcome(
            version=choose_version(*hello.versions),
            software=self.options.software,
            server=request["server"],
            host=host_identity(),
            session=request["session"],
            secret=request["secret"],
            backend=self.backend.name,
            devices=[
                {"kind": d.kind, "name": d.name, "memory": d.memory_bytes, **self.backend.facts()}
                for d in self.backend.devices()
            ],
            memory_limit=self.session.quota.limit,
            grace=self.options.grace,
            window=caps.WINDOW_BYTES,
            receipt=self.session.peer.receipt(),
            choice=request["choice"],
            advertise=request["advertise"],
            worker=os.getpid(),
            contents=int(self.session.sharing.channel is not None),
            inline=caps.MAX_INLINE,
            repeats=int(offered()),
            took=int(1e6 * (now - request.get("heard", now))),
        )


def _default_limit(backend: Backend) -> int:
    """80 % of what the devices have; logical ones on the host share its memory."""
    memory = [device.memory_bytes for device in backend.devices()]
    return int(0.8 * (max(memory) if backend.exports_memory else sum(memory)))


def _drain(descriptor: int) -> None:
    try:
        os.eventfd_read(descriptor)
    except BlockingIOError:
        pass  # somebody else has taken it


def work(channel: socket.socket, options: argparse.Namespace) -> NoReturn:
    """Be a worker process, to its end."""
    code = 0
    worker: Worker | None = None
    # What NumPy warns of (the mean of nothing) is nan at the client, as on a GPU; said here it
    # would reach the terminal of a program with a local server, and nobody else.
    warnings.simplefilter("ignore", RuntimeWarning)
    try:
        worker = Worker(channel, options, alone=True)
        with worker.backend.activate(None):
            worker.run()
    except KeyboardInterrupt:
        pass  # Ctrl-C reaches the whole foreground group; the daemon decides what to do
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        if worker is not None:
            worker.backend.end()
        sys.stderr.flush()
        # Threads may be inside ops that never end; nothing of this process is worth waiting for.
        os._exit(code)
