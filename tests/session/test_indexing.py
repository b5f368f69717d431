"""Indexing, assignment, views: what NumPy does, and who sees what through which name."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import (
    DeviceMismatch,
    DTypeError,
    ImplicitTransfer,
    IndexOutOfBounds,
    InvalidBuffer,
    OpFailed,
    ShapeError,
)
from tests.faults.sides import AsyncSide, Side
from tests.session.comparing import Pair, case, numbers, same

BASIC: list[Any] = [
    0,
    -1,
    np.int64(2),
    np.uint8(1),
    slice(None),
    slice(1, 3),
    slice(None, None, -1),
    slice(-1, None, -2),
    slice(3, 0, -1),
    slice(2, 100),
    slice(-100, 2),
    slice(3, 1),
    slice(np.int32(1), np.int32(3)),
    slice(0, 1 << 70),
    ...,
    None,
    (),
    (1, 2, 3),
    (1, ..., -1),
    (..., None),
    (None, 1, None, slice(None, None, 2)),
    (slice(None), -1),
    (slice(1, None, 2), slice(None, None, -1), 0),
    (..., slice(1, 3)),
    (0, slice(0, 0)),
]
ADVANCED: list[Any] = [
    [0, 2],
    [[0, 1], [2, -1]],
    np.array([3, 0, 0, -4]),
    np.array([], np.int64),
    [],
    np.array([1, 2], np.uint8),
    np.array(2),
    ([0, 1], [1, 2]),
    ([0, 1], 1),
    (1, [0, 1]),
    (slice(None), [0, 2], [1, 1]),
    ([0, 1], slice(None), [1, 2]),
    (..., [0, -1]),
    (None, [0, 1], ..., 0),
    (np.array([[0], [1]]), np.array([0, 2])),
    (slice(None, None, -1), [2, 0], slice(1, 3)),
]


def cube() -> Any:
    return np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)


def test_basic(side: Side, device: Any) -> None:
    pair = Pair(side, device, cube())
    for index in BASIC:
        with case(index):
            pair.check(itemgetter(index))
    Pair(side, device, 7).check(lambda x: x[()])
    Pair(side, device, 7).check(lambda x: x[..., None])


def test_arrays_of_integers(side: Side, device: Any) -> None:
    pair = Pair(side, device, cube())
    for index in ADVANCED:
        with case(index):
            pair.check(itemgetter(index))
            assert pair.remote[index] is not pair.remote


def test_remote_arrays_as_indices(side: Side, device: Any) -> None:
    pair = Pair(side, device, cube())
    rows, columns = np.array([[3], [0]]), np.array([0, -1], np.int32)
    r, c = side.do(device.put(rows)), side.do(device.put(columns))
    same(side, pair.remote[r], pair.host[rows])
    same(side, pair.remote[:, c], pair.host[:, [0, -1]])
    same(side, pair.remote[r, c], pair.host[rows, columns])
    same(side, pair.remote[device.full((), 2, np.int64)], pair.host[2])
    same(side, pair.remote[(pair.remote[:, 0, 0] * 0).astype(int)], pair.host[[0, 0, 0, 0]])


def masked(side: Side, array: Any, mask: Any) -> Any:
    """``array[mask]``, whose shape is waited for."""
    if isinstance(side, AsyncSide):
        return side.do(array.compress(mask))
    return array[mask]


def test_masks(side: Side, session: Any, device: Any) -> None:
    pair = Pair(side, device, cube())
    before = session.stats().round_trips["shape"]
    same(side, masked(side, pair.remote, pair.remote > 30), pair.host[pair.host > 30])
    same(side, masked(side, pair.remote, pair.remote > 1e6), pair.host[pair.host > 1e6])
    rows = pair.remote[:, 0, 0] > 20
    same(side, masked(side, pair.remote, rows), pair.host[pair.host[:, 0, 0] > 20])
    found = masked(side, pair.remote, rows)
    assert session.stats().round_trips["shape"] - before >= 4  # the price, and it is counted
    found += 1  # a copy
    pair.equal()
    if isinstance(side, AsyncSide):
        with pytest.raises(ImplicitTransfer, match="compress"):
            pair.remote[rows]
    else:
        pair.check(lambda x: x[[True, False, False, True]])
        pair.check(lambda x: x[True])
        pair.check(lambda x: x[np.array([False, True, True]) if x.shape[0] == 3 else ...])
        same(side, pair.remote[rows, 1], pair.host[pair.host[:, 0, 0] > 20, 1])


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (4, IndexOutOfBounds),
        (-5, IndexOutOfBounds),
        (1 << 70, IndexOutOfBounds),
        ((0, 3), IndexOutOfBounds),
        ((0, 0, 0, 0), IndexOutOfBounds),
        ((..., ...), IndexOutOfBounds),
        (1.0, DTypeError),
        ("a", DTypeError),
        ([0.5], DTypeError),
        (slice(1.5), DTypeError),
        (slice(None, None, 0), ShapeError),
        (([0, 1], [0, 1, 2]), ShapeError),
        (([0, 1], 7), IndexOutOfBounds),
    ],
)
def test_bad_indices_are_refused_at_the_line(
    side: Side, device: Any, index: Any, error: type[Exception]
) -> None:
    """Nothing is sent, so nothing fails later and the array is not harmed."""
    pair = Pair(side, device, cube())
    with pytest.raises(error):
        pair.remote[index]
    with pytest.raises(error):
        pair.remote[index] = 1
    pair.equal()
    side.do(device.synchronize())


def test_values_out_of_bounds_are_found_there(side: Side, device: Any) -> None:
    x = device.arange(4)
    picked = x[[0, 4]]
    with pytest.raises(IndexError, match="out of bounds"):
        side.do(picked.get())
    assert side.do(x.tolist()) == [0, 1, 2, 3]


def test_a_large_index(side: Side, device: Any) -> None:
    """More than travels inside a batch: it has to be uploaded first where waiting is explicit."""
    pair = Pair(side, device, np.arange(10_000))
    index = np.arange(10_000)[::-3]
    if isinstance(side, AsyncSide):
        with pytest.raises(InvalidBuffer, match="put"):
            pair.remote[index]
    else:
        pair.check(lambda x: x[index])
    same(side, pair.remote[side.do(device.put(index))], pair.host[index])


def test_assignment(side: Side, device: Any) -> None:
    """Scalars, arrays that fit, arrays that are broadcast, and casts."""
    for index in (*BASIC, *ADVANCED):
        with case(index):
            pair = Pair(side, device, cube())
            pair.remote[index] = -1.5
            pair.host[index] = -1.5
            pair.equal()
            part = pair.host[index]
            value = Pair(side, device, numbers(part.shape, "int16", 5))
            pair.remote[index] = value.remote
            pair.host[index] = value.host
            pair.equal()
    pair = Pair(side, device, cube())
    line = Pair(side, device, numbers((1, 5), "float64"))
    pair.remote[1:, 1:] = line.remote
    pair.host[1:, 1:] = line.host
    pair.remote[...] = pair.remote[:, ::-1]  # reads and writes the same memory
    pair.host[...] = pair.host[:, ::-1]
    pair.remote[0] = np.float64(2.5)
    pair.host[0] = np.float64(2.5)
    pair.remote[1, 0] = np.array(7)
    pair.host[1, 0] = np.array(7)
    pair.equal()


def test_assignment_through_masks(side: Side, session: Any, device: Any) -> None:
    """Nothing of it has to be waited for."""
    pair = Pair(side, device, cube())
    trips = session.stats().round_trips.total()
    pair.remote[pair.remote > 20] = 0
    pair.remote[pair.remote[:, 0, 0] == 0] = 5
    pair.remote[[False, True, False, False]] = 9
    pair.remote[pair.remote == 9] = device.full(15, 3)
    assert session.stats().round_trips.total() == trips
    pair.host[pair.host > 20] = 0
    pair.host[pair.host[:, 0, 0] == 0] = 5
    pair.host[[False, True, False, False]] = 9
    pair.host[pair.host == 9] = np.full(15, 3)
    pair.equal()


def test_assignment_casts_as_numpy_does(side: Side, device: Any) -> None:
    pair = Pair(side, device, np.zeros(4, np.int8))
    pair.remote[0] = 2.9
    pair.remote[1] = np.float64(-2.9)
    pair.remote[2] = True
    pair.remote[3:] = device.full(1, 300)
    with np.errstate(all="ignore"):
        pair.host[:] = [2, -2, 1, np.array(300).astype(np.int8)]
    pair.equal()
    with pytest.raises(DTypeError, match="imaginary"):
        pair.remote[0] = 1j
    pair.equal()


def test_augmented_assignment(side: Side, device: Any) -> None:
    pair = Pair(side, device, cube())
    for x in (pair.host, pair.remote):
        x[1] += 1
        x[:, 1:] *= 2
        x[..., ::2] -= x[..., :3]
        x[[0, 0, 1]] += 1  # once each: what is written last stays
        x[2, 2, 2] /= 4
    pair.equal()


@pytest.mark.parametrize("value", [[1, 2, 3], np.arange(3), (1, 2, 3), [[1.0]]])
def test_host_values_are_not_uploaded_unasked(side: Side, device: Any, value: Any) -> None:
    pair = Pair(side, device, np.zeros(3))
    with pytest.raises(ImplicitTransfer, match="put"):
        pair.remote[:] = value
    pair.equal()


def test_assignment_that_does_not_fit(side: Side, device: Any) -> None:
    """Refused at the line; the array keeps what it had."""
    pair = Pair(side, device, cube())
    value = device.zeros(4)
    for index in (slice(None), (0,), (0, slice(1, 3)), ([0, 1],), (slice(1, 2), 0)):
        with case(index), pytest.raises(ShapeError):
            pair.remote[index] = value
    with pytest.raises(DeviceMismatch):
        pair.remote[0] = side.do(device._core.devices[1].put(np.zeros(5)))
    pair.equal()


def test_views_share_memory(side: Side, session: Any, device: Any) -> None:
    """Writing to a view is seen in the base and in other views, both ways; no memory is taken."""
    pair = Pair(side, device, cube())
    side.do(session.synchronize())
    used = side.do(session.server_stats())["memory_used"]

    def views(x: Any) -> list[Any]:
        return [
            x[1],
            x[:, 1:, ::-2],
            x.T,
            x.reshape(12, 5),
            x.transpose(1, 0, 2),
            x[None, ..., 0].squeeze(),
            x.mT if hasattr(x, "mT") else x.swapaxes(-1, -2),
            x.ravel(),
            np.flip(x, 1),
            np.expand_dims(x, 2),
            x.real,
            np.broadcast_to(x, (2, 4, 3, 5)),
        ]

    here, there = views(pair.host), views(pair.remote)
    pair.host[1, 1] = pair.remote[1, 1] = 100
    for k, (host, remote) in enumerate(zip(here, there, strict=True)):
        with case(k):
            same(side, remote, host)
    side.do(session.synchronize())
    assert side.do(session.server_stats())["memory_used"] == used
    for k, (host, remote) in enumerate(zip(here[:-1], there[:-1], strict=True)):
        with case(k):
            host[...] = k
            remote[...] = k
            host[-1:] += 0.5
            remote[-1:] += 0.5
            pair.equal()
            same(side, there[0], here[0])


def test_copies_do_not(side: Side, device: Any) -> None:
    pair = Pair(side, device, cube())
    copies = [
        pair.remote.copy(),
        pair.remote.flatten(),
        pair.remote.astype(np.float32),
        pair.remote + 0,
        pair.remote[[0, 1]],
        pair.remote.T.ravel(),  # its layout allows no view
        np.concatenate([pair.remote]),
        np.copy(pair.remote),
        np.roll(pair.remote, 1),
    ]
    for k, copied in enumerate(copies):
        copied[...] = k
    pair.equal()
    assert pair.remote.astype(np.float32, copy=False) is pair.remote


def test_a_view_outlives_its_base(side: Side, session: Any, device: Any) -> None:
    side.do(session.synchronize())
    before = side.do(session.server_stats())["memory_used"]
    base = side.do(device.put(np.arange(100_000, dtype=np.int64)))
    part = base[1000:1010]
    del base
    side.do(session.synchronize())
    assert side.do(session.server_stats())["memory_used"] == before + 800_000
    assert side.do(part.sum().item()) == sum(range(1000, 1010))
    del part
    side.do(session.synchronize())
    assert side.do(session.server_stats())["memory_used"] == before


def test_a_view_that_cannot_be_written_to(side: Side, fresh: Any) -> None:
    x = fresh.devices[0].arange(3)
    wide: Any = np.broadcast_to(x, (4, 3))
    wide[0] = 1
    with pytest.raises(OpFailed, match="read-only"):
        side.do(wide.get())
    assert side.do(x.tolist()) == [0, 1, 2]
