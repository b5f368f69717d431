"""Worker processes from the daemon's side: started ahead, handed a session, watched."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

from gpuremote.errors import ServerBusy, WorkerDied
from gpuremote.server import control
from gpuremote.server.contents import ContentStore, Desk
from gpuremote.server.options import ServerOptions

__all__ = ["Stock", "WorkerProcess"]

ATTEMPTS: Final = 3
"""Workers tried for one session, as one may have been killed while it waited."""
RESTOCK_AFTER: Final = 2.0
"""Seconds before a used worker is replaced: a new session should not compete with its start."""


class WorkerProcess:
    """One worker, seen from the daemon.

    Parameters
    ----------
    on_exit : callable
        Called once, from the loop, when the process has ended.
    store : ContentStore or None
        What the server keeps of uploads.

    Attributes
    ----------
    ready : asyncio.Future
        Done when it has loaded its backend; an exception if it ended before.
    claimed : bool
        A client has come to it over TLS.
    stats : dict
        Its last words.
    desk : Desk or None
        Where it asks for uploads that are kept.
    """

    def __init__(
        self,
        options: ServerOptions,
        on_exit: Callable[[WorkerProcess], None],
        store: ContentStore | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.channel, theirs = control.pair()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.claimed = False
        self.stats: dict[str, Any] = {}
        self._on_exit = on_exit
        self._loop = loop
        self._numbers = itertools.count()
        self._handed: dict[int, asyncio.Future[None]] = {}
        self.desk = None if store is None else Desk(store)
        ends = [theirs.fileno()]
        more = []
        if self.desk is not None:
            ends.append(self.desk.theirs.fileno())
            more = ["--contents", str(ends[1])]
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gpuremote.server.worker",
                    "--channel",
                    str(theirs.fileno()),
                    *more,
                    *options.worker_arguments(),
                ],
                pass_fds=ends,
                env=options.worker_environment(os.environ),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the daemon, which then drains.
                start_new_session=True,
            )
        finally:
            theirs.close()
            if self.desk is not None:
                self.desk.theirs.close()
        self.channel.setblocking(False)
        self._pidfd = os.pidfd_open(self.process.pid)
        loop.add_reader(self._pidfd, self._exited)
        loop.add_reader(self.channel.fileno(), self._from_worker)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def tell(self, request: dict[str, Any], sock: socket.socket | None = None) -> None:
        """Send a control message.

        Raises
        ------
        OSError
            The worker is gone.
        """
        control.send(self.channel, request, sock)

    async def hand_over(
        self, request: dict[str, Any], sock: socket.socket, patience: float
    ) -> None:
        """Give the worker a connection, and wait until it is about to answer there (or for
        ``patience`` seconds).

        Raises
        ------
        WorkerDied
            It ended before: whoever is at the other end has heard nothing.
        """
        number = next(self._numbers)
        taken = self._handed[number] = self._loop.create_future()
        try:
            self.tell({**request, "number": number}, sock)
            await asyncio.wait([taken], timeout=patience)
        except OSError as error:
            await self.wait(1.0)  # its channel is gone; the process takes a moment
            raise self.died() from error
        finally:
            del self._handed[number]
        if taken.done():
            taken.result()

    def died(self) -> WorkerDied:
        return WorkerDied(f"the session's worker process {self.pid} {self.describe_end()}")

    def describe_end(self) -> str:
        """How the process ended, for people."""
        code = self.process.poll()
        if code is None:
            return "is running"
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; out of memory?" if name == "SIGKILL" else ""
            return f"was ended by {name}{hint}"
        return f"ended with status {code}"

    def kill(self) -> None:
        """End it now."""
        if self.process.poll() is None:
            self.process.kill()

    async def wait(self, timeout: float) -> bool:
        """Wait for its end; False if it has not come in time."""
        deadline = self._loop.time() + timeout
        while self.process.poll() is None:
            if self._loop.time() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    def _from_worker(self) -> bool:
        """Take one message in; False if there is none."""
        try:
            message, _ = control.receive(self.channel)
        except BlockingIOError:
            return False
        except (EOFError, OSError):
            self._loop.remove_reader(self.channel.fileno())
            return False
        if message.get("event") == "ready" and not self.ready.done():
            self.ready.set_result(None)
        elif message.get("event") == "answering":
            taken = self._handed.get(message.get("number", -1))
            if taken is not None and not taken.done():
                taken.set_result(None)
        elif message.get("event") == "claimed":
            self.claimed = True
        elif message.get("event") == "closed":
            self.stats = message.get("stats", {})
        return True

    def _exited(self) -> None:
        self.process.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        while self._from_worker():
            pass
        self._loop.remove_reader(self.channel.fileno())
        self.channel.close()
        if self.desk is not None:
            self.desk.close()
        for taken in self._handed.values():
            if not taken.done():
                taken.set_exception(self.died())
        if not self.ready.done():
            error = ServerBusy(f"a worker process could not be started: it {self.describe_end()}")
            self.ready.set_exception(error)
            self.ready.exception()  # read, so that asyncio does not warn if nobody else does
        self._on_exit(self)


class Stock:
    """Workers that wait for a session.

    Parameters
    ----------
    on_exit : callable
        Called for each worker that ends, whether it had a session or not.

    Attributes
    ----------
    store : ContentStore or None
        What the server keeps of uploads.
    """

    def __init__(self, options: ServerOptions, on_exit: Callable[[WorkerProcess], None]) -> None:
        self.store: ContentStore | None = None
        self._options = options
        self._on_exit = on_exit
        self._waiting: list[WorkerProcess] = []
        self._all: set[WorkerProcess] = set()
        self._restock: asyncio.TimerHandle | None = None
        self._failures = 0

    def fill(self) -> None:
        """Start workers until as many wait as the options say."""
        self._restock = None
        while len(self._waiting) < self._options.warm:
            self._waiting.append(self._start())

    async def take(self, timeout: float) -> WorkerProcess:
        """A worker that is ready; the longest-waiting one.

        Raises
        ------
        ServerBusy
            None could be started in time.
        """
        failure = ServerBusy("worker processes ended as soon as they were ready")
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        for _ in range(ATTEMPTS):
            worker = self._waiting.pop(0) if self._waiting else self._start()
            self._schedule()
            try:
                await asyncio.wait_for(asyncio.shield(worker.ready), until - loop.time())
            except TimeoutError as error:
                worker.kill()
                raise ServerBusy(f"no worker process was ready within {timeout:.0f} s") from error
            except asyncio.CancelledError:
                self._waiting.insert(0, worker)  # nobody has it: the next one does
                raise
            except ServerBusy as error:
                failure = error
                continue
            if worker.alive:
                self._failures = 0
                return worker
        raise failure

    async def close(self) -> None:
        """End every worker, with or without a session."""
        if self._restock is not None:
            self._restock.cancel()
        workers = list(self._all)
        for worker in workers:
            worker.kill()
        for worker in workers:
            await worker.wait(5.0)
        while self._all:  # their exit callbacks come from the loop
            await asyncio.sleep(0.005)

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._options, self._gone, self.store)
        self._all.add(worker)
        return worker

    def _gone(self, worker: WorkerProcess) -> None:
        self._all.discard(worker)
        if worker in self._waiting:
            self._waiting.remove(worker)
            self._failures += 1
            self._schedule()
        self._on_exit(worker)

    def _schedule(self) -> None:
        if self._restock is None:
            # A backend that can't start must not make the daemon spin.
            delay = min(60.0, RESTOCK_AFTER * 2**self._failures)
            self._restock = asyncio.get_running_loop().call_later(delay, self.fill)
