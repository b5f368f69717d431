"""What a call is known by, where its operands go, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.testing.servers import device_server
from gpuremote.wire import caps
from tests.session.comparing import case


def test_parameters_that_are_equal_and_not_the_same(xp: Any) -> None:
    angles = xp.asarray([0, 4, 8])
    assert xp.unwrap(angles, period=6).dtype == np.int64
    assert xp.unwrap(angles, period=6.0).dtype == np.float64
    broken = xp.asarray([np.nan, 1.0])
    for zero in (0.0, -0.0):
        filled = xp.nan_to_num(broken, nan=zero)
        assert bool(xp.signbit(filled)[0]) == np.signbit(zero)
        padded = xp.pad(xp.ones(1), 1, constant_values=zero)
        assert bool(xp.signbit(padded)[0]) == np.signbit(zero)
    before = xp.session().stats().plans
    for _ in range(20):
        xp.nan_to_num(broken, nan=float("nan"))
    assert xp.session().stats().plans - before <= 1


def test_results_that_numpy_has_in_wider_dtypes(xp: Any) -> None:
    small = np.array([100, 100], np.int8)
    for host in (small, np.array([True, True]), small.astype(np.uint8)):
        for ufunc in (np.add, np.multiply):
            found: Any = ufunc.accumulate(xp.asarray(host))
            expected = ufunc.accumulate(host)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found.get(), expected)
    np.testing.assert_array_equal(xp.poly(xp.asarray(small)).get(), np.poly(small))
    ends = xp.asarray([-3.0]), xp.asarray([2.0])
    expected = np.linspace(np.array([-3.0]), np.array([2.0]), 4, dtype=int)
    np.testing.assert_array_equal(xp.linspace(*ends, 4, dtype=int).get(), expected)
    assert xp.linspace(ends[0].astype("f4"), 1, 3).dtype == np.float32
    five = xp.asarray(np.array([5], np.uint8))
    assert xp.take(xp.arange(300), five, mode="wrap").tolist() == [5]
    assert [i.tolist() for i in xp.unravel_index(five, (300, 2))] == [[2], [1]]
    assert xp.ravel_multi_index((five, five % 4), (300, 300)).tolist() == [1501]


def test_keywords_of_products(xp: Any) -> None:
    a = xp.ones((2, 3), "f4")
    out = xp.zeros(2)
    assert np.vecdot(a, a, out=out) is out
    assert out.tolist() == [3, 3]
    assert xp.vecdot(a, a, dtype="f8").dtype == np.float64
    assert xp.matmul(a, a.T, dtype="f8").dtype == np.float64
    assert xp.add(a, 1, dtype="i4", casting="unsafe").dtype == np.int32
    refused: list[Callable[[], Any]] = [
        lambda: xp.matmul(a, a.T, foo=1),
        lambda: xp.add(a, 1, device="nonsense"),
        lambda: xp.add(a, 1, dtype="f8", casting="no"),
        lambda: xp.cross(a, a, axis=5),
        lambda: xp.apply_along_axis(lambda row: row, 5, a),
    ]
    for number, call in enumerate(refused):
        with case(number), pytest.raises((TypeError, ValueError)):
            call()


def test_numbers_of_numpy_as_parameters(xp: Any) -> None:
    x = xp.asarray([0.0, 1.0, 5.0])
    assert xp.interp(x - 1, x, x, left=np.float32(7)).tolist() == [7, 0, 4]
    assert xp.interp(x - 1, x, x, left=x[2]).tolist() == [5, 0, 4]
    assert xp.unwrap(x, period=np.float64(3)).shape == (3,)
    assert float(xp.var(x, ddof=np.float32(1))) == np.var([0.0, 1.0, 5.0], ddof=1)
    assert xp.histogram(x, bins=xp.asarray(3))[0].tolist() == [2, 0, 1]


def test_lists_go_where_the_arrays_are(xp: Any) -> None:
    second = xp.session().devices[1]
    y = second.xp.ones(3)
    calls: dict[str, Callable[[], Any]] = {
        "digitize": lambda: xp.digitize(y, [0.0, 1.0]),
        "isin": lambda: xp.isin(y, [1, 2]),
        "interp": lambda: xp.interp(y, [0.0, 1.0], [0.0, 2.0]),
        "insert": lambda: xp.insert(y, 1, 5.0),
        "append": lambda: xp.append(y, [1.0]),
        "where": lambda: xp.where(y > 0, [1.0, 2.0, 3.0], 0),
        "diff": lambda: xp.diff(y, prepend=0),
        "searchsorted": lambda: xp.searchsorted(y, [1.0]),
        "add": lambda: xp.add(y, [1, 2, 3]),
        "histogram": lambda: xp.histogram(y, [0.0, 1.0, 2.0])[0],
        "average": lambda: xp.average(y, weights=[1, 2, 3]),
        "array_equal": lambda: xp.array_equal(y, [1, 1, 1]),
        "ediff1d": lambda: xp.ediff1d(y, to_end=[1.0]),
        "bincount": lambda: xp.bincount(y.astype(int), weights=[1.0, 2.0, 3.0]),
        "compress": lambda: xp.compress([True, False, True], y),
        "stack": lambda: xp.asarray([y, [1, 2, 3]]),
        "take": lambda: xp.take(y, [0, 1]),
    }
    for name, call in calls.items():
        with case(name):
            assert call().device is second
    xp.put(y, [0], [2.0])
    xp.putmask(y, y < 2, [7.0])
    y[1:] = [8, 9]
    assert y.tolist() == [2, 8, 9]


def test_everything_of_a_device_is_made_there(xp: Any) -> None:
    second = xp.session().devices[1]
    here = second.xp
    made = [
        here.add.reduce(here.ones((2, 2))),
        here.add.outer([1, 2], [3, 4]),
        here.multiply.accumulate([1, 2, 3]),
        here.sin(1.0),
        here.r_[1:3, here.ones(2)],
        here.c_[here.ones(2), [1, 2]],
        here.mgrid[0:3],
        here.ogrid[0:2, 0:3][0],
        here.random.RandomState(1).rand(3),
        here.vectorize(lambda v: v + 1)([1, 2]),
        here.broadcast([1, 2], [[3]]).values[0],
        here.fft.fftfreq(4),
    ]
    for number, array in enumerate(made):
        with case(number):
            assert array.device is second
    assert isinstance(here.add, xp.ufunc)
    counts = here.zeros(2)
    here.add.at(counts, [0, 0], 1)
    assert counts.tolist() == [2, 0]


def test_an_array_of_the_device_keeps_its_class(xp: Any) -> None:
    with device_server() as running, gpuremote.connect_sync(running.url) as session:
        plain = session.devices[0].put(np.ones(2))
        ours = xp.asarray(plain)
        assert type(plain) is gpuremote.BlockingArray
        assert isinstance(ours, xp.ndarray)
        ours += 1  # the same memory
        assert plain.tolist() == [2, 2]


def test_plans_that_another_thread_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is looked up without the lock; it may be cleared before it is used."""
    monkeypatch.setattr(caps, "MAX_PLANS", 24)
    errors: list[BaseException] = []
    with device_server() as running, gpuremote.connect_sync(running.url) as session:
        there = session.devices[0].xp
        stop = threading.Event()

        def use() -> None:
            x = there.ones(8)
            try:
                while not stop.is_set():
                    x = (x + 1.0) * 0.5
                    there.add(x, 1.0)
                    x.sum(axis=0)
                    x[2:5]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
        for length in range(1, 600):
            there.zeros(length) + 1
        stop.set()
        for thread in threads:
            thread.join(20)
        session.synchronize()
    assert not errors


@pytest.mark.parametrize("dtype", ["i1", "u2", "u8"])
def test_repeat_takes_counts_of_any_integer(xp: Any, dtype: str) -> None:
    """Those of the standard; np.repeat refuses uint64."""
    x = xp.asarray([1.0, 2.0, 3.0])
    counts = np.array([2, 0, 1], dtype)
    assert xp.repeat(x, counts).tolist() == [1, 1, 3]
    assert xp.repeat(x, xp.asarray(counts)).tolist() == [1, 1, 3]
    with pytest.raises(ValueError, match="negative"):
        xp.repeat(x, np.array([1 << 63, 0, 0], "u8"))
