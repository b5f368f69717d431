"""Several devices, sessions and servers in one process; forks; iterating over results."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import OpFailed, SessionLost
from gpuremote.testing.servers import RunningServer, device_server
from tests.faults.processes import gone
from tests.faults.sides import AsyncSide, Side


def everything(side: Side, results: Any) -> list[Any]:
    """What iterating over results gives."""
    if not isinstance(side, AsyncSide):
        return list(results)

    async def collect() -> list[Any]:
        return [item async for item in results]

    found: list[Any] = side.do(collect())
    return found


def test_devices_are_apart(side: Side, session: Any) -> None:
    first, second = session.devices
    assert first is not second
    assert (first.index, second.index) == (0, 1)
    assert (first.kind, second.kind) == ("cpu", "cpu")
    assert first.name != second.name
    assert first.memory_bytes > 0
    x, y = first.arange(4), second.arange(4) * 10
    assert (x.device, y.device) == (first, second)
    assert (x + 1).device is first
    assert y[1:].sum().device is second
    a, b = side.do(session.get_many([x + x, y + y]))
    assert (a.tolist(), b.tolist()) == ([0, 2, 4, 6], [0, 20, 40, 60])


def test_many_sessions_side_by_side(side: Side, server: RunningServer) -> None:
    """Work for each of them, mixed: none sees what another one has."""
    with ExitStack() as stack:
        sessions = [stack.enter_context(side.session(server.url)) for _ in range(4)]
        assert len({session.worker_pid for session in sessions}) == 4
        arrays = [session.devices[0].full(5, k) for k, session in enumerate(sessions)]
        for _ in range(50):
            for k, session in enumerate(sessions):
                with session.devices[0].stream() if k == 1 else ExitStack():
                    arrays[k] = arrays[k] * 2 - k
        for k, array in enumerate(arrays):
            assert side.do(array.tolist()) == [k] * 5
        bad = sessions[0].devices[0].arange(3) ** -1
        side.do(sessions[1].synchronize())
        with pytest.raises(OpFailed):
            side.do(bad.get())
        side.do(sessions[2].close())
        assert side.do((arrays[3] + 1).tolist()) == [4] * 5


def test_several_servers(side: Side, server: RunningServer) -> None:
    with (
        device_server("--warm", "1") as other,
        side.session(other.url) as far,
        side.session(server.url) as near,
    ):
        assert far.worker_pid != near.worker_pid
        x, y = far.devices[0].arange(3), near.devices[0].arange(3) + 5
        assert side.do((x * 2).tolist()) == [0, 2, 4]
        assert side.do(y.tolist()) == [5, 6, 7]
        assert str(far.devices[0]) != str(near.devices[0])
        assert far.transport.name == near.transport.name


def test_both_kinds_of_session_in_one_process(server: RunningServer) -> None:
    """A blocking session inside of a program with a loop, and the loop goes on afterwards."""

    async def program() -> list[int]:
        async with gpuremote.connect(server.url) as session:
            x = session.devices[0].arange(3)

            def other() -> Any:
                with gpuremote.connect_sync(server.url) as blocking:
                    return blocking.devices[0].arange(4).sum().item()

            total, values = await asyncio.gather(asyncio.to_thread(other), (x + 1).get())
            return [total, *values.tolist()]

    assert asyncio.run(program()) == [6, 1, 2, 3]


def test_loops_one_after_another(server: RunningServer) -> None:
    """Nothing is left in one loop that would be missed in the next."""

    async def program() -> Any:
        async with gpuremote.connect(server.url) as session:
            return await session.devices[0].ones(3).sum().item()

    for _ in range(3):
        assert asyncio.run(program()) == 3


def test_a_session_that_is_forgotten_warns(server: RunningServer) -> None:
    """As files and sockets do; one that was closed does not."""
    for close in (True, False):
        session = gpuremote.connect_sync(server.url)
        assert session.devices[0].arange(3).tolist() == [0, 1, 2]
        if close:
            session.close()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del session
            gc.collect()
        texts = [str(warning.message) for warning in caught if "<Session" in str(warning.message)]
        assert len(texts) == (0 if close else 1)
        assert all("unclosed" in text for text in texts)


# -- forks --------------------------------------------------------------------------------------

FORK = """
import os, sys, time
import numpy as np
import gpuremote
from gpuremote.errors import SessionLost

session = gpuremote.connect_sync(sys.argv[1])
device = session.devices[0]
x = device.put(np.arange(100_000))
y = x + 1                       # lies in the buffer, unsent
pid = os.fork()
if pid == 0:
    refused = 0
    for use in (x.get, y.get, lambda: x + 1, lambda: device.zeros(3), session.synchronize,
                lambda: device.put(np.zeros(100_000)), device.stream):
        try:
            use()
        except SessionLost as error:
            refused += "forked" in str(error)
    del x, y
    begun = time.monotonic()
    session.close()
    assert time.monotonic() - begun < 2
    with gpuremote.connect_sync(sys.argv[1]) as own:    # a session of its own works
        assert own.devices[0].arange(3).tolist() == [0, 1, 2]
    os._exit(refused)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert y.get()[-1] == 100_000
assert (x * 2).sum().item() == 100_000 * 99_999
session.close()
print(status)
"""


def test_a_forked_child_cannot_use_the_session(server: RunningServer) -> None:
    """Refused there, whatever it tries; harmless for the parent."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, server.url],
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "7\n"


async def test_a_fork_in_a_loop(server: RunningServer) -> None:
    """As multiprocessing does it; the child only looks and ends."""
    async with gpuremote.connect(server.url) as session:
        x = session.devices[0].arange(3)
        await x.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads
            pid = os.fork()
        if pid == 0:
            try:
                x + 1
            except SessionLost:
                os._exit(7)
            finally:
                os._exit(1)
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        assert (await (x + 1).get()).tolist() == [1, 2, 3]


# -- iterating ----------------------------------------------------------------------------------


def test_results_in_order(side: Side, session: Any) -> None:
    device = session.devices[0]
    for count, ahead in ((0, 4), (1, 4), (25, 1), (25, 4), (3, 100)):
        arrays = [device.full(k + 1, k) for k in range(count)]
        got = everything(side, session.results(arrays, ahead=ahead))
        assert [host.tolist() for host in got] == [[k] * (k + 1) for k in range(count)]
    large = [device.full(300_000, k) for k in range(6)]
    got = everything(side, session.results(large))
    assert [int(host[-1]) for host in got] == list(range(6))
    got[0][:] = 9
    assert got[1].max() == 1


def test_results_ask_ahead_of_a_generator(side: Side, session: Any) -> None:
    """The ops are issued as it goes, so many ahead of what the program has taken."""
    device = session.devices[0]
    issued: list[int] = []

    def steps() -> Iterator[Any]:
        x = device.zeros(10)
        for k in range(10):
            x = x + 1
            issued.append(k)
            yield x

    before = session.stats().round_trips["results"]
    seen = []
    results = session.results(steps(), ahead=3)
    if isinstance(side, AsyncSide):

        async def collect() -> None:
            async for host in results:
                seen.append((int(host[0]), len(issued)))

        side.do(collect())
    else:
        seen += [(int(host[0]), len(issued)) for host in results]
    assert [value for value, _ in seen] == list(range(1, 11))
    assert [ahead for _, ahead in seen] == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    assert session.stats().round_trips["results"] - before == 10


def test_results_up_to_a_failure(side: Side, session: Any) -> None:
    device = session.devices[0]
    good, bad = device.arange(3), device.arange(3) ** -1
    seen: list[Any] = []

    def blocking() -> None:
        seen.extend(session.results([good, good, bad, good]))

    async def loop() -> None:
        seen.extend([host async for host in session.results([good, good, bad, good])])

    with pytest.raises(OpFailed, match="negative integer"):
        side.do(loop()) if isinstance(side, AsyncSide) else blocking()
    side.do(session.synchronize())
    assert side.do(good.tolist()) == [0, 1, 2]


def test_results_that_are_left(side: Side, session: Any) -> None:
    """What was asked for ahead is dropped, and the session goes on."""
    device = session.devices[0]

    def many() -> Iterator[Any]:
        for k in range(100):
            yield device.full(200_000, k)

    if isinstance(side, AsyncSide):

        async def loop() -> float:
            results: AsyncIterator[Any] = session.results(many(), ahead=8)
            async for host in results:
                if host[0] == 3:
                    break
            await results.aclose()  # type: ignore[attr-defined]
            return float(host[0])

        assert side.do(loop()) == 3
    else:
        for host in session.results(many(), ahead=8):
            if host[0] == 3:
                break
    assert side.do(device.full(3, 5).tolist()) == [5, 5, 5]
    side.do(session.synchronize())


def test_local_sessions_share_a_server() -> None:
    """With nothing configured: a child that ends with the last of them."""
    with gpuremote.connect_sync("local://?devices=3") as session:
        assert len(session.devices) == 3
        x = session.devices[2].arange(5)
        with gpuremote.connect_sync("local://?devices=3") as other:
            assert str(other.devices[0]) == str(session.devices[0])
            y = other.devices[1].ones(5).copy_to(session.devices[2])
            assert (x + y).tolist() == [1, 2, 3, 4, 5]
        assert np.array_equal((x * 2).get(), np.arange(5) * 2)
        pid = session.worker_pid
    assert gone(pid)
