"""Workers that are started ahead, and handed out to sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gpuremote.errors import ServerBusy
from gpuremote.server.contents import ContentStore
from gpuremote.server.options import ServerOptions
from gpuremote.server.processes import ForkServer, WorkerProcess

__all__ = ["ATTEMPTS", "Stock"]

ATTEMPTS: Final = 3
"""Workers tried for one session, as one may have been killed while it waited."""
RESTOCK_AFTER: Final = 2.0
"""Seconds before a used worker is replaced: a new session should not compete with its start."""


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
        self._forkserver: ForkServer | None = None
        self._closed = False

    def fill(self) -> None:
        """Start workers until as many wait as the options say, and what starts further ones."""
        self._restock = None
        if self._closed:
            return
        self._forking()
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
                if not worker.pid and self._forkserver is not None:
                    self._forkserver.give_up()
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
        self._closed = True
        if self._restock is not None:
            self._restock.cancel()
        workers = list(self._all)
        for worker in workers:
            worker.kill()
        if self._forkserver is not None:
            self._forkserver.stop()
            await self._forkserver.wait(5.0)
        for worker in workers:
            await worker.wait(5.0)

    def _start(self) -> WorkerProcess:
        worker = WorkerProcess(self._forking(), self._gone, self.store)
        self._all.add(worker)
        return worker

    def _forking(self) -> ForkServer:
        if self._forkserver is None or self._forkserver.over:
            self._forkserver = ForkServer(self._options)
        return self._forkserver

    def _gone(self, worker: WorkerProcess) -> None:
        self._all.discard(worker)
        if worker in self._waiting:
            self._waiting.remove(worker)
            self._failures += 1
            self._schedule()
        self._on_exit(worker)

    def _schedule(self) -> None:
        if self._restock is None and not self._closed:
            # A backend that can't start must not make the daemon spin.
            delay = min(60.0, RESTOCK_AFTER * 2**self._failures)
            self._restock = asyncio.get_running_loop().call_later(delay, self.fill)
