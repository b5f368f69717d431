"""``gpuremote.cupy.linalg`` against ``numpy.linalg``."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuremote.errors import DTypeError, LinearAlgebraError, ShapeError
from tests.arrays.matching import Same
from tests.session.comparing import case

Array = npt.NDArray[Any]

FLOATS = ["f4", "f8", "c8", "c16"]
OTHERS = ["?", "i1", "u4", "i8", "f2"]
STACKS: list[tuple[int, ...]] = [(), (2,), (2, 3), (0,)]


@pytest.fixture
def same(xp: Any) -> Same:
    return Same(xp, xp.linalg, np.linalg)


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Array:
    chance = np.random.default_rng([seed, *shape])
    kind = np.dtype(dtype)
    if kind.kind in "biu":
        return np.asarray(chance.integers(0, 5, shape)).astype(kind)
    found: Any = np.asarray(chance.normal(size=shape))
    if kind.kind == "c":
        found = found + 1j * chance.normal(size=shape)
    return np.asarray(found).astype(kind)


def definite(shape: tuple[int, ...], dtype: str) -> Array:
    """Hermitian, positive definite."""
    x = values(shape, "c16" if dtype[0] == "c" else "f8")
    return np.asarray(x @ x.conj().swapaxes(-1, -2) + 3 * np.eye(shape[-1])).astype(dtype)


def test_decompositions(same: Same) -> None:
    for dtype, stack in itertools.product([*FLOATS, *OTHERS], STACKS):
        if dtype in OTHERS and stack:
            continue
        for m, n in ((3, 3), (2, 4), (4, 2), (1, 1), (0, 3), (3, 0)):
            x = values((*stack, m, n), dtype)
            for mode in ("reduced", "complete", "r", "raw"):
                same("qr", x, mode)
            same("svd", x)
            same("svd", x, full_matrices=False)
            same("svd", x, compute_uv=False)
            same("svdvals", x)
            if dtype in FLOATS or x.size:
                same("pinv", x)
            if m and n:
                if dtype in FLOATS:
                    same("pinv", x, rtol=None)
                same("pinv", x, rcond=0.5)
                same("matrix_rank", x)
        x = definite((*stack, 3, 3), dtype)
        for upper in (False, True):
            same("cholesky", x, upper=upper)
        for triangle in ("L", "U", "u"):
            same("eigh", x, triangle)
            same("eigvalsh", x, UPLO=triangle)
        same("svd", x, hermitian=True)
        same("svd", x, compute_uv=False, hermitian=True)
        same("pinv", x, hermitian=True)
    assert same.refused


def test_numbers_of_matrices(same: Same) -> None:
    for dtype, stack in itertools.product([*FLOATS, *OTHERS], STACKS):
        for n in (3, 1, 0) if dtype in FLOATS else (3,):
            x = definite((*stack, n, n), dtype)
            for name in ("det", "slogdet", "inv", "matrix_transpose", "trace", "diagonal"):
                same(name, x)
            for power in (0, 1, 2, 3, 5, 6, -1, -3):
                if power > 0 or dtype in FLOATS:
                    same("matrix_power", x, power)
        for offset in (-1, 0, 2, 9):
            same("diagonal", values((*stack, 3, 4), dtype), offset=offset)
            same("trace", values((*stack, 3, 4), dtype), offset=offset)
        for given in ("f4", "c16", "i8"):
            if dtype[0] not in "cf" or given != "i8":
                same("trace", values((*stack, 3, 3), "i4"), dtype=given)


def test_eigenvalues_are_complex(xp: Any, same: Same) -> None:
    for dtype, stack in itertools.product([*FLOATS, "i4"], STACKS):
        x = values((*stack, 3, 3), dtype)
        kind = "c8" if dtype in ("f4", "c8") else "c16"
        w, v = np.linalg.eig(x)
        found = xp.linalg.eig(xp.asarray(x))
        with case(dtype, stack):
            same.compare(tuple(found), (w.astype(kind), v.astype(kind)))
            assert found.eigenvalues is found[0]
            same.compare(xp.linalg.eigvals(xp.asarray(x)), np.linalg.eigvals(x).astype(kind))


def test_norms(same: Same) -> None:
    axis: Any
    shape: tuple[int, ...]
    orders = [None, 0, 1, 2, -1, -2, 3, 2.5, math.inf, -math.inf, "fro", "nuc", "f", "no"]
    for dtype in [*FLOATS, *OTHERS]:
        for shape in ((4,), (3, 4), (2, 3, 4)):
            x = values(shape, dtype)
            for order, keepdims in itertools.product(orders, (False, True)):
                if keepdims and dtype not in ("f4", "c16"):
                    continue
                for axis in (None, 0, -1, (0, 1), (-1, 0), (1, 1), (0, 1, 2)):
                    if dtype not in ("f4", "c16") and axis not in (None, -1):
                        continue
                    if shape == (2, 3, 4) and axis is None and order is not None:
                        assert same("norm", x, order) is None
                    elif np.max(axis if axis is not None else 0) < x.ndim:
                        same("norm", x, order, axis, keepdims)
                if not isinstance(order, str) and order is not None:
                    for axis in (None, -1, tuple(range(x.ndim))):
                        same("vector_norm", x, axis=axis, keepdims=keepdims, ord=order)
                if len(shape) > 1 and order not in (0, 3, 2.5, "f", None):
                    same("matrix_norm", x, keepdims=keepdims, ord=order)
    for shape in ((0,), (0, 3), (2, 0)):
        same("norm", np.zeros(shape))
        same("norm", np.zeros(shape, "f4"), axis=0)
        same("vector_norm", np.zeros(shape), ord=1)
    for shape, order in itertools.product(((0, 3), (3, 0), (0, 0), (2, 0, 3)), ("fro", "nuc")):
        same("matrix_norm", np.zeros(shape), ord=order)
    same("norm", np.float64(3) * np.ones(()))


def test_condition_and_rank(same: Same) -> None:
    for dtype, stack in itertools.product(FLOATS, [(), (2,), (2, 3)]):
        for p in (None, 2, -2, 1, -1, math.inf, -math.inf, "fro", "nuc", 3):
            same("cond", definite((*stack, 3, 3), dtype), p)
        same("cond", values((*stack, 3, 2), dtype))
        x = definite((*stack, 3, 3), dtype)
        x[..., 2, :] = x[..., 1, :] * 2
        same("matrix_rank", x)
        same("matrix_rank", x, 0.5)
        same("matrix_rank", x, rtol=1e-9)
        same("matrix_rank", x, np.full(stack, 0.5))
        same("matrix_rank", definite((*stack, 3, 3), dtype), hermitian=True)
        same("pinv", x, np.full(stack, 1e-3))
    same("cond", np.array([[1.0, 2.0], [2.0, 4.0]]), 1)  # singular: not refused
    same("cond", np.zeros((0, 0)))
    same("cond", np.zeros((2, 3)), 1)
    for x in (np.zeros(3), np.ones(3), np.float64(2) * np.ones(()), np.zeros((3, 3))):
        same("matrix_rank", x)


def test_equations(same: Same) -> None:
    for left, right in itertools.product([*FLOATS, "i4", "f2"], FLOATS):
        for stack in ((), (2,)):
            a = definite((*stack, 3, 3), left)
            same("solve", a, values((3,), right))
            same("solve", a, values((3, 2), right))
            same("solve", a, values((2, 3, 2), right))
        same("solve", definite((2, 1, 3, 3), left), values((4, 3, 1), right))
        for m, n in ((4, 2), (2, 4), (3, 3)):
            a = values((m, n), left)
            for columns in ((), (3,), (0,)):
                same("lstsq", a, values((m, *columns), right))
            a[:, 1] = a[:, 0]
            same("lstsq", a, values((m,), right))
            same("lstsq", a, values((m, 2), right), 1e-3)
            same("lstsq", a, values((m, 2), right), -1)
    for shape in ((0, 3), (3, 0)):
        same("lstsq", np.zeros(shape), np.ones(shape[0]))
    a = values((2, 3, 6), "f8")
    same("tensorsolve", values((2, 3, 2, 3), "f8"), values((2, 3), "f8"))
    same("tensorsolve", values((2, 3, 6), "f8"), values((2, 3), "f8"))
    same("tensorsolve", np.moveaxis(a, 2, 0), values((2, 3), "f8"), axes=(0,))
    same("tensorsolve", a, values((2,), "f8"))
    same("tensorinv", values((2, 3, 6), "f8"))
    same("tensorinv", values((6, 2, 3), "f8"), 1)
    same("tensorinv", values((6, 2, 3), "f8"), 0)
    same("tensorinv", values((6, 2, 2), "f8"), 1)
    same("solve", np.ones((2, 3)), np.ones(2))
    same("lstsq", np.ones((2, 3)), np.ones(3))


def test_products(xp: Any, same: Same) -> None:
    for dtype in [*FLOATS, "i4", "?"]:
        x, y = values((2, 3), dtype), values((3, 4), dtype, 1)
        same("matmul", x, y)
        same("tensordot", x, y, axes=1)
        same("tensordot", x, y, axes=((1,), (0,)))
        same("outer", x[0], y[0])
        same("outer", x, y)
        same("vecdot", x, values((2, 3), dtype, 2))
        same("vecdot", x, values((2, 1), dtype, 2), axis=0)
        if dtype != "?":
            same("cross", x, values((2, 3), dtype, 2))
        same("cross", x, y)
    chain = [values(shape, "f8") for shape in ((5, 2), (2, 9), (9, 3), (3, 7))]
    same("multi_dot", chain)
    same("multi_dot", chain[:2])
    same("multi_dot", [values((5,), "f8"), *chain, values((7,), "f8")])
    same("multi_dot", [chain[0]])
    same("multi_dot", [chain[0], np.ones((2, 2, 2)), chain[0]])
    out = xp.zeros((5, 7))
    given = [xp.asarray(x) for x in chain]
    assert xp.linalg.multi_dot(given, out=out) is out
    same.compare(out, np.linalg.multi_dot(chain))


def test_what_is_refused(xp: Any) -> None:
    linalg = xp.linalg
    assert issubclass(linalg.LinAlgError, ValueError)
    wide = xp.ones((2, 3))
    for name in ("inv", "det", "slogdet", "eig", "eigh", "eigvals", "eigvalsh", "cholesky"):
        with case(name):
            with pytest.raises(linalg.LinAlgError, match="one length"):
                getattr(linalg, name)(wide)
            with pytest.raises(linalg.LinAlgError, match="two axes"):
                getattr(linalg, name)(xp.ones(3))
    with pytest.raises(DTypeError, match="float16"):
        linalg.inv(xp.ones((2, 2), "f2"))
    with pytest.raises(ValueError, match="'X'"):
        linalg.eigh(xp.eye(2), "X")
    with pytest.raises(ValueError, match="full"):
        linalg.qr(xp.eye(2), "full")
    with pytest.raises(ValueError, match="both"):
        linalg.pinv(xp.eye(2), 0.1, rtol=0.1)
    with pytest.raises(ShapeError, match="same"):
        linalg.norm(xp.eye(2), axis=(0, 0))
    with pytest.raises(TypeError, match="host array"):
        linalg.solve(xp.eye(2), np.ones(2))


def test_singular_matrices_are_said_to_be_at_the_wait(xp: Any) -> None:
    inverse = xp.linalg.inv(xp.zeros((2, 2)))
    with pytest.raises(LinearAlgebraError, match="ingular") as caught:
        inverse.get()
    assert caught.value.op == "inv"
    with pytest.raises(LinearAlgebraError, match="definite"):
        xp.linalg.cholesky(-xp.eye(2)).get()


def test_nothing_is_waited_for(xp: Any) -> None:
    x, y = xp.asarray(definite((3, 3), "f8")), xp.ones((4, 2))
    before = xp.session().stats().round_trips
    linalg = xp.linalg
    linalg.svd(x)
    linalg.eig(x)
    linalg.pinv(x, hermitian=True)
    linalg.matrix_rank(x)
    linalg.cond(x, 1)
    linalg.norm(x, "nuc")
    linalg.lstsq(x, y[:3])  # as many equations as unknowns: no residuals in any case
    linalg.multi_dot([x, x, x])
    assert xp.session().stats().round_trips == before
    linalg.lstsq(y, xp.ones(4))
    assert sum(xp.session().stats().round_trips.values()) == sum(before.values()) + 1


def test_signatures(xp: Any) -> None:
    """The standard's parameters are there under its names."""
    for name, parameters in {
        "cholesky": ["upper"],
        "matrix_norm": ["keepdims", "ord"],
        "matrix_rank": ["rtol"],
        "pinv": ["rtol"],
        "qr": ["mode"],
        "svd": ["full_matrices"],
        "trace": ["offset", "dtype"],
        "diagonal": ["offset"],
        "vecdot": ["axis"],
        "cross": ["axis"],
        "tensordot": ["axes"],
        "vector_norm": ["axis", "keepdims", "ord"],
    }.items():
        found = inspect.signature(getattr(xp.linalg, name)).parameters
        assert set(parameters) <= found.keys(), name
    missing = {name for name in np.linalg.__all__ if not hasattr(xp.linalg, name)}
    assert not missing
