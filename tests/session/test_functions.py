"""Functions of the NumPy namespace, methods, creation and casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, LinearAlgebraError, ShapeError
from tests.faults.sides import Side
from tests.session.comparing import DTYPES, Pair, attempt, case, numbers, same

SHAPING: list[Callable[[Any], Any]] = [
    lambda x: x.reshape(6, 4),
    lambda x: x.reshape((2, -1)),
    lambda x: x.reshape(-1),
    lambda x: np.reshape(x, (4, 3, 2)),
    lambda x: np.reshape(x, shape=(4, 6)),
    lambda x: x.T,
    lambda x: x.mT if hasattr(x, "mT") else np.matrix_transpose(x),
    lambda x: x.transpose(2, 0, 1),
    lambda x: x.transpose((1, 0, 2)),
    lambda x: np.transpose(x),
    lambda x: np.transpose(x, (0, 2, 1)),
    lambda x: np.transpose(x, axes=(0, 2, 1)),
    lambda x: x.ravel(),
    lambda x: np.ravel(x),
    lambda x: x.flatten(),
    lambda x: np.expand_dims(x, 1),
    lambda x: np.expand_dims(x, (0, -1)),
    lambda x: np.squeeze(x[:1]),
    lambda x: x[:1, :1].squeeze(),
    lambda x: x[:1].squeeze(0),
    lambda x: np.flip(x),
    lambda x: np.flip(x, (0, 2)),
    lambda x: np.roll(x, 2),
    lambda x: np.roll(x, (1, -1), (0, 1)),
    lambda x: np.broadcast_to(x[0], (5, 3, 4)),
    lambda x: np.concatenate([x, x[:1]]),
    lambda x: np.concatenate([x, x * 0.5], axis=2),
    lambda x: np.concatenate([x, x[0]], axis=None),
    lambda x: np.stack([x, x], axis=1),
    lambda x: np.tril(x),
    lambda x: np.triu(x, k=1),
    lambda x: np.sort(x),
    lambda x: np.sort(x, axis=0),
    lambda x: np.argsort(x, axis=1, kind="stable"),
    lambda x: np.take(x, [2, 0]),
    lambda x: np.take(x, [1, 0, 1], axis=1),
    lambda x: np.copy(x),
    lambda x: x.copy(),
]
VALUES: list[Callable[[Any], Any]] = [
    lambda x: np.where(x > 2, x, -x),
    lambda x: np.where(x > 2, 1.5, x),
    lambda x: np.where(x > 2, x, 7),
    lambda x: np.clip(x, -2, 5),
    lambda x: np.clip(x, None, 3),
    lambda x: np.clip(x, a_min=0, a_max=None),
    lambda x: np.clip(x, x[0], x[1] + 3),
    lambda x: np.round(x * 0.37, 1),
    lambda x: np.round(x),
    lambda x: np.outer(x[0], x[1]),
    lambda x: np.dot(x[0], x[1].T),
    lambda x: x[0] @ x[1].T,
    lambda x: np.matmul(x, np.transpose(x, (0, 2, 1))),
    lambda x: x[0, 0] @ x[0, 1],
    lambda x: x @ x[0, 0],
    lambda x: x.real + x.imag,
    lambda x: x.conj(),
    lambda x: abs(x),
]
AXES: list[Any] = [None, 0, -1, (0, 2), (1,), ()]


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_functions(side: Side, device: Any, dtype: str) -> None:
    pair = Pair(side, device, numbers((2, 3, 4), dtype, 3))
    for k, function in enumerate((*SHAPING, *VALUES)):
        with case(k):
            pair.check(function)


@pytest.mark.parametrize(
    "name",
    ["sum", "prod", "mean", "max", "min", "all", "any", "var", "std", "argmax", "argmin"],
)
def test_reductions(side: Side, device: Any, name: str) -> None:
    """As methods and as functions; every dtype, or refused where NumPy refuses."""
    function = getattr(np, name)
    for dtype in "?bHlefdF":
        pair = Pair(side, device, numbers((2, 3, 4), dtype, 1))
        for axis in AXES:
            for keepdims in (False, True):
                with case(dtype, axis, keepdims):
                    given = {"axis": axis, "keepdims": keepdims}
                    expected, error = attempt(partial(function, pair.host, **given))
                    if error is None:
                        same(side, getattr(pair.remote, name)(**given), expected)
                        same(side, function(pair.remote, **given), expected)
                    else:
                        with pytest.raises((DTypeError, ShapeError, TypeError)):
                            function(pair.remote, **given)


def test_more_of_reductions(side: Side, device: Any) -> None:
    pair = Pair(side, device, numbers((3, 4), "int8"))
    pair.check(lambda x: x.sum(dtype="f4"))
    pair.check(lambda x: np.sum(x, axis=0, dtype=np.int16))
    pair.check(lambda x: np.prod(x, 1, dtype=float))
    pair.check(lambda x: x.var(ddof=1))
    pair.check(lambda x: np.std(x, axis=1, ddof=1))
    pair.check(lambda x: x.cumsum())
    pair.check(lambda x: np.cumsum(x, axis=1))
    pair.check(lambda x: x[0].cumsum())
    pair.check(lambda x: np.amax(x))
    pair.check(lambda x: np.amin(x, 0))
    empty = Pair(side, device, np.zeros((0, 3)))
    empty.check(lambda x: x.sum(0))
    empty.check(lambda x: x.prod())
    empty.check(lambda x: x.max(1))
    empty.check(lambda x: x.all())
    with pytest.raises(ShapeError):
        empty.remote.max()
    with pytest.raises(ShapeError, match="axis"):
        pair.remote.sum(axis=2)


def test_linear_algebra(side: Side, device: Any) -> None:
    square = Pair(side, device, numbers((2, 4, 4), "float64", 2) + 9 * np.eye(4))
    square.check(np.linalg.inv)
    square.check(np.linalg.det)
    square.check(lambda x: np.linalg.solve(x, x[::-1]))
    square.check(lambda x: np.linalg.solve(x[0], x[1, 0]))
    square.check(lambda x: np.linalg.cholesky(x @ np.transpose(x, (0, 2, 1))))
    square.check(lambda x: np.linalg.eigvalsh(x + np.transpose(x, (0, 2, 1))))
    square.check(lambda x: np.linalg.norm(x))
    square.check(lambda x: np.linalg.norm(x[0], axis=1))
    square.check(lambda x: np.linalg.norm(x[0, 0], ord=1))
    tall = Pair(side, device, numbers((5, 3), "float32"))
    tall.check(np.linalg.svdvals)
    for function in (
        np.linalg.qr,
        np.linalg.svd,
        partial(np.linalg.svd, full_matrices=False),
        lambda x: np.linalg.eigh(x[:3] + x[:3].T),
    ):
        for remote, host in zip(function(tall.remote), function(tall.host), strict=True):
            same(side, remote, host)
    with pytest.raises(ShapeError, match="one length"):
        np.linalg.inv(tall.remote)
    with pytest.raises(ShapeError, match="don't match"):
        tall.remote @ tall.remote


def test_a_singular_matrix(side: Side, fresh: Any) -> None:
    device = fresh.devices[0]
    inverse: Any = np.linalg.inv(device.zeros((3, 3)))
    with pytest.raises(LinearAlgebraError, match="ingular") as caught:
        side.do(inverse.get())
    assert caught.value.op == "inv"
    side.do(fresh.synchronize())  # told once


def test_matmul_shapes_and_dtypes(side: Side, device: Any) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((3,), (3,)),
        ((2, 3), (3,)),
        ((3,), (3, 2)),
        ((2, 3), (3, 4)),
        ((5, 1, 2, 3), (4, 3, 2)),
        ((0, 3), (3, 2)),
        ((2, 0), (0, 3)),
    ]
    for a, b in shapes:
        for left, right in (("float64", "float64"), ("int8", "float32"), ("bool", "int64")):
            with case(a, b, left, right):
                x, y = numbers(a, left), numbers(b, right, 1)
                same(side, side.do(device.put(x)) @ side.do(device.put(y)), x @ y)


def test_casts(side: Side, device: Any) -> None:
    for source in DTYPES:
        pair = Pair(side, device, abs(numbers((2, 3), source)).astype(source))
        for target in DTYPES:
            with case(source, target):
                if source.startswith("complex") and not target.startswith(("complex", "bool")):
                    with pytest.raises(DTypeError, match="imaginary"):
                        pair.remote.astype(target)
                else:
                    same(side, pair.remote.astype(target), pair.host.astype(target))
    with pytest.raises(DTypeError):
        device.zeros(3).astype("U5")
    with pytest.raises(DTypeError):
        device.zeros(3).astype("no such dtype")


def test_creation(side: Side, device: Any) -> None:
    for dtype in DTYPES:
        with case(dtype):
            same(side, device.zeros((2, 3), dtype), np.zeros((2, 3), dtype))
            same(side, device.ones([2], dtype), np.ones([2], dtype))
            same(side, device.full((2, 0), 1, dtype), np.full((2, 0), 1, dtype))
            same(side, device.eye(3, dtype=dtype), np.eye(3, dtype=dtype))
            assert device.empty((4, 5), dtype).nbytes == 20 * np.dtype(dtype).itemsize
    same(side, device.zeros(5), np.zeros(5))
    same(side, device.zeros(np.int64(5)), np.zeros(5))
    same(side, device.ones(()), np.ones(()))
    for value in (3, True, 2.5, 1j, np.float32(2), np.uint8(9)):
        same(side, device.full(3, value), np.full(3, value))
    same(side, device.full((1, 2), 7.9, "i4"), np.full((1, 2), 7.9, "i4"))
    same(side, device.eye(2, 4, 1), np.eye(2, 4, 1))
    ranges: list[tuple[Any, ...]] = [
        (5,),
        (2, 9),
        (9, 2, -3),
        (2, 9, -3),
        (0.5, 3),
        (0, 1, 0.1),
        (1, 1.3, 0.1),
        (0,),
    ]
    for arguments in ranges:
        with case(arguments):
            same(side, device.arange(*arguments), np.arange(*arguments))
    same(side, device.arange(4, dtype="f4"), np.arange(4, dtype="f4"))
    for num, endpoint in ((5, True), (4, False), (1, True), (0, True)):
        same(side, device.linspace(0, 2, num, endpoint), np.linspace(0, 2, num, endpoint))
    with pytest.raises(ShapeError, match="negative"):
        device.zeros((2, -1))
    with pytest.raises(ShapeError, match="range"):
        device.arange(0, 1, 0)
    with pytest.raises(DTypeError):
        device.zeros(3, object)
    with pytest.raises(ShapeError, match="can't exist"):
        device.zeros(1 << 61)


def test_random_numbers(side: Side, session: Any, device: Any) -> None:
    uniform = side.do(device.random_uniform((1000, 3), 7, "f4").get())
    assert uniform.dtype == np.float32
    assert uniform.min() >= 0
    assert uniform.max() < 1
    again = session.devices[1].random_uniform((1000, 3), 7, "f4")
    assert np.array_equal(uniform, side.do(again.get()))
    assert not np.array_equal(uniform, side.do(device.random_uniform((1000, 3), 8, "f4").get()))
    normal = side.do(device.random_normal(20_000, 3).get())
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
