"""Programs that run long: nothing grows that should not."""

from __future__ import annotations

import gc
import os
import tracemalloc
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.wire import caps
from tests.faults.processes import resident
from tests.faults.sides import AsyncSide, Side

MiB: Final = 1 << 20
OPS: Final = 100_000


def counted(side: Side, session: Any) -> dict[str, Any]:
    """The server's counters when nothing is under way."""
    gc.collect()
    side.do(session.synchronize())
    found: dict[str, Any] = side.do(session.server_stats())
    return found


def test_a_hundred_thousand_ops(side: Side, session: Any, device: Any) -> None:
    """Results are dropped as the program goes, without a wait; both sides stay as they were."""
    x, one = device.zeros((4, 4)), device.ones((4, 4))

    def run(ops: int) -> None:
        nonlocal x
        for k in range(ops // 5):
            y = x + one
            z = y * 0.5
            x = z - one[0]
            x += k

    run(5_000)
    before = counted(side, session)
    here, there = resident_here(), resident(session.worker_pid)
    tracemalloc.start()
    try:
        traced = tracemalloc.get_traced_memory()[0]
        run(20_000)
        held = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    # What is on its way, with where each op was issued: a bounded number of them.
    assert held < 24 * MiB
    high = 0
    for _ in range(8):
        run(OPS // 10)
        high = max(high, side.do(session.server_stats())["handles"])
    after = counted(side, session)
    assert after["ops"] - before["ops"] == OPS // 10 * 8 + 20_000
    assert after["handles"] == before["handles"]
    assert after["memory_used"] == before["memory_used"]
    assert after["plans"] == before["plans"]
    assert after["results_kept"] <= 2
    assert high < 150_000
    assert resident_here() - here < 48 * MiB
    assert resident(session.worker_pid) - there < 96 * MiB
    core = session._core
    # It is told of them in bunches of so many message bytes.
    assert sum(len(origins) for _, origins in core._kept) < caps.ACK_BYTES // 16
    assert len(core._waits) == len(core._linked) == 0
    assert np.isfinite(side.do(x.get())).all()


def resident_here() -> int:
    return resident(os.getpid())


def test_ten_thousand_round_trips(side: Side, session: Any, device: Any) -> None:
    x = side.do(device.put(np.arange(8)))
    for _ in range(200):
        x = side.do(device.put(side.do((x + 1).get())))
    before = counted(side, session)
    here, there = resident_here(), resident(session.worker_pid)

    async def loop(count: int) -> None:
        nonlocal x
        for _ in range(count):
            x = await device.put(await (x + 1).get())

    for _ in range(2 if isinstance(side, AsyncSide) else 2500):
        if isinstance(side, AsyncSide):
            side.do(loop(1250))
        else:
            x = device.put((x + 1).get())
    after = counted(side, session)
    assert side.do(x[0].item()) == 200 + 2500
    assert after["handles"] == before["handles"]
    assert after["memory_used"] == before["memory_used"]
    assert resident_here() - here < 8 * MiB
    assert resident(session.worker_pid) - there < 8 * MiB


def test_large_arrays_come_and_go(side: Side, session: Any, device: Any) -> None:
    host = np.ones(3 * MiB)

    def several() -> None:
        for k in range(12):
            x = side.do(device.put(host[: (3 * MiB >> (k % 3))]))
            y = np.sqrt(x * 4)
            assert side.do(y.get())[-1] == 2
            del x, y

    several()
    gc.collect()
    # What was freed the worker keeps for the next results, see test_worker_memory.py.
    there, here = resident(session.worker_pid), resident_here()
    several()
    assert resident(session.worker_pid) - there < 80 * MiB
    assert resident_here() - here < 40 * MiB


def test_streams_and_failures_do_not_pile_up(side: Side, session: Any, device: Any) -> None:
    x = device.arange(4)
    before = counted(side, session)
    for _ in range(300):
        with device.stream() as stream:
            x**-1
            stream.wait(stream.record())
        del stream
    with pytest.raises(RuntimeError, match="negative integer"):
        counted(side, session)
    after = counted(side, session)
    assert after["handles"] == before["handles"]
    assert after["memory_used"] == before["memory_used"]
    assert after["streams"] == before["streams"]
    assert not session._core._failures


@pytest.mark.timeout(120)
def test_more_shapes_than_plans_are_kept(side: Side, session: Any, device: Any) -> None:
    """Every shape needs a plan of its own; old ones make room, on both sides at once."""
    long = device.ones(40_000, "u1")
    before = session.stats().plans
    picked = {}
    for n in range(1, caps.MAX_PLANS + 1500):
        part = long[:n] + 1
        if n % 1500 == 0:
            picked[n] = part.sum()
    there = counted(side, session)
    assert 0 < there["plans"] <= caps.MAX_PLANS
    assert session.stats().plans - before > caps.MAX_PLANS
    for n, total in picked.items():
        assert side.do(total.item()) == 2 * n
    assert side.do((long[:77] + 1).tolist()) == [2] * 77
    assert len(session._core.plans) <= caps.MAX_PLANS


def test_a_small_plan_cache(side: Side, fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thrown away again and again in the middle of everything."""
    monkeypatch.setattr(caps, "MAX_PLANS", 5)
    device = fresh.devices[0]
    x = device.arange(30)
    expected = np.arange(30)
    for k in range(1, 60):
        n = 1 + k % 20
        x[:n] += 1
        expected[:n] += 1
        x = x + x[: 1 + k % 2].sum() * 0
        x = np.maximum(x, 0)
    assert side.do(x.tolist()) == expected.tolist()
    assert fresh.stats().plans > 100
    assert side.do(fresh.server_stats())["plans"] <= 5
