"""Processes of a device server from the daemon's side: the fork server, and workers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from gpuremote.errors import GpuRemoteError, ServerBusy, WorkerDied
from gpuremote.server import control
from gpuremote.server.contents import ContentStore, Desk
from gpuremote.server.options import ServerOptions

__all__ = ["ForkServer", "WorkerProcess"]

LOADING: Final = 90.0
"""Seconds that a backend may take to load."""


class ForkServer:
    """The process that workers are forked from (``server.forkserver``).

    Attributes
    ----------
    over : bool
        It has ended. Its workers live on; another one has to start further ones.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._asked: dict[int, WorkerProcess] = {}
        self._running: dict[int, WorkerProcess] = {}
        self._loaded = False
        self._begun = self._loop.time()
        self._channel, theirs = control.pair()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gpuremote.server.forkserver",
                    "--channel",
                    str(theirs.fileno()),
                    *options.worker_arguments(),
                ],
                pass_fds=[theirs.fileno()],
                env=options.worker_environment(os.environ),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the daemon, which then drains.
                start_new_session=True,
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self._channel.setblocking(False)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        self._loop.add_reader(self._channel.fileno(), self._readable)

    def start(self, worker: WorkerProcess, ends: Sequence[int]) -> None:
        """Have a worker forked, and give it these descriptors; it is told what becomes of that."""
        number = next(self._numbers)
        try:
            control.send_files(self._channel, {"event": "start", "number": number}, ends)
        except OSError as error:  # it has ended, or takes nothing any more
            self._loop.call_soon(worker.ended, None, f"could not be asked for: {error}")
        else:
            self._asked[number] = worker

    def stop(self) -> None:
        """End it. Workers live on, but those that it has not started yet."""
        if self.over:
            return
        if self._loaded:
            self._channel.shutdown(socket.SHUT_WR)
        else:
            self.kill()

    def give_up(self) -> None:
        """It has not started a worker in time: end it, if it hangs. The next one may not."""
        if self._loaded or self._loop.time() - self._begun > LOADING:
            self.kill()

    def kill(self) -> None:
        """End it by force, and those with it that it has not started yet."""
        if not self.over:
            self._process.kill()

    async def wait(self, timeout: float) -> None:
        """Wait for its end; after ``timeout`` seconds it is ended by force."""
        deadline = self._loop.time() + timeout
        while not self.over:
            if self._loop.time() > deadline:
                self.kill()
            await asyncio.sleep(0.005)

    def _readable(self) -> bool:
        """Take one message in; False if there is none."""
        try:
            message, descriptors = control.receive_files(self._channel)
        except BlockingIOError:
            return False
        except (EOFError, OSError):
            self._loop.remove_reader(self._channel.fileno())
            return False
        match message["event"]:
            case "loaded":
                self._loaded = True
            case "started":
                self._started(message, descriptors)
            case "ended":
                self._running.pop(message["pid"]).ended(message["status"])
        return True

    def _started(self, message: dict[str, Any], descriptors: list[int]) -> None:
        worker, pid = self._asked.pop(message["number"]), message["pid"]
        if not pid:
            worker.ended(None, f"could not be forked: {message['error']}")
            return
        self._running[pid] = worker
        if descriptors:
            worker.started(pid, descriptors[0])
        else:  # this process may open no more files, so the kernel has dropped it
            os.kill(pid, signal.SIGKILL)

    def _exited(self) -> None:
        self.over = True
        status = self._process.wait()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        while self._readable():
            pass
        self._loop.remove_reader(self._channel.fileno())
        self._channel.close()
        for worker in self._asked.values():
            worker.ended(status)
        for worker in self._running.values():
            worker.orphaned()


class WorkerProcess:
    """One worker.

    Parameters
    ----------
    forkserver : ForkServer
        Starts it.
    on_exit : callable
        Called once, from the loop, when the process has ended.
    store : ContentStore or None
        What the server keeps of uploads.

    Attributes
    ----------
    pid : int
        0: it has not been started yet.
    ready : asyncio.Future
        Done when it has set up its backend; an exception if it ended before.
    over : bool
        It has ended.
    failed : bool
        It has ended otherwise than it should.
    claimed : bool
        A client has come to it over TLS.
    stats : dict
        Its last words.
    desk : Desk or None
        Where it asks for uploads that are kept.
    """

    def __init__(
        self,
        forkserver: ForkServer,
        on_exit: Callable[[WorkerProcess], None],
        store: ContentStore | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.channel, theirs = control.pair()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.pid = 0
        self.over = self.failed = False
        self.claimed = False
        self.stats: dict[str, Any] = {}
        self._on_exit = on_exit
        self._numbers = itertools.count()
        self._handed: dict[int, asyncio.Future[None]] = {}
        self._pidfd = -1
        self._loaded = False
        self._unwanted = False
        self._end = "is running"
        self.desk = None if store is None else Desk(store)
        self.channel.setblocking(False)
        self._loop.add_reader(self.channel.fileno(), self._from_worker)
        ends = [theirs, *([] if self.desk is None else [self.desk.theirs])]
        try:
            forkserver.start(self, [end.fileno() for end in ends])
        finally:
            for end in ends:
                end.close()

    @property
    def alive(self) -> bool:
        """Whether it runs (or is still to be started), as far as the kernel knows."""
        if self.over or self._pidfd < 0:
            return not self.over
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

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
        return self._end

    def kill(self) -> None:
        """End it now, or as soon as it has been started."""
        self._unwanted = True
        if self._pidfd >= 0 and not self.over:
            with contextlib.suppress(ProcessLookupError):  # its end is on its way to here
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self, timeout: float) -> bool:
        """Wait for its end; False if it has not come in time."""
        deadline = self._loop.time() + timeout
        while not self.over:
            if self._loop.time() > deadline:
                return False
            await asyncio.sleep(0.005)
        return True

    # -- told by the fork server ----------------------------------------------------------------

    def started(self, pid: int, pidfd: int) -> None:
        """It is there; the descriptor of the process is its from now on."""
        self.pid, self._pidfd = pid, pidfd
        if self._unwanted:
            self.kill()
        self._look()

    def ended(self, status: int | None, how: str = "") -> None:
        """It has ended, or never was: ``how``, or with a status as in ``subprocess`` (None: nobody
        knows)."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
        while self._from_worker():
            pass
        self._loop.remove_reader(self.channel.fileno())
        self.channel.close()
        if self.desk is not None:
            self.desk.close()
        self.over = True
        # One that has said its last words was about to end well.
        self.failed = status != 0 and (status is not None or not self.stats)
        self._end = how or _describe(status)
        for taken in self._handed.values():
            if not taken.done():
                taken.set_exception(self.died())
        if not self.ready.done():
            error = ServerBusy(f"a worker process could not be started: it {self._end}")
            self.ready.set_exception(error)
            self.ready.exception()  # read, so that asyncio does not warn if nobody else does
        self._on_exit(self)

    def orphaned(self) -> None:
        """The fork server has ended, and nobody will tell of this process."""
        self._loop.add_reader(self._pidfd, self._gone)

    def _gone(self) -> None:
        self._loop.remove_reader(self._pidfd)
        with contextlib.suppress(ChildProcessError):
            # It is this process's child only where this is the first one of a container.
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        self.ended(None)

    # -- told by the worker ---------------------------------------------------------------------

    def _from_worker(self) -> bool:
        """Take one message in; False if there is none."""
        try:
            message, _ = control.receive(self.channel)
        except BlockingIOError:
            return False
        except (EOFError, OSError, GpuRemoteError):
            self._loop.remove_reader(self.channel.fileno())
            return False
        if message.get("event") == "ready":
            self._loaded = True
            self._look()
        elif message.get("event") == "answering":
            taken = self._handed.get(message.get("number", -1))
            if taken is not None and not taken.done():
                taken.set_result(None)
        elif message.get("event") == "claimed":
            self.claimed = True
        elif message.get("event") == "closed":
            self.stats = message.get("stats", {})
        return True

    def _look(self) -> None:
        # Two channels say it, and either may be the first.
        if self._loaded and self.pid and not self.ready.done():
            self.ready.set_result(None)


def _describe(status: int | None) -> str:
    """How a process ended, for people."""
    if status is None:
        return "ended while nobody looked: its fork server had ended before"
    if status < 0:
        known = -status in signal.valid_signals() and -status < signal.SIGRTMIN
        name = signal.Signals(-status).name if known else f"signal {-status}"
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with status {status}"
