"""Cancellation and deadlines: the buffer is free when the call is over, and the session goes on."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client.core import Core
from gpuremote.errors import DeadlineExceeded, OpCancelled, OutOfDeviceMemory
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import Side, in_order, pattern, slow

pytestmark = pytest.mark.timeout(60)

NBYTES = 4 << 20
SEEDS = range(14)


@pytest.fixture
def slow_way(server: RunningServer) -> Iterator[CuttingProxy]:
    """60 MB/s: a payload of 4 MiB is under way for 0.07 s."""
    with CuttingProxy(server.host, server.port, bandwidth=60e6) as proxy:
        yield proxy


def url(proxy: CuttingProxy) -> str:
    return f"gpu://{proxy.host}:{proxy.port}"


def free(memory: bytearray) -> bool:
    """Whether nobody holds it any more."""
    try:
        memory.append(0)
    except BufferError:
        return False
    memory.pop()
    return True


async def settled(task: asyncio.Future[Any]) -> bool:
    """Wait for the end of a task; whether it came to its result before it was cancelled."""
    await asyncio.wait([task])
    return not task.cancelled()


def in_time(call: Callable[[], object]) -> bool:
    """Whether the call ends before its deadline. Nothing of its error is left on return."""
    try:
        call()
    except DeadlineExceeded:
        pass
    else:
        return True
    gc.collect()  # asyncio's run_until_complete() holds the error in a circle, and it the frames
    return False


# -- asyncio: cancelled at any moment -------------------------------------------------------------


async def test_gets_that_are_cancelled(slow_way: CuttingProxy) -> None:
    """Before anything is sent, while the bytes come, and a moment too late."""
    async with gpuremote.connect(url(slow_way)) as session:
        data = pattern(NBYTES)
        array = await session.devices[0].put(data)
        small = session.devices[0].zeros(4)
        cancelled = 0
        for seed in SEEDS:
            memory = bytearray(NBYTES)
            task = asyncio.ensure_future(array.get(out=memory))
            if seed:
                await asyncio.sleep(random.Random(seed).random() * 0.09)
            task.cancel()
            came = await settled(task)
            del task
            if not came:
                cancelled += 1
                assert free(memory)
                before = bytes(memory)
                small += 1
                await small.get()
                assert bytes(memory) == before
            else:
                assert bytes(memory) == data.tobytes()
        assert cancelled > len(SEEDS) // 3
        got = await array.get()
        assert np.array_equal(got, data)
        assert (await small.get()).tolist() == [cancelled] * 4
        assert (await session.server_stats())["results_kept"] <= 1


async def test_puts_that_are_cancelled(slow_way: CuttingProxy) -> None:
    async with gpuremote.connect(url(slow_way)) as session:
        device = session.devices[0]
        counter = device.zeros(4)
        await counter.get()
        used = (await session.server_stats())["memory_used"]
        cancelled = 0
        for seed in SEEDS:
            memory = bytearray(pattern(NBYTES, seed).tobytes())
            counter += 1
            task = asyncio.ensure_future(device.put(memory))
            if seed:
                await asyncio.sleep(random.Random(seed).random() * 0.09)
            task.cancel()
            if await settled(task):
                got = await task.result().get()
                assert np.array_equal(got, pattern(NBYTES, seed))
            else:
                cancelled += 1
                assert free(memory)
                memory[:] = bytes(NBYTES)
                await counter.get()
            del task
        assert cancelled > len(SEEDS) // 3
        assert (await counter.get()).tolist() == [len(SEEDS)] * 4
        session.flush()
        await session.synchronize()
        facts = await session.server_stats()
        assert facts["memory_used"] == used
        assert facts["handles"] == 1
        # Nothing of what was taken back comes in the way of another one.
        again = await device.put(pattern(NBYTES, 77))
        assert np.array_equal(await again.get(), pattern(NBYTES, 77))


async def test_one_of_several_transfers_is_cancelled(slow_way: CuttingProxy) -> None:
    """The others are not disturbed, although the connection may have to be given up for it."""
    async with gpuremote.connect(url(slow_way)) as session:
        device = session.devices[0]
        data = [pattern(1 << 20, seed) for seed in range(6)]
        for victim in range(6):
            puts = [asyncio.ensure_future(device.put(part)) for part in data]
            await asyncio.sleep(0.03)
            puts[victim].cancel()
            arrays = await asyncio.gather(*puts, return_exceptions=True)
            assert sum(isinstance(array, BaseException) for array in arrays) <= 1
            gets = {
                k: asyncio.ensure_future(array.get())
                for k, array in enumerate(arrays)
                if not isinstance(array, BaseException)
            }
            await asyncio.sleep(0.03)
            last, get = gets.popitem()
            get.cancel()
            for k, wanted in gets.items():
                assert np.array_equal(await wanted, data[k])
            if await settled(get):
                assert np.array_equal(get.result(), data[last])


async def test_a_wait_for_a_long_op_is_cancelled(server: RunningServer) -> None:
    async with gpuremote.connect(server.url) as session:
        numbers = slow(session.devices[0], 4_000_000)
        await session.synchronize()
        ordered = in_order(numbers)
        out = np.zeros(4)
        for wait in (ordered[:4].get(out=out), session.synchronize(), ordered.wait()):
            task = asyncio.ensure_future(wait)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        first = await ordered[:4].get()
        assert np.all(first[:-1] <= first[1:])
        assert first[0] != 0
        assert not out.any()


async def test_iterating_over_results_is_left(server: RunningServer) -> None:
    async with gpuremote.connect(server.url) as session:
        device = session.devices[0]
        seen = 0
        results: Any = session.results(device.full(50_000, k) for k in range(20))
        async for values in results:
            assert values[0] == seen
            seen += 1
            if seen == 5:
                break
        await results.aclose()
        assert (await device.ones(2).get()).tolist() == [1, 1]
        await asyncio.sleep(0.1)
        assert session._core.waiting == 0


# -- deadlines, in both drivers -------------------------------------------------------------------


def test_gets_that_come_too_late(side: Side, slow_way: CuttingProxy) -> None:
    with side.session(url(slow_way)) as session:
        data = pattern(NBYTES)
        array = side.do(session.devices[0].put(data))
        counter = session.devices[0].zeros(4)
        late = 0
        for seed in SEEDS:
            memory = bytearray(NBYTES)
            timeout = random.Random(seed).random() * 0.08
            began = time.monotonic()
            came = in_time(lambda: side.do(array.get(out=memory, timeout=timeout)))  # noqa: B023
            if not came:
                late += 1
                assert time.monotonic() - began < timeout + 10  # it does not hang
                assert free(memory)
                before = bytes(memory)
                counter += 1
                side.do(counter.get())
                assert bytes(memory) == before
            else:
                assert bytes(memory) == data.tobytes()
        assert late > len(SEEDS) // 3
        assert side.do(counter.get()).tolist() == [late] * 4
        assert np.array_equal(side.do(array.get()), data)


def test_puts_that_take_too_long(side: Side, slow_way: CuttingProxy) -> None:
    with side.session(url(slow_way)) as session:
        device = session.devices[0]
        counter = device.zeros(4)
        side.do(counter.get())
        used = side.do(session.server_stats())["memory_used"]
        late = 0
        for seed in SEEDS:
            memory = bytearray(pattern(NBYTES, seed).tobytes())
            counter += 1
            timeout = random.Random(seed).random() * 0.08
            put: list[Any] = []
            if in_time(lambda: put.append(side.do(device.put(memory, timeout=timeout)))):  # noqa: B023
                assert np.array_equal(side.do(put.pop().get()), pattern(NBYTES, seed))
            else:
                late += 1
                assert free(memory)
                memory[:] = bytes(NBYTES)
                side.do(counter.get())
        assert late > len(SEEDS) // 3
        assert side.do(counter.get()).tolist() == [len(SEEDS)] * 4
        session.flush()
        side.do(session.synchronize())
        facts = side.do(session.server_stats())
        assert (facts["memory_used"], facts["handles"]) == (used, 1)


def test_every_call_with_a_timeout_keeps_it(side: Side, server: RunningServer) -> None:
    """The server stands still; each call raises in time, and then the session goes on."""
    with side.session(server.url) as session:
        device = session.devices[0]
        x = device.arange(50_000)
        event = device.stream().record()
        side.do(session.synchronize())
        os.kill(session.worker_pid, signal.SIGSTOP)
        try:
            calls: list[Callable[[], Any]] = [
                lambda: x.get(timeout=0.1),
                lambda: x[:3].get(timeout=0.1),
                lambda: x[0].item(timeout=0.1),
                lambda: x.wait(timeout=0.1),
                lambda: session.synchronize(timeout=0.1),
                lambda: device.synchronize(timeout=0.1),
                lambda: event.synchronize(timeout=0.1),
                lambda: session.get_many([x, x], timeout=0.1),
                lambda: device.put(pattern(100_000), timeout=0.1),
                lambda: device.put_many([pattern(100_000)] * 3, timeout=0.1),
            ]
            for call in calls:
                began = time.monotonic()
                with pytest.raises(DeadlineExceeded, match="within"):
                    side.do(call())
                assert time.monotonic() - began < 1.5
        finally:
            os.kill(session.worker_pid, signal.SIGCONT)
        assert np.array_equal(side.do(x.get()), np.arange(50_000))
        finish(session._core, lambda: side.do(session.synchronize()))


def test_what_was_to_use_a_cancelled_upload_fails(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        side.do(session.synchronize())
        os.kill(session.worker_pid, signal.SIGSTOP)
        uploads: list[Any] = []
        original = device._array_type

        def remember(*arguments: Any) -> Any:
            uploads.append(original(*arguments))
            return uploads[-1]

        device._array_type = remember
        try:
            with pytest.raises(DeadlineExceeded):
                side.do(device.put(pattern(20 << 20), timeout=0.2))
            derived = uploads[0] + 1
        finally:
            os.kill(session.worker_pid, signal.SIGCONT)
        with pytest.raises(OpCancelled):
            side.do(derived.get())
        side.do(session.synchronize())


def test_an_error_holds_no_buffer(server: RunningServer) -> None:
    """Not even until the next garbage collection: it may be gigabytes."""
    memory = bytearray(64 << 20)
    with gpuremote.connect_sync(server.url) as session:
        array = session.devices[0].zeros(len(memory), np.uint8)
        missing = session.devices[0].empty(1 << 50, np.uint8)[: len(memory)]
        array.wait()
        gc.disable()
        try:
            for call in (
                lambda: array.get(out=memory, timeout=0.0),
                lambda: missing.get(out=memory),
                lambda: session.devices[0].put(memory, timeout=0.0),
            ):
                assert failed(call)
                assert free(memory)
        finally:
            gc.enable()


async def test_an_error_holds_no_buffer_in_asyncio(server: RunningServer) -> None:
    memory = bytearray(64 << 20)
    async with gpuremote.connect(server.url) as session:
        array = session.devices[0].zeros(len(memory), np.uint8)
        missing = session.devices[0].empty(1 << 50, np.uint8)[: len(memory)]
        await array.wait()
        gc.disable()
        try:
            for make in (
                lambda: array.get(out=memory, timeout=0.0),
                lambda: missing.get(out=memory),
                lambda: session.devices[0].put(memory, timeout=0.0),
            ):
                try:
                    await make()
                except (DeadlineExceeded, OutOfDeviceMemory):
                    pass
                else:
                    raise AssertionError("no error")
                assert free(memory)
        finally:
            gc.enable()


def finish(core: Core, call: Callable[[], object]) -> None:
    """What is still to come of answers that nobody wants comes, and then nothing is kept."""
    deadline = time.monotonic() + 10
    while core.waiting:
        assert time.monotonic() < deadline, f"{core.waiting} waits are kept"
        call()


def failed(call: Callable[[], object]) -> bool:
    try:
        call()
    except (DeadlineExceeded, OutOfDeviceMemory):
        return True
    return False


# -- Ctrl-C ---------------------------------------------------------------------------------------


CTRL_C = """
    import os, random, signal, sys, threading, time
    import numpy as np
    import gpuremote

    what, url, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    session = gpuremote.connect_sync(url)
    device = session.devices[0]
    counter = device.zeros(4)
    long = device.random_uniform(3_000_000, 1)
    large, small = device.arange(500_000), device.arange(100)
    out, host = np.zeros(500_000, np.int64), np.arange(500_000)
    session.synchronize()

    def interrupt():
        time.sleep(0.001 + 0.01 * random.random())
        os.kill(os.getpid(), signal.SIGINT)

    for k in range(rounds):
        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            while True:
                if what == "op":
                    np.sort(long).get()
                elif what == "get":
                    large.get(out=out)
                elif what == "small get":
                    small.get()
                elif what == "put":
                    device.put(host)
                elif what == "ops":
                    counter += 0
        except KeyboardInterrupt:
            pass
        thread.join()
        counter += 1
        copy = out.copy()
        assert counter.get(timeout=20).tolist() == [k + 1] * 4
        assert np.array_equal(out, copy)
    assert np.array_equal(large.get(), host)
    session.close()
    assert session._core.waiting == 0
    print("done")
"""


@pytest.mark.parametrize(
    ("what", "rounds", "query"),
    [
        ("op", 4, ""),
        ("get", 40, ""),
        ("get", 80, "?transport=tcp"),
        ("small get", 40, ""),
        ("put", 40, ""),
        ("put", 40, "?transport=tcp"),
        ("ops", 40, ""),
    ],
)
def test_ctrl_c_in_a_blocking_session(
    server: RunningServer, what: str, rounds: int, query: str
) -> None:
    """KeyboardInterrupt comes out of the call, wherever that is, and the session is as good as
    before: nothing is lost, applied twice, or written to later."""
    program = [sys.executable, "-c", textwrap.dedent(CTRL_C), what, server.url + query, str(rounds)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=50)
    assert ended.stdout == "done\n", ended.stderr


# -- threads --------------------------------------------------------------------------------------


def test_a_timeout_in_one_thread_leaves_the_others_alone(slow_way: CuttingProxy) -> None:
    """One connection for all: breaking it off for one of them must not show elsewhere."""
    with gpuremote.connect_sync(url(slow_way)) as session:
        data = pattern(NBYTES)
        array = session.devices[0].put(data)
        wrong: list[object] = []

        def impatient() -> None:
            for seed in range(8):
                memory = bytearray(NBYTES)
                if not in_time(lambda: array.get(out=memory, timeout=0.01 + 0.01 * seed)):  # noqa: B023
                    if not free(memory):
                        wrong.append("held")
                    before = bytes(memory)
                    time.sleep(0.02)
                    if bytes(memory) != before:
                        wrong.append("written to")

        def patient() -> None:
            got = [array.get() for _ in range(3)]
            wrong.extend("other values" for values in got if not np.array_equal(values, data))

        threads = [threading.Thread(target=f) for f in (impatient, patient, impatient, patient)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not wrong
        finish(session._core, lambda: array[:3].get())
