"""Memory that ops take while they run is within bounds too, as the kernel sees the worker."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.client import issue
from gpuremote.errors import OpFailed, OutOfDeviceMemory, ShapeError
from gpuremote.ops.catalogue import CATALOGUE, find
from gpuremote.ops.scratch import FREE, SCRATCH
from gpuremote.server.execute import _stays
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import Side
from tests.session.comparing import case, same

MiB: Final = 1 << 20
LIMIT: Final = 4 * MiB
MOST: Final = (1 + FREE) * LIMIT + 16 * MiB
"""What a worker's memory may grow by: operands, results and as much as is free beside them; and
what an interpreter and libraries take when they do something for the first time."""


@pytest.fixture(scope="module")
def session(side: Side, server: RunningServer) -> Iterator[Any]:
    opened = side.do(side.connect(f"{server.url}?memory=4MiB"))
    try:
        yield opened
    finally:
        side.do(opened.close())


def resident(session: Any) -> int:
    """Most memory that the worker has had, in bytes."""
    lines = Path(f"/proc/{session.worker_pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def used(session: Any, side: Side) -> int:
    gc.collect()
    side.do(session.synchronize())
    found: int = side.do(session.server_stats())["memory_used"]
    return found


def op(name: str, *operands: Any, **params: Any) -> Any:
    """The first result of an op of the catalogue."""
    return issue.apply(find(name), operands, params)[0]


def wide(device: Any) -> Any:
    """512 MiB in two elements."""
    return np.broadcast_to(device.zeros(2), (1 << 25, 2))


def flags(device: Any) -> Any:
    return device.zeros(1 << 20, "u1")


REFUSED: list[tuple[str, Callable[[Any], Any]]] = [
    ("histogramdd", lambda d: op("histogramdd", d.zeros((1, 16)), bins=(1,) * 16)),
    ("histogramdd", lambda d: op("histogramdd", d.zeros((1, 63)), bins=(1,) * 63)),
    ("reshape", lambda d: wide(d).reshape(-1)),
    ("reshape", lambda d: wide(d).T.reshape(-1)),
    ("take", lambda d: op("take", wide(d), d.zeros(1, "i8"), axis=0)),
    ("argmax", lambda d: wide(d).argmax()),
    ("var", lambda d: wide(d).var()),
    ("median", lambda d: op("median", wide(d))),
    ("histogram", lambda d: op("histogram", wide(d), bins=3)),
    ("resize", lambda d: op("resize", wide(d), new_shape=(4,))),
    ("fft.fftn", lambda d: op("fft.fftn", d.zeros((256, 256)), s=(1, 1 << 17), axes=(0, 1))),
    (
        "solve",
        lambda d: op("solve", d.zeros((256, 256), "f4"), d.zeros((1 << 10, 256, 1), "f4")),
    ),
    ("interp", lambda d: op("interp", d.zeros(1), flags(d), flags(d))),
    ("norm", lambda d: op("norm", d.zeros(3 * MiB, "u1"))),
    (
        "getitem_mask",
        lambda d: op(
            "getitem_mask",
            d.zeros((MiB,) + (1,) * 32, "u1"),
            d.ones((MiB,) + (1,) * 31, "?"),
            index=("m",),
        ),
    ),
]


def test_refused_before_anything_is_allocated(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    side.do(device.arange(8).sum().get())
    high = resident(session)
    for name, make in REFUSED:
        with case(name):
            result = make(device)
            with pytest.raises(OutOfDeviceMemory) as caught:
                side.do(result.wait())
            assert caught.value.op == name
            del result, caught
            assert used(session, side) == held
    assert side.do(session.server_stats())["memory_peak"] <= LIMIT
    assert resident(session) < high + MOST


def test_more_to_count_than_was_declared(side: Side, session: Any) -> None:
    """Where it would end is looked at before the count is made."""
    device = session.devices[0]
    held = used(session, side)
    high = resident(session)
    for last, step in ((1 << 26, 512), (1 << 41, 1 << 40)):
        numbers = device.arange(0, last, step)
        result = op("bincount", numbers, minlength=1)
        with pytest.raises(ShapeError, match="to be counted up to 1"):
            side.do(result.wait())
        del numbers, result
    few = op("bincount", device.arange(3, dtype="u1"), minlength=5)
    assert side.do(few.tolist()) == [1, 1, 1, 0, 0]
    with pytest.raises(OpFailed, match="negative"):
        side.do(op("bincount", device.arange(3) - 1, minlength=5).wait())
    with pytest.raises(ShapeError):
        side.do(op("bincount", device.zeros(1, "i8"), minlength=0).wait())
    assert side.do(op("bincount", device.zeros(0, "i8"), minlength=0).tolist()) == []
    del few
    assert used(session, side) == held
    assert resident(session) < high + MOST


def test_views_of_what_is_not_in_order_take_nothing(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    x = device.arange(LIMIT // 8 - 64)
    assert wide(device).reshape(1 << 20, 1 << 5, 2, 1).shape == (1 << 20, 1 << 5, 2, 1)
    for view in (x[::2].reshape(2, -1), x.reshape(4, -1).T.reshape(-1, 2, 4)):
        assert side.do(view.wait()) is not None
        assert side.do(session.server_stats())["memory_used"] <= held + LIMIT
    assert side.do(x[::2].reshape(2, -1)[1, :1].tolist()) == [(LIMIT // 8 - 64) // 2]
    copied = x.reshape(4, -1).T.reshape(-1)
    with pytest.raises(OutOfDeviceMemory):
        side.do(copied.wait())
    # What needs no copy of what is spread out, and what leaves enough beside it.
    assert side.do(wide(device)[:1024].sum().item()) == 0
    assert side.do(np.broadcast_to(x[:8], (4096, 8)).max().item()) == 7
    del x, view, copied
    assert used(session, side) == held


def test_resize(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    high = resident(session)
    large = op("resize", device.ones(1, "u1"), new_shape=(3 * MiB,))
    assert side.do(large.sum().item()) == 3 * MiB
    assert resident(session) < high + MOST
    del large
    for shape in ((3,), (2, 3), (), (0,)):
        values = np.arange(int(np.prod(shape))).reshape(shape)
        remote = device.arange(values.size).reshape(shape)
        for new in ((0,), (), (1,), (2,), (6,), (3, 7), (2, 0), (5, 5, 5)):
            with case(f"{shape} {new}"):
                same(side, op("resize", remote, new_shape=new), np.resize(values, new))
        del remote
    turned = op("resize", device.arange(6).reshape(2, 3).T, new_shape=(8,))
    assert side.do(turned.tolist()) == [0, 3, 1, 4, 2, 5, 0, 3]
    del turned
    assert used(session, side) == held


def test_reshapes_that_stay_are_those_of_numpy() -> None:
    chance = np.random.default_rng(5)
    stayed = 0
    for _ in range(2000):
        shape = tuple(chance.choice([1, 2, 3, 4, 6], chance.integers(1, 5)).tolist())
        x = np.zeros(tuple(2 * n for n in shape), "u1")
        x = x[tuple(slice(0, n) if chance.random() < 0.5 else slice(0, 2 * n, 2) for n in shape)]
        x = x.transpose(chance.permutation(x.ndim))
        if chance.random() < 0.3:
            x = np.broadcast_to(x, (int(chance.integers(1, 4)), *x.shape))
        factors = [f for n in x.shape for f in _PRIMES[n]]
        chance.shuffle(factors)
        cuts = sorted(chance.integers(0, len(factors) + 1, 2).tolist())
        parts = (factors[: cuts[0]], factors[cuts[0] : cuts[1]], factors[cuts[1] :])
        wanted = tuple(int(np.prod(part)) for part in parts)
        stays = bool(np.shares_memory(x, x.reshape(wanted)))
        assert _stays(x, wanted) == stays, (x.shape, x.strides, wanted)
        stayed += stays
    assert 200 < stayed < 1800


_PRIMES: Final = {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}


def test_rules_are_for_ops_that_there_are() -> None:
    assert SCRATCH.keys() <= CATALOGUE.keys()
