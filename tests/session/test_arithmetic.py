"""Operators, ufuncs and scalars: what NumPy gives, on the device."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import (
    DTypeError,
    ImplicitTransfer,
    OpFailed,
    ShapeError,
    UnsupportedOp,
)
from gpuremote.ops.ufuncs import BINARY, UNARY
from tests.faults.sides import Side
from tests.session.comparing import DTYPES, Pair, attempt, case, numbers, same

ARITHMETIC: list[Callable[[Any, Any], Any]] = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
]
BITS: list[Callable[[Any, Any], Any]] = [
    operator.and_,
    operator.or_,
    operator.xor,
    operator.lshift,
    operator.rshift,
]
COMPARISONS: list[Callable[[Any, Any], Any]] = [
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
]
INPLACE: list[Callable[[Any, Any], Any]] = [
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
]
SCALARS: list[Any] = [
    True,
    3,
    -2,
    2.5,
    1 + 2j,
    1 << 63,
    np.True_,
    np.int8(3),
    np.uint8(200),
    np.int64(-5),
    np.uint64(1 << 63),
    np.float16(1.5),
    np.float32(2.5),
    np.float64(0.1),
    np.complex64(1j),
    np.array(2.0, np.float32),
    np.array(7, np.int16),
    np.array(2, ">i4"),
]


def right_of(function: Callable[[Any, Any], Any], scalar: Any) -> Callable[[Any], Any]:
    return lambda x: function(x, scalar)


def either(side: Side, function: Callable[[Any], Any], pair: Pair) -> None:
    """As NumPy: the same result, or refused where NumPy refuses."""
    expected, error = attempt(lambda: function(pair.host.copy()))
    if error is None:
        same(side, function(pair.remote.copy()), expected)
    elif isinstance(error, OverflowError | ValueError):
        # Depends on the scalar's value, so the server finds it.
        result = function(pair.remote.copy())
        with pytest.raises(OpFailed, match=str(error).split(".")[0]):
            side.do(result.get())
    else:
        with pytest.raises(DTypeError):
            function(pair.remote.copy())


@pytest.mark.parametrize("ops", [ARITHMETIC, BITS, COMPARISONS], ids=["+", "&", "<"])
def test_operators(side: Side, device: Any, ops: list[Callable[[Any, Any], Any]]) -> None:
    """Of two arrays: of one dtype, and of many pairs of dtypes."""
    pairs = [Pair(side, device, numbers((2, 3), dtype)) for dtype in DTYPES]
    for op in ops:
        for a, other in zip(pairs, [*pairs[3:], *pairs[:3]], strict=True):
            for b in (a, other):
                with case(op.__name__, a.host.dtype, b.host.dtype):
                    expected, error = attempt(partial(op, a.host, b.host))
                    if error is None:
                        same(side, op(a.remote, b.remote), expected)
                    elif isinstance(error, ValueError):
                        with pytest.raises(OpFailed, match="negative integer powers"):
                            side.do(op(a.remote, b.remote).get())
                    else:
                        with pytest.raises(DTypeError):
                            op(a.remote, b.remote)


BROADCAST: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((2, 3), (3,)),
    ((2, 1), (1, 3)),
    ((), (4,)),
    ((0, 3), (1, 3)),
    ((1,), ()),
    ((3, 1, 2), (4, 1)),
]


def test_operands_are_broadcast(side: Side, device: Any) -> None:
    for left, right in BROADCAST:
        a, b = numbers(left, "int32"), numbers(right, "int32", 1)
        x, y = side.do(device.put(a)), side.do(device.put(b))
        for op in (operator.add, operator.truediv, operator.and_, operator.lt):
            with case(op.__name__, left, right):
                same(side, op(x, y), op(a, b))
                same(side, op(y, x), op(b, a))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_keep_their_kind(side: Side, device: Any, dtype: str) -> None:
    """Python's are weak (NEP 50), NumPy's and arrays without axes are not."""
    pair = Pair(side, device, numbers(3, dtype))
    for scalar in SCALARS:
        with case(repr(scalar)):
            either(side, right_of(operator.add, scalar), pair)
            either(side, partial(operator.mul, scalar), pair)
            either(side, right_of(operator.lt, scalar), pair)
            if dtype == "float32":
                either(side, partial(operator.sub, scalar), pair)
                either(side, partial(operator.truediv, scalar), pair)
                either(side, partial(operator.eq, scalar), pair)
                either(side, partial(operator.ge, scalar), pair)


def test_reflected(side: Side, device: Any) -> None:
    for dtype in ("bool", "uint8", "int64", "float32"):
        pair = Pair(side, device, abs(numbers((2, 2), dtype)))
        for op in (*ARITHMETIC, *BITS):
            for scalar in (3, True, 2.0, np.int16(2), np.float32(3)):
                with case(op.__name__, dtype, repr(scalar)):
                    either(side, partial(op, scalar), pair)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32", "complex128"])
def test_in_place(side: Side, device: Any, dtype: str) -> None:
    other = Pair(side, device, abs(numbers(3, "int64", 1)).astype(dtype))
    for op in INPLACE:
        for operand in (other, 2, True, 0.5, np.float32(2)):
            with case(op.__name__, operand):
                pair = Pair(side, device, abs(numbers((2, 3), dtype)).astype(dtype))
                host = operand.host if isinstance(operand, Pair) else operand
                remote = operand.remote if isinstance(operand, Pair) else operand
                alias = pair.remote
                _, error = attempt(partial(op, pair.host, host))
                if error is None:
                    assert op(pair.remote, remote) is alias
                else:
                    with pytest.raises(DTypeError):
                        op(pair.remote, remote)
                pair.equal()


def test_in_place_through_all_names(side: Side, device: Any) -> None:
    """One array under several names and views: all of them see it."""
    pair = Pair(side, device, np.arange(12.0).reshape(3, 4))
    row, block, turned = pair.remote[1], pair.remote[1:, ::2], pair.remote.T
    pair.remote += 1
    row *= 2
    turned[0] -= 5
    pair.host += 1
    pair.host[1] *= 2
    pair.host.T[0] -= 5
    pair.equal()
    same(side, row, pair.host[1])
    same(side, block, pair.host[1:, ::2])
    same(side, turned, pair.host.T)


def test_in_place_shape_is_kept(side: Side, device: Any) -> None:
    x = device.zeros((1, 3))
    y = device.zeros((2, 3))
    with pytest.raises(ShapeError):
        x += y
    y += x
    same(side, y, np.zeros((2, 3)))


def test_unary(side: Side, device: Any) -> None:
    """Operators with all dtypes, ufuncs with some."""
    for dtype in DTYPES:
        pair = Pair(side, device, numbers((2, 3), dtype))
        for op in (operator.neg, operator.pos, operator.abs, operator.invert):
            with case(op.__name__, dtype):
                either(side, op, pair)
        if dtype in ("bool", "int16", "float32", "float64", "complex128"):
            for name, ufunc in UNARY.items():
                with case(name, dtype):
                    either(side, ufunc, pair)


@pytest.mark.parametrize("dtype", ["bool", "int16", "float32", "float64"])
def test_binary_ufuncs(side: Side, device: Any, dtype: str) -> None:
    """Array and array, array and scalar, scalar and array, NumPy scalar and array."""
    pair = Pair(side, device, abs(numbers((2, 3), dtype)))
    other = Pair(side, device, abs(numbers(3, dtype, 2)))
    for name, ufunc in BINARY.items():
        with case(name):
            expected, error = attempt(partial(ufunc, pair.host, other.host))
            if error is None:
                same(side, ufunc(pair.remote, other.remote), expected)
            else:
                with pytest.raises(DTypeError):
                    ufunc(pair.remote, other.remote)
            for scalar in (2, 1.5, np.int16(3)):
                either(side, right_of(ufunc, scalar), pair)
                either(side, partial(ufunc, scalar), pair)


def test_ufuncs_of_arrays_without_axes(side: Side, device: Any) -> None:
    """NumPy gives scalars there; here arrays without axes, of the same dtype."""
    for dtype in ("int32", "float32"):
        pair = Pair(side, device, numbers((), dtype))
        pair.check(lambda x: x + x)
        pair.check(lambda x: x * 2)
        pair.check(np.sqrt)
        pair.check(lambda x: 1.5 - x)
        pair.check(lambda x: np.maximum(x, 3))
        pair.check(lambda x: x > 1)
        pair.check(lambda x: -x)


def test_ufunc_with_dtype_and_out(side: Side, device: Any) -> None:
    pair = Pair(side, device, np.array([100, 127, -3], np.int8))
    pair.check(lambda x: np.add(x, x, dtype=np.int64))
    pair.check(lambda x: np.add(x, 100, dtype=np.int16))
    pair.check(lambda x: np.negative(x, dtype="f4"))
    pair.check(lambda x: np.rint(x))
    pair.check(lambda x: np.rint(x * 0.3))
    with pytest.raises(DTypeError):
        np.add(pair.remote, 0.5, dtype=np.int8)

    target = device.zeros((2, 3))
    assert np.multiply(pair.remote, 2.5, out=target) is target
    same(side, target, np.multiply(pair.host, 2.5, out=np.zeros((2, 3))))
    assert np.add(target, 1, out=target) is target
    assert np.subtract(1, target, out=(target,)) is target
    same(side, target, 1 - (np.multiply(pair.host, 2.5, out=np.zeros((2, 3))) + 1))
    assert np.sqrt(device.full(3, 4.0), out=target) is target
    same(side, target, np.full((2, 3), 2.0))
    whole = device.zeros(3, np.int64)
    with pytest.raises(DTypeError):
        np.add(pair.remote, 0.5, out=whole)  # NumPy drops no fraction unasked either
    same(side, whole, np.zeros(3, np.int64))


def test_reduce(side: Side, device: Any) -> None:
    pair = Pair(side, device, numbers((3, 4), "int16"))
    for ufunc in (np.add, np.multiply, np.maximum, np.minimum, np.logical_and, np.logical_or):
        with case(ufunc.__name__):
            pair.check(ufunc.reduce)
            pair.check(partial(ufunc.reduce, axis=1))
            pair.check(partial(ufunc.reduce, axis=None))
            pair.check(partial(ufunc.reduce, axis=(0, 1), keepdims=True))


def test_what_is_not_offered_says_so(side: Side, device: Any) -> None:
    x = device.arange(4)
    with pytest.raises(UnsupportedOp, match="accumulate"):
        np.add.accumulate(x)
    with pytest.raises(UnsupportedOp, match="modf"):
        np.modf(x)
    with pytest.raises(UnsupportedOp, match="where"):
        np.add(x, 1, where=np.array([True, False, True, True]))
    with pytest.raises(UnsupportedOp, match="fft"):
        np.fft.fft(x)
    assert side.do(x.sum().item()) == 6


def test_host_arrays_are_not_uploaded_unasked(side: Side, device: Any) -> None:
    x, host = device.arange(4), np.arange(4)
    for mixed in (
        lambda: x + host,
        lambda: host + x,
        lambda: x == host,
        lambda: np.add(host, x),
        lambda: np.add(x, host),
        lambda: np.concatenate([x, host]),
        lambda: x @ host,
        lambda: host @ x,
    ):
        with pytest.raises(ImplicitTransfer):
            mixed()
    with pytest.raises(ImplicitTransfer):
        host += x
    with pytest.raises(TypeError):
        operator.add(x, [1, 2, 3, 4])
    assert host.tolist() == [0, 1, 2, 3]


def test_shapes_that_do_not_fit_are_refused_at_the_line(side: Side, device: Any) -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3\) and \(4,\)"):
        device.zeros((2, 3)) + device.zeros(4)
    with pytest.raises(ValueError, match="broadcast"):
        np.add(device.zeros(2), device.zeros(3))


def test_only_the_server_computes(side: Side, session: Any, device: Any) -> None:
    x = device.arange(6).reshape(2, 3)
    side.do(session.synchronize())
    before = side.do(session.server_stats())["ops"]
    y = x
    for _ in range(50):
        y = np.add(y * 2 - x, 1)[::1].T.T
    y += 1
    side.do(session.synchronize())
    assert side.do(session.server_stats())["ops"] == before + 50 * 6 + 1
