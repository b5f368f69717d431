"""Processes that are killed: a worker, the daemon, the program that started ``local://``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client import local
from gpuremote.errors import GpuRemoteError, PeerCopyFailed, SessionLost, WorkerDied
from gpuremote.testing.servers import RunningServer, device_server
from tests.faults.processes import cpu_seconds, descendants, forked, gone, wait_until_gone
from tests.faults.sides import BlockingSide, Side, in_order, pattern, slow

pytestmark = pytest.mark.timeout(60)


def elapsed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# -- a worker -------------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_of_an_op(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session, side.session(server.url) as other:
        numbers = slow(session.devices[0])
        counter = other.devices[0].zeros(3)
        side.do(session.synchronize())
        ordered = in_order(numbers)
        session.flush()
        time.sleep(0.15)
        assert not gone(session.worker_pid)
        kill(session.worker_pid)
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="SIGKILL") as caught:
            side.do(ordered[:5].get())
        assert time.monotonic() - began < 2
        assert isinstance(caught.value, SessionLost)
        assert str(session.worker_pid) in str(caught.value)
        calls: list[Callable[[], object]] = [lambda: side.do(numbers.get()), lambda: numbers + 1]
        for call in calls:
            with pytest.raises(WorkerDied):
                call()
        counter += 1
        assert side.do(counter.get()).tolist() == [1, 1, 1]
        with side.session(server.url) as another:
            assert side.do(another.devices[0].arange(3).get()).tolist() == [0, 1, 2]


def test_a_worker_killed_while_the_program_waits(side: Side, server: RunningServer) -> None:
    """The wait that is under way ends, and so does every other one of the session."""
    with side.session(server.url) as session:
        numbers = slow(session.devices[0])
        side.do(session.synchronize())
        ordered = in_order(numbers)
        killer = threading.Timer(0.3, kill, (session.worker_pid,))
        killer.start()
        with pytest.raises(WorkerDied):
            side.do(session.get_many([ordered, numbers, ordered]))
        killer.join()


def test_a_worker_killed_between_two_calls(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        x = side.do(device.put(pattern(100_000)))
        kill(session.worker_pid)
        wait_until_gone(session.worker_pid, seconds=2)
        calls: list[Callable[[], object]] = [
            lambda: side.do(device.put(pattern(100_000))),
            lambda: side.do(x.get()),
        ]
        for call in calls:
            with pytest.raises(WorkerDied):
                call()


@pytest.mark.parametrize("way", ["put", "get"])
def test_a_worker_killed_in_the_middle_of_a_payload(
    side: Side, server: RunningServer, way: str
) -> None:
    """The buffer is free when the error is raised."""
    with side.session(server.url) as session:
        device = session.devices[0]
        died = False
        memory = bytearray(64 << 20)
        array = device.zeros(len(memory), np.uint8)
        side.do(array.wait())
        os.kill(session.worker_pid, signal.SIGSTOP)
        killer = threading.Timer(0.3, kill, (session.worker_pid,))
        killer.start()
        try:
            side.do(device.put(memory) if way == "put" else array.get(out=memory))
        except WorkerDied:
            died = True
        killer.join()
        assert died
        if side.name == "asyncio":
            gc.collect()  # run_until_complete() of asyncio keeps the error in a circle
        memory.append(0)  # BufferError if anything still holds it


def test_a_warm_worker_that_was_killed_is_not_handed_out() -> None:
    with device_server("--warm", "2") as server:
        for least in (2, 0):
            stock = forked(server.process.pid, least)
            for pid in stock:
                kill(pid)
            wait_until_gone(*stock, seconds=5)
            with gpuremote.connect_sync(server.url) as session:
                assert session.devices[0].ones(2).get().tolist() == [1, 1]


def test_a_worker_that_is_killed_before_it_answers(side: Side) -> None:
    """The client has heard nothing of it, and gets another one."""
    with device_server("--warm", "1") as server:
        (waiting,) = forked(server.process.pid, 1)
        os.kill(waiting, signal.SIGSTOP)

        def end() -> None:
            time.sleep(0.2)
            kill(waiting)

        killer = threading.Thread(target=end)
        killer.start()
        with side.session(server.url) as session:
            assert side.do(session.devices[0].ones(2).get()).tolist() == [1, 1]
        killer.join()


def test_a_copy_whose_sender_is_killed_fails_at_the_receiver(side: Side) -> None:
    with (
        device_server() as first,
        device_server() as second,
        side.session(first.url) as sender,
        side.session(second.url) as receiver,
    ):
        numbers = slow(sender.devices[0], 4_000_000)
        side.do(sender.synchronize())
        copied = in_order(numbers).copy_to(receiver.devices[0])
        time.sleep(0.1)
        kill(sender.worker_pid)
        with pytest.raises((PeerCopyFailed, SessionLost)):
            side.do(copied.get(timeout=10))
        x = receiver.devices[0].ones(2)
        assert side.do(x.get()).tolist() == [1, 1]


def test_a_copy_is_finished_before_its_session_ends(side: Side) -> None:
    with device_server() as first, device_server() as second, side.session(second.url) as receiver:
        sender = side.do(side.connect(first.url))
        values = sender.devices[0].arange(3_000_000)
        copied = values.copy_to(receiver.devices[0])
        side.do(sender.close())
        assert side.do(copied.sum().get(timeout=10)) == 3_000_000 * 2_999_999 // 2


# -- a client -------------------------------------------------------------------------------------


def test_a_client_that_is_killed_leaves_nothing_at_the_server() -> None:
    """In whatever it was: the worker waits for the grace period, quietly, and ends."""
    program = """
        import sys, time
        import numpy as np
        import gpuremote
        session = gpuremote.connect_sync(sys.argv[1])
        x = session.devices[0].ones(1 << 23)
        print(session.worker_pid, flush=True)
        waits = [x._ask_bytes(memoryview(np.empty(1 << 23)).cast("B")) for _ in range(4)]
        for k in range(10):
            x += k
        session.flush()
        print("under way", flush=True)
        time.sleep(60)
    """
    with device_server("--grace", "1.2") as server:
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), server.url], stdout=subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            worker = int(client.stdout.readline())
            client.stdout.readline()
            time.sleep(0.2)
            client.kill()
        time.sleep(0.3)
        before = cpu_seconds(worker)
        time.sleep(0.5)
        assert not gone(worker)
        assert cpu_seconds(worker) - before < 0.25, "it spins while it waits for its client"
        wait_until_gone(worker, seconds=6)


# -- what workers are forked from -----------------------------------------------------------------


def fork_server(server: RunningServer) -> int:
    """The process that workers are forked from."""
    (found,) = set(descendants(server.process.pid)) - set(forked(server.process.pid, 1))
    return found


def test_workers_are_forked_from_one_process(server: RunningServer) -> None:
    parent = fork_server(server)
    with gpuremote.connect_sync(server.url) as one, gpuremote.connect_sync(server.url) as two:
        for session in (one, two):
            status = Path(f"/proc/{session.worker_pid}/status").read_text()
            assert f"PPid:\t{parent}\n" in status
            assert os.getsid(session.worker_pid) == session.worker_pid
            entries = Path(f"/proc/{session.worker_pid}/fd").iterdir()
            names = [os.readlink(entry) for entry in entries]
            # None of its sisters' ends, and not the fork server's.
            assert sum(name.startswith("socket:") for name in names) <= 3, names


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_fork_server_ends(side: Side, number: signal.Signals) -> None:
    """Sessions live on, and there are new ones; only how a worker ends can't be told exactly."""
    with device_server("--warm", "1") as server:
        session = side.do(side.connect(server.url))
        x = session.devices[0].ones(3)
        side.do(x.get())
        before = fork_server(server)
        os.kill(before, number)
        wait_until_gone(before, seconds=5)
        assert side.do(x.get()).tolist() == [1, 1, 1]
        for _ in range(2):
            with gpuremote.connect_sync(server.url) as another:
                assert another.devices[0].ones(2).tolist() == [1, 1]
        kill(session.worker_pid)
        with pytest.raises(WorkerDied, match="fork server had ended before"):
            side.do(x.get())
        side.do(session.close())


def test_the_fork_server_ends_before_it_has_loaded() -> None:
    """The client that waits for a worker of it gets one of the next fork server."""
    with device_server("--warm", "0") as server:
        (first,) = descendants(server.process.pid)
        os.kill(first, signal.SIGSTOP)
        killer = threading.Timer(0.3, kill, (first,))
        killer.start()
        with gpuremote.connect_sync(server.url) as session:
            assert session.devices[0].ones(2).tolist() == [1, 1]
        killer.join()


# -- the daemon -----------------------------------------------------------------------------------


def test_a_daemon_that_is_killed_takes_its_workers_along(side: Side) -> None:
    with device_server("--warm", "2") as server:
        session = side.do(side.connect(server.url + "?grace=0.7"))
        busy = side.do(side.connect(server.url + "?grace=0.7"))
        numbers = slow(busy.devices[0])
        side.do(busy.synchronize())
        ordered = in_order(numbers)
        busy.flush()
        x = session.devices[0].ones(3)
        side.do(x.get())
        workers = descendants(server.process.pid)
        assert {session.worker_pid, busy.worker_pid} <= set(workers)
        server.kill()
        wait_until_gone(*workers, seconds=5)
        for array in (x, ordered):
            began = time.monotonic()
            with pytest.raises(SessionLost, match="grace period"):
                side.do(array.get())
            assert time.monotonic() - began < 4
        side.do(session.close())
        side.do(busy.close())


def test_a_daemon_that_is_told_to_stop() -> None:
    """SIGTERM, and nobody ends the session: it is lost when the time to drain is over."""
    side = BlockingSide()
    with device_server("--drain", "0.5") as server:
        session = side.do(side.connect(server.url + "?grace=0.7"))
        x = session.devices[0].ones(3)
        side.do(x.get())
        server.process.send_signal(signal.SIGTERM)
        while not session.draining:  # the session is told
            side.do(x.get())
        with pytest.raises(GpuRemoteError, match="shutting down"):
            side.do(side.connect(server.url))
        workers = descendants(server.process.pid)
        assert server.process.wait(10) == 0
        wait_until_gone(*workers, seconds=2)
        with pytest.raises(SessionLost):
            side.do(x.get())
        side.do(session.close())


# -- local:// -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exit"])
def test_a_parent_that_ends_takes_the_local_server_along(end: str) -> None:
    program = """
        import os, sys, time
        import numpy as np
        import gpuremote
        from gpuremote.client import local
        session = gpuremote.connect_sync("local://")
        x = session.devices[0].random_uniform(6_000_000, 1)
        session.synchronize()
        y = np.sort(x)
        session.flush()
        (server,) = local._servers.values()
        print(server.process.pid, session.worker_pid, flush=True)
        if sys.argv[1] == "exit":
            os._exit(3)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), end], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        server, worker = map(int, parent.stdout.readline().split())
        family = [server, worker, *descendants(server)]
        if end != "exit":
            parent.send_signal(signal.Signals[end])
        parent.wait(10)
    wait_until_gone(*family, seconds=5)


def test_a_local_server_that_is_killed(side: Side) -> None:
    """Nothing to wait for: it can't come back. The next ``local://`` starts another one."""
    with side.session("local://?grace=60") as session:
        x = session.devices[0].ones(3)
        side.do(x.get())
        (running,) = local._servers.values()
        workers = descendants(running.process.pid)
        kill(running.process.pid)
        wait_until_gone(*workers, seconds=5)
        began = time.monotonic()
        with pytest.raises(SessionLost, match="local server"):
            side.do(x.get())
        assert time.monotonic() - began < 3
        with side.session("local://") as another:
            assert side.do(another.devices[0].ones(1).get()).tolist() == [1]


@pytest.mark.parametrize("after", [0.0, 0.05, 0.2])
async def test_connecting_to_local_is_cancelled(after: float) -> None:
    """The server that was being started does not stay (the fixture would find it)."""
    task = asyncio.ensure_future(_connect("local://"))
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    deadline = time.monotonic() + 10
    while local._servers and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert not local._servers


async def _connect(url: str) -> Any:
    return await gpuremote.connect(url)
