"""Linear algebra: products, decompositions, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import ShapeError
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import Operand, array_operand
from gpuremote.ops.shapes import (
    bool_param,
    broadcast,
    dtypes_of,
    int_param,
    is_int,
    normal_axes,
    normal_axis,
    number_param,
    reduced,
    size_of,
)
from gpuremote.ops.spec import Infer, Inferred, OpSpec, Params

__all__ = ["SPECS", "tensordot_axes"]


def _two(operands: Sequence[Operand]) -> tuple[Meta, Meta]:
    if len(operands) != 2:
        raise ShapeError(f"{len(operands)} operands instead of 2")
    return array_operand(operands, 0), array_operand(operands, 1)


def _matmul(operands: Sequence[Operand], _params: Params) -> Inferred:
    a, b = _two(operands)
    if not a.ndim or not b.ndim:
        raise ShapeError(f"shapes {a.shape} and {b.shape}: both need an axis; multiply instead")
    inner = b.shape[0] if b.ndim == 1 else b.shape[-2]
    if a.shape[-1] != inner:
        raise ShapeError(
            f"shapes {a.shape} and {b.shape} don't match: {a.shape[-1]} (axis -1) is not {inner}"
        )
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    rows = a.shape[-2:-1]
    columns = b.shape[-1:] if b.ndim > 1 else ()
    return (((*batch, *rows, *columns), dtypes_of(np.matmul, a.dtype, b.dtype)[0]),)


def _vecdot(operands: Sequence[Operand], params: Params) -> Inferred:
    a, b = _two(operands)
    axis = int_param(params, "axis", -1)
    at_a, at_b = normal_axis(axis, a.ndim), normal_axis(axis, b.ndim)
    if a.shape[at_a] != b.shape[at_b]:
        raise ShapeError(f"shapes {a.shape} and {b.shape} differ along axis {axis}")
    left = a.shape[:at_a] + a.shape[at_a + 1 :]
    shape = broadcast(left, b.shape[:at_b] + b.shape[at_b + 1 :])
    return ((shape, dtypes_of(np.vecdot, a.dtype, b.dtype)[0]),)


def _outer(operands: Sequence[Operand], _params: Params) -> Inferred:
    a, b = _two(operands)
    return (((a.size, b.size), dtypes_of(np.outer, a.dtype, b.dtype)[0]),)


def tensordot_axes(axes: Any, a: int, b: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes to sum over, of operands with ``a`` and ``b`` axes, as numbers from 0."""
    if is_int(axes):
        if not 0 <= axes <= min(a, b):
            raise ShapeError(f"axes {axes} of arrays with {a} and {b} axes")
        return tuple(range(a - axes, a)), tuple(range(axes))
    if not isinstance(axes, tuple | list) or len(axes) != 2:
        raise ShapeError(f"parameter axes has to be an integer or a pair of tuples, not {axes!r}")
    if any(side is None for side in axes):
        raise ShapeError("parameter axes has None in it")
    left, right = normal_axes(axes[0], a), normal_axes(axes[1], b)
    if len(left) != len(right):
        raise ShapeError(f"axes {axes!r} are not as many on both sides")
    return left, right


def _tensordot(operands: Sequence[Operand], params: Params) -> Inferred:
    a, b = _two(operands)
    axes = params.get("axes", 2)
    left, right = tensordot_axes(axes, a.ndim, b.ndim)
    if [a.shape[i] for i in left] != [b.shape[j] for j in right]:
        raise ShapeError(f"shapes {a.shape} and {b.shape} differ along axes {left} and {right}")
    if is_int(axes):
        shape = a.shape[: a.ndim - axes] + b.shape[axes:]
    else:
        shape = reduced(a.shape, left, False) + reduced(b.shape, right, False)
    return ((shape, dtypes_of(_outer_product, a.dtype, b.dtype)[0]),)


def _outer_product(a: Any, b: Any) -> Any:
    """As dtypes go, any tensordot."""
    return np.tensordot(a, b, axes=0)


def _matrices(x: Meta, square: bool = False) -> tuple[Shape, int, int]:
    if x.ndim < 2:
        raise ShapeError(f"shape {x.shape} is not a matrix or a stack of matrices")
    if square and x.shape[-1] != x.shape[-2]:
        raise ShapeError(f"shape {x.shape}: the last two axes have to be of one length")
    return x.shape[:-2], x.shape[-2], x.shape[-1]


Parts = Callable[[Shape, int, int, Params], tuple[Shape, ...]]


def _decomposition(function: Callable[..., Any], parts: Parts, square: bool = False) -> Infer:
    """Ops on a stack of matrices. ``parts`` gives the shapes of the results from the shape of
    the stack, the rows, the columns and the parameters.
    """

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        if len(operands) != 1:
            raise ShapeError(f"{len(operands)} operands instead of 1")
        x = array_operand(operands)
        shapes = parts(*_matrices(x, square), params)
        return tuple(zip(shapes, dtypes_of(function, x.dtype, ndim=2), strict=True))

    return infer


def _same(stack: Shape, m: int, n: int, _params: Params) -> tuple[Shape, ...]:
    return ((*stack, m, n),)


def _svd(stack: Shape, m: int, n: int, params: Params) -> tuple[Shape, ...]:
    k = min(m, n)
    full = bool_param(params, "full_matrices", True)
    return (*stack, m, m if full else k), (*stack, k), (*stack, n if full else k, n)


def _triangle(params: Params) -> None:
    if params.get("uplo", "L") not in ("L", "U"):
        raise ShapeError(f"parameter uplo has to be 'L' or 'U', not {params['uplo']!r}")


def _eigh(stack: Shape, _m: int, n: int, params: Params) -> tuple[Shape, ...]:
    _triangle(params)
    return (*stack, n), (*stack, n, n)


def _eigvalsh(stack: Shape, _m: int, n: int, params: Params) -> tuple[Shape, ...]:
    _triangle(params)
    return ((*stack, n),)


def _qr(stack: Shape, m: int, n: int, params: Params) -> tuple[Shape, ...]:
    mode = params.get("mode", "reduced")
    if mode not in ("reduced", "complete", "raw"):
        raise ShapeError(f"parameter mode has to be reduced, complete or raw, not {mode!r}")
    if mode == "raw":  # what LAPACK gives: columns first
        return (*stack, n, m), (*stack, min(m, n))
    k = m if mode == "complete" else min(m, n)
    return (*stack, m, k), (*stack, k, n)


def _cholesky(stack: Shape, m: int, n: int, params: Params) -> tuple[Shape, ...]:
    bool_param(params, "upper")
    return ((*stack, m, n),)


def _pinv(stack: Shape, m: int, n: int, params: Params) -> tuple[Shape, ...]:
    if params.get("rtol") is not None:
        number_param(params, "rtol", 0.0)
    return ((*stack, n, m),)


def _eig(stack: Shape, _m: int, n: int, _params: Params) -> tuple[Shape, ...]:
    return (*stack, n), (*stack, n, n)


def _complex(function: Callable[..., Any]) -> Callable[..., Any]:
    """NumPy's function with complex results, which it gives only where the values ask for it."""

    def run(x: Any) -> Any:
        found = function(x)
        parts = found if isinstance(found, tuple) else (found,)
        return tuple(np.asarray(part) + np.complex64(0) for part in parts)

    return run


def _cond(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    p = params.get("p", 2)
    _check_order(p)
    stack, m, n = _matrices(x, square=p not in (2, -2))
    if not x.size:
        _refuse_no_elements((*stack, m, n), tuple(range(x.ndim)))
    return ((stack, dtypes_of(np.linalg.cond, x.dtype, ndim=2, p=p)[0]),)


def _solve(operands: Sequence[Operand], _params: Params) -> Inferred:
    a, b = _two(operands)
    stack, m, _ = _matrices(a, square=True)
    vector = b.ndim == 1
    if not b.ndim or b.shape[0 if vector else -2] != m:
        raise ShapeError(f"shapes {a.shape} and {b.shape} don't match")
    (dtype,) = dtypes_of(np.linalg.solve, a.dtype, b.dtype, ndim=2)
    if vector:
        return (((*stack, m), dtype),)
    return (((*broadcast(stack, b.shape[:-2]), m, b.shape[-1]), dtype),)


def _norm(operands: Sequence[Operand], params: Params) -> Inferred:
    """Norm of the vectors along an axis, or of all elements along several."""
    x = array_operand(operands)
    order = number_param(params, "ord", 2)
    axes = normal_axes(params.get("axis"), x.ndim)
    if order in (np.inf, -np.inf):
        _refuse_no_elements(x.shape, axes)
    shape = reduced(x.shape, axes, bool_param(params, "keepdims"))
    return ((shape, dtypes_of(np.linalg.norm, x.dtype, ord=order)[0]),)


def _refuse_no_elements(shape: Shape, axes: tuple[int, ...]) -> None:
    if not size_of(tuple(shape[axis] for axis in axes)):
        raise ShapeError(f"shape {shape} has no elements along axis {axes}")


def _check_order(order: Any) -> None:
    if order not in ("fro", "nuc", 1, -1, 2, -2, np.inf, -np.inf) or isinstance(order, bool):
        raise ShapeError(f"no matrix norm of ord {order!r}")


def _matrix_norm(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    order = params.get("ord", "fro")
    _check_order(order)
    stack, m, n = _matrices(x)
    if order not in ("fro", "nuc"):  # these are sums, also of nothing
        _refuse_no_elements((m, n), (0, 1))
    shape = (*stack, 1, 1) if bool_param(params, "keepdims") else stack
    return ((shape, dtypes_of(np.linalg.norm, x.dtype, ndim=2, ord=order)[0]),)


_only_r = partial(np.linalg.qr, mode="r")


def _spec(name: str, infer: Infer, *params: str, n_out: int = 1) -> OpSpec:
    return OpSpec(name, infer, n_out=n_out, params=frozenset(params))


def _stack_only(stack: Shape, _m: int, _n: int, _params: Params) -> tuple[Shape, ...]:
    return (stack,)


SPECS: list[OpSpec] = [
    _spec("matmul", _matmul),
    _spec("vecdot", _vecdot, "axis"),
    _spec("outer", _outer),
    _spec("tensordot", _tensordot, "axes"),
    _spec("svd", _decomposition(np.linalg.svd, _svd), "full_matrices", n_out=3),
    _spec(
        "svdvals",
        _decomposition(np.linalg.svdvals, lambda stack, m, n, _params: ((*stack, min(m, n)),)),
    ),
    _spec("eigh", _decomposition(np.linalg.eigh, _eigh, square=True), "uplo", n_out=2),
    _spec("eigvalsh", _decomposition(np.linalg.eigvalsh, _eigvalsh, square=True), "uplo"),
    _spec("eig", _decomposition(_complex(np.linalg.eig), _eig, square=True), n_out=2),
    _spec(
        "eigvals",
        _decomposition(
            _complex(np.linalg.eigvals),
            lambda stack, _m, n, _params: ((*stack, n),),
            square=True,
        ),
    ),
    _spec("qr", _decomposition(np.linalg.qr, _qr), "mode", n_out=2),
    _spec(
        "qr_r",
        _decomposition(_only_r, lambda stack, m, n, _params: ((*stack, min(m, n), n),)),
    ),
    _spec("cholesky", _decomposition(np.linalg.cholesky, _cholesky, square=True), "upper"),
    _spec("inv", _decomposition(np.linalg.inv, _same, square=True)),
    _spec("pinv", _decomposition(np.linalg.pinv, _pinv), "rtol"),
    _spec("det", _decomposition(np.linalg.det, _stack_only, square=True)),
    _spec(
        "slogdet",
        _decomposition(
            np.linalg.slogdet, lambda stack, _m, _n, _params: (stack, stack), square=True
        ),
        n_out=2,
    ),
    _spec("solve", _solve),
    _spec("norm", _norm, "ord", "axis", "keepdims"),
    _spec("matrix_norm", _matrix_norm, "ord", "keepdims"),
    OpSpec("linalg.cond", _cond, params=frozenset(["p"]), path="linalg.cond"),
]
