"""A reader that stops reading bounds the sender's memory, on either side."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer
from gpuremote.wire.batch import Op, fixed_record
from gpuremote.wire.frames import Kind
from tests.faults.processes import cpu_seconds, gone, resident
from tests.faults.raw import RawClient, message
from tests.faults.sides import Side

pytestmark = pytest.mark.timeout(60)

MiB = 1 << 20


# -- the server sends, the client does not read ---------------------------------------------------


async def test_a_client_with_a_blocked_loop_bounds_the_server(server: RunningServer) -> None:
    """6,000 answers of 16 KiB are asked for, and nobody takes them for a while."""
    async with gpuremote.connect(server.url) as session:
        x = session.devices[0].arange(2048)
        await x.get()
        before = resident(session.worker_pid)
        gets = [asyncio.ensure_future(x.get()) for _ in range(6000)]
        await asyncio.sleep(0)
        time.sleep(1.0)  # the loop, and with it the reader, stands still
        assert resident(session.worker_pid) - before < 24 * MiB
        assert not any(get.done() for get in gets)
        for got in await asyncio.gather(*gets):
            assert np.array_equal(got, np.arange(2048))


def stuffed(client: RawClient, messages: Iterable[bytes], seconds: float) -> int:
    """Send until the server takes no more, or for so long; bytes that it took."""
    client.sock.settimeout(0.5)
    deadline = time.monotonic() + seconds
    sent = 0
    try:
        for data in messages:
            client.sock.sendall(data)
            sent += len(data)
            if time.monotonic() > deadline:
                break
    except OSError:
        pass  # it takes no more, or has ended the session
    return sent


@pytest.mark.parametrize("kind", ["arrays", "facts", "failures", "events", "pings"])
def test_a_client_that_never_reads(server: RunningServer, kind: str) -> None:
    """It heeds no credit either. Its worker stays small or ends; nobody else notices.

    To the end, as what there is after some time depends on the machine: 9 MiB of messages, of 12
    bytes each where it costs most (a failure's text for each), or 32 MiB of answers.
    """
    with (
        gpuremote.connect_sync(server.url) as other,
        RawClient(server.host, server.port) as client,
    ):
        pid = client.welcome.worker
        client.sock.sendall(client.batch(client.put(bytes(8192))))
        time.sleep(0.1)
        before = resident(pid)
        record = {
            "arrays": client.get(1),
            "facts": fixed_record(Op.STATS),
            "failures": fixed_record(Op.META, 999),
            "events": fixed_record(Op.EVENT_QUERY, 1),
            "pings": b"",
        }[kind]
        peak = 0
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02) and not gone(pid):
                peak = max(peak, resident(pid) - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        pings = message(Kind.PING, 0) * 2000
        stuffed(
            client,
            (pings if kind == "pings" else client.batch(*[record] * 2000) for _ in range(100_000)),
            1.2 if kind == "pings" else 10.0,  # they are answered, or dropped, for ever
        )
        done.set()
        watcher.join()
        assert peak < 512 * MiB
        x = other.devices[0].ones(2)
        assert x.get().tolist() == [1, 1]


def test_failures_that_nobody_reads(side: Side, server: RunningServer) -> None:
    """A program that heeds its credit may have as many failures as it likes."""
    with side.session(server.url) as session:
        device = session.devices[0]
        for _ in range(8_000):
            device.empty(1 << 50, np.uint8)
        with pytest.raises(OutOfDeviceMemory) as caught:
            side.do(session.synchronize())
        assert "more ops failed" in caught.value.__notes__[0]
        assert side.do(device.ones(2).get()).tolist() == [1, 1]


# -- the client sends, the server does not read ---------------------------------------------------


def test_a_server_that_stands_still_bounds_the_client(side: Side, server: RunningServer) -> None:
    """The program goes on issuing ops; it is held up, and goes on when the server does."""
    ops = 65_000
    with side.session(server.url) as session:
        x = session.devices[0].zeros(2, np.int64)
        x += 1
        side.do(x.get())
        issued = 0
        found: list[tuple[int, int]] = []

        def look_and_continue() -> None:
            first = -1
            deadline = time.monotonic() + 15
            while first != issued and time.monotonic() < deadline:
                first = issued
                time.sleep(0.5)
            found.append((first, tracemalloc.get_traced_memory()[0]))
            os.kill(session.worker_pid, signal.SIGCONT)

        os.kill(session.worker_pid, signal.SIGSTOP)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            thread = threading.Thread(target=look_and_continue)
            thread.start()
            for issued in range(ops):  # noqa: B007
                x += 1
            thread.join()
        finally:
            tracemalloc.stop()
            os.kill(session.worker_pid, signal.SIGCONT)
        ((held_at, memory),) = found
        assert 0 < held_at < ops - 1, "nothing held the program up"
        assert memory - before < 24 * MiB
        assert side.do(x.get()).tolist() == [ops + 1] * 2
        assert session.stats().credit_waits >= 1


def test_uploads_to_a_server_that_stands_still(server: RunningServer) -> None:
    """Threads that upload wait; what they lent is not copied anywhere meanwhile."""
    with gpuremote.connect_sync(server.url) as session:
        device = session.devices[0]
        session.synchronize()
        data = np.arange(2 * MiB, dtype=np.int64)
        os.kill(session.worker_pid, signal.SIGSTOP)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            arrays: list[Any] = []
            threads = [
                threading.Thread(target=lambda: arrays.append(device.put(data))) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            time.sleep(0.7)
            assert not arrays
            assert tracemalloc.get_traced_memory()[1] - before < 4 * MiB
        finally:
            tracemalloc.stop()
            os.kill(session.worker_pid, signal.SIGCONT)
        for thread in threads:
            thread.join(20)
        assert len(arrays) == 4
        assert int(arrays[3].sum().get()) == int(data.sum())


# -- nobody sends ---------------------------------------------------------------------------------


def test_idle_sessions_cost_nothing(side: Side, server: RunningServer) -> None:
    """Also with a stream that has nothing to do, and one that waits for an event."""
    with side.session(server.url) as session:
        device = session.devices[0]
        idle, waiting = device.stream(), device.stream()
        with idle:
            x = device.ones(3)
        side.do(x.get())
        side.do(session.synchronize())
        time.sleep(0.1)
        before = cpu_seconds(session.worker_pid)
        time.sleep(1.0)
        assert cpu_seconds(session.worker_pid) - before < 0.2
        del waiting
