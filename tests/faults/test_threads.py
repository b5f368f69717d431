"""Several threads in one session, and long ops that hold up nobody else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import DeadlineExceeded
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer
from gpuremote.wire.frames import Kind
from tests.faults.sides import Side, in_order, pattern, slow

pytestmark = pytest.mark.timeout(60)


def in_threads(*calls: Callable[[], object]) -> None:
    """Run all of them at a time; the first error of any is raised here."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result(45)


def worker(session: gpuremote.Session, seed: int, rounds: int) -> Callable[[], None]:
    """A thread's program: all kinds of calls, each with values of its own."""

    def run() -> None:
        device = session.devices[0]
        chance = np.random.default_rng(seed)
        total = device.zeros(8)
        expected = np.zeros(8)
        for k in range(rounds):
            small, large = chance.random(8), chance.integers(0, 255, 40_000 + 1000 * seed)
            total += device.put(small)
            expected += small
            uploaded = device.put(large)
            assert np.array_equal((uploaded + seed).get(), large + seed)
            if k % 3 == seed % 3:
                try:
                    uploaded.get(timeout=0.0002 * (k % 5))
                except DeadlineExceeded:
                    pass
            assert np.allclose(total.get(), expected)
            if k % 7 == seed:
                session.synchronize()

    return run


def test_four_threads_share_a_session(server: RunningServer) -> None:
    with gpuremote.connect_sync(server.url) as session:
        in_threads(*(worker(session, seed, 25) for seed in range(4)))
        session.flush()
        assert session.server_stats()["records"] == session.stats().records


def test_four_threads_and_a_connection_that_breaks(proxy: CuttingProxy) -> None:
    with gpuremote.connect_sync(f"gpu://{proxy.host}:{proxy.port}") as session:
        proxy.cut_after(700_001, "up", repeat=True)
        proxy.cut_after(900_001, "down", repeat=True)
        in_threads(*(worker(session, seed, 10) for seed in range(4)))
        proxy.cut_never()
        session.flush()
        assert session.server_stats()["records"] == session.stats().records
        assert session.stats().reconnects >= 5


def test_threads_with_sessions_of_their_own(server: RunningServer) -> None:
    def run() -> None:
        with gpuremote.connect_sync(server.url) as session:
            worker(session, 1, 5)()

    in_threads(*[run] * 4)


def test_a_thread_that_waits_long_does_not_hold_up_the_others(server: RunningServer) -> None:
    """It is the one that receives for all of them."""
    with gpuremote.connect_sync(server.url) as session:
        device = session.devices[0]
        numbers = slow(device, 10_000_000)
        other = device.stream()
        session.synchronize()
        ordered = in_order(numbers)
        session.flush()
        ends: list[str] = []

        def long() -> None:
            ordered[:3].get()
            ends.append("long")

        def short() -> None:
            with other:
                assert device.arange(5).sum().get() == 10
                x = device.put(pattern(1 << 20))
                assert np.array_equal(x.get(), pattern(1 << 20))
            ends.append("short")

        in_threads(long, short)
        assert ends == ["short", "long"]


def test_sessions_are_closed_while_threads_use_them(server: RunningServer) -> None:
    """Each call ends, with values or with the error of a closed session."""
    for pause in (0.0, 0.003, 0.02, 0.05):
        session = gpuremote.connect_sync(server.url)
        ends: list[str] = []

        def use(session: gpuremote.Session = session, ends: list[str] = ends) -> None:
            x = session.devices[0].arange(50_000)
            try:
                while True:
                    x += 1
                    x.get()
            except gpuremote.GpuRemoteError as error:
                ends.append(f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(pause)
        session.close(raise_failures=False)
        for thread in threads:
            thread.join(10)
        assert [end.split(":")[0] for end in ends] == ["SessionClosed"] * 3, ends


# -- long ops -------------------------------------------------------------------------------------


@contextmanager
def busy(session: Any, side: Side) -> Iterator[Any]:
    """The default stream is in an op of a second or more; gives its result."""
    numbers = slow(session.devices[0])
    side.do(session.synchronize())
    ordered = in_order(numbers)
    session.flush()
    time.sleep(0.05)
    yield ordered
    first = side.do(ordered[:3].get())
    assert first[0] <= first[1] <= first[2]


def took(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def test_a_long_op_holds_up_neither_other_streams_nor_control(
    side: Side, server: RunningServer
) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        other = device.stream()
        with busy(session, side) as ordered:
            began = time.monotonic()
            session._core.peer.control(Kind.PING, arg=9)
            for _ in range(5):
                assert side.do(session.server_stats())["records"] > 0
            assert session._core.peer.last_pong == 9
            data = pattern(3 << 20)
            x = side.do(device.put(data))
            with other:
                assert side.do(device.arange(4).sum().get()) == 6
                assert np.array_equal(side.do((x + 0).get()), data)
            with pytest.raises(DeadlineExceeded):
                side.do(ordered.wait(timeout=0.02))
            elapsed = time.monotonic() - began
            assert took(lambda: side.do(ordered.wait())) > 0.1, f"all of it took {elapsed:.2f} s"


def test_a_long_op_holds_up_no_other_session(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session, side.session(server.url) as other:
        x = other.devices[0].arange(4)
        side.do(x.get())
        with busy(session, side) as ordered:
            for _ in range(20):
                assert side.do(x.get()).tolist() == [0, 1, 2, 3]
            with pytest.raises(DeadlineExceeded):
                side.do(ordered.wait(timeout=0.02))


def test_the_connection_breaks_during_a_long_op(side: Side, proxy: CuttingProxy) -> None:
    """The op goes on; the client comes back meanwhile, and other streams serve it."""
    with side.session(f"gpu://{proxy.host}:{proxy.port}") as session:
        device = session.devices[0]
        other = device.stream()
        counter = device.zeros(3)
        with busy(session, side) as ordered:
            counter += 1
            proxy.cut()
            with other:
                assert side.do(device.arange(4).sum().get()) == 6
            proxy.cut()
            assert side.do(session.server_stats())["streams"] == 2
            with pytest.raises(DeadlineExceeded):
                side.do(ordered.wait(timeout=0.02))
        assert side.do(counter.get()).tolist() == [1, 1, 1]
        assert session.stats().reconnects == 2


async def test_many_tasks_share_a_session(server: RunningServer) -> None:
    async with gpuremote.connect(server.url) as session:
        device = session.devices[0]

        async def task(seed: int) -> None:
            for k in range(4):
                data = pattern(30_000 + seed, seed + k)
                x = await device.put(data)
                assert np.array_equal(await (x ^ np.uint8(seed)).get(), data ^ np.uint8(seed))

        await asyncio.gather(*(task(seed) for seed in range(60)))
