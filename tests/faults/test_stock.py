"""Processes of a server, seen from the daemon: what goes wrong with them one by one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuremote.errors import ServerBusy
from gpuremote.server.options import ServerOptions
from gpuremote.server.processes import WorkerProcess
from gpuremote.server.stock import Stock
from tests.faults.processes import gone


@asynccontextmanager
async def stock(warm: int = 0) -> AsyncIterator[tuple[Stock, list[WorkerProcess]]]:
    """Workers, and those of them that have ended."""
    ended: list[WorkerProcess] = []
    made = Stock(ServerOptions(warm=warm), ended.append)
    made.fill()
    try:
        yield made, ended
    finally:
        await made.close()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


async def a_worker_that_ends_is_told_once() -> None:
    async with stock() as (made, ended):
        worker = await made.take(20)
        assert worker.alive
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.over)
        assert ended == [worker]
        assert worker.failed
        assert "SIGKILL" in worker.describe_end()
        worker.kill()  # nothing to do


async def to_kill_one_whose_end_is_on_its_way_here() -> None:
    """The fork server has waited for it, and this loop has not read of it."""
    async with stock() as (made, ended):
        worker = await made.take(20)
        os.kill(worker.pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{worker.pid}"):
            pass  # the loop stands
        assert not worker.over
        worker.kill()
        await until(lambda: worker.over)
        assert ended == [worker]


async def a_fork_server_that_hangs_is_replaced() -> None:
    async with stock() as (made, _):
        first = await made.take(20)
        fork_server = made._forkserver
        assert fork_server is not None
        fork_server._process.send_signal(signal.SIGSTOP)
        with pytest.raises(ServerBusy, match="no worker process was ready within"):
            await made.take(0.3)
        await until(lambda: fork_server.over)
        second = await made.take(20)
        assert second.pid != first.pid
        assert first.alive
        assert made._forkserver is not fork_server


async def one_that_loads_is_given_time() -> None:
    async with stock() as (made, _):
        fork_server = made._forkserver
        with pytest.raises(ServerBusy):
            await made.take(0.01)
        await made.take(20)
        assert made._forkserver is fork_server


async def nothing_is_started_after_the_end() -> None:
    async with stock(warm=2) as (made, ended):
        await until(lambda: all(worker.ready.done() for worker in made._waiting))
        pids = [worker.pid for worker in made._waiting]
        await made.close()
        assert len(ended) == 2
        assert all(gone(pid) for pid in pids)
        assert made._restock is None
        made.fill()
        assert not made._waiting


CASES = [
    a_worker_that_ends_is_told_once,
    to_kill_one_whose_end_is_on_its_way_here,
    a_fork_server_that_hangs_is_replaced,
    one_that_loads_is_given_time,
    nothing_is_started_after_the_end,
]


@pytest.mark.parametrize("case", CASES)
def test_processes_of_a_server(case: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In a process of its own, as a daemon: to start another one holds up its loop for some ms."""
    program = (
        f"import asyncio; from tests.faults.test_stock import *; asyncio.run({case.__name__}())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
