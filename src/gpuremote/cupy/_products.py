"""Products of arrays, and polynomials."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from gpuremote.cupy._array import axis_of, integers, ndarray, single, store
from gpuremote.cupy._counting import convolve
from gpuremote.cupy._creation import array_of, ones, operand, vander, zeros
from gpuremote.cupy._elementwise import UFUNCS
from gpuremote.cupy._manipulation import concatenate, trim_zeros
from gpuremote.errors import ShapeError, UnsupportedOp

__all__ = [
    "cross",
    "dot",
    "einsum",
    "inner",
    "kron",
    "matmul",
    "outer",
    "poly",
    "polyadd",
    "polyfit",
    "polymul",
    "polysub",
    "polyval",
    "roots",
    "tensordot",
    "vdot",
    "vecdot",
]


def matmul(
    x1: Any, x2: Any, /, out: Any = None, *, dtype: Any = None, casting: str = "same_kind"
) -> ndarray:
    a = array_of(x1)
    b = array_of(x2, a.device)
    if dtype is not None:
        a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
    found = single("matmul", a, b)
    return found if out is None else store(found, out, casting)


def dot(a: Any, b: Any, out: Any = None) -> Any:
    x, y = operand(a), operand(b)
    if not np.ndim(_shape(x)) or not getattr(x, "ndim", 0) or not getattr(y, "ndim", 0):
        return UFUNCS["multiply"](x, y, out=out)
    if y.ndim <= 2:
        return single("matmul", x, y, out=out)
    return single("tensordot", x, y, axes=((x.ndim - 1,), (y.ndim - 2,)), out=out)


def _shape(x: Any) -> Any:
    return getattr(x, "shape", ())


def inner(a: Any, b: Any) -> Any:
    x, y = operand(a), operand(b)
    if not getattr(x, "ndim", 0) or not getattr(y, "ndim", 0):
        return UFUNCS["multiply"](x, y)
    return single("tensordot", x, y, axes=((x.ndim - 1,), (y.ndim - 1,)))


def outer(a: Any, b: Any, out: Any = None) -> ndarray:
    return single("outer", array_of(a).ravel(), array_of(b).ravel(), out=out)


def vdot(a: Any, b: Any) -> ndarray:
    """The product of the flattened arrays, the first one conjugated."""
    x, y = array_of(a).ravel(), array_of(b).ravel()
    return single("matmul", x.conj() if x.dtype.kind == "c" else x, y)


def vecdot(
    x1: Any,
    x2: Any,
    /,
    out: Any = None,
    *,
    axis: int = -1,
    dtype: Any = None,
    casting: str = "same_kind",
) -> ndarray:
    a = array_of(x1)
    b = array_of(x2, a.device)
    if dtype is not None:
        a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
    found = single("vecdot", a, b, axis=operator.index(axis))
    return found if out is None else store(found, out, casting)


def tensordot(a: Any, b: Any, axes: Any = 2) -> Any:
    x, y = array_of(a), array_of(b)
    if isinstance(axes, tuple | list):
        axes = tuple(
            integers(side) if isinstance(side, tuple | list) else (operator.index(side),)
            for side in axes
        )
    else:
        axes = operator.index(axes)
    return single("tensordot", x, y, axes=axes)


def cross(
    a: Any, b: Any, axisa: int = -1, axisb: int = -1, axisc: int = -1, axis: int | None = None
) -> Any:
    """Products of vectors of three elements (or of two: the third component)."""
    if axis is not None:
        axisa = axisb = axisc = axis
    x, y = (_last(array_of(v), at) for v, at in ((a, axisa), (b, axisb)))
    if not {x.shape[-1], y.shape[-1]} <= {2, 3}:
        raise ShapeError(f"shapes {x.shape} and {y.shape}: vectors of 2 or 3 are needed")
    if x.shape[-1] == y.shape[-1] == 2:
        return x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0]
    x, y = (
        v
        if v.shape[-1] == 3
        else concatenate([v, zeros((*v.shape[:-1], 1), v.dtype, device=v.device)], -1)
        for v in (x, y)
    )
    found = single("cross", x, y)
    order = list(range(found.ndim - 1))
    order.insert(axis_of(axisc, found.ndim), found.ndim - 1)
    return found.transpose(order)


def _last(x: ndarray, axis: int) -> Any:
    at = axis_of(axis, x.ndim)
    return x.transpose([*(i for i in range(x.ndim) if i != at), at])


def kron(a: Any, b: Any) -> Any:
    x, y = array_of(a), array_of(b)
    ndim = max(x.ndim, y.ndim)
    x, y = (v.reshape((1,) * (ndim - v.ndim) + v.shape) for v in (x, y))
    spread = x.reshape([n for length in x.shape for n in (length, 1)])
    inner_part = y.reshape([n for length in y.shape for n in (1, length)])
    shape = tuple(m * n for m, n in zip(x.shape, y.shape, strict=True))
    return (spread * inner_part).reshape(shape)


def einsum(subscripts: Any, *operands: Any, **kwargs: Any) -> ndarray:
    """Sums of products, named by letters.

    Parameters
    ----------
    subscripts : str
        At most 64 characters.
    optimize, order, casting
        Taken as NumPy's, without effect.
    """
    if not isinstance(subscripts, str):
        raise UnsupportedOp("einsum takes its subscripts as a string", op="einsum")
    arrays = [array_of(x) for x in operands]
    dtype, out = kwargs.pop("dtype", None), kwargs.pop("out", None)
    if kwargs.keys() - {"optimize", "order", "casting"}:
        raise TypeError(f"einsum takes no {', '.join(kwargs)}")
    if dtype is not None:
        arrays = [x.astype(dtype, copy=False) for x in arrays]
    return single("einsum", *arrays, subscripts=subscripts.replace(" ", ""), out=out)


# -- polynomials: coefficients from the highest power down --------------------------------------


def polyval(p: Any, x: Any) -> ndarray:
    coefficients, points = array_of(p), operand(x)
    found: Any = points * 0
    for k in range(coefficients.size):
        found = found * points + coefficients[k]
    return array_of(found)


def _padded(a1: Any, a2: Any) -> tuple[ndarray, ndarray]:
    x, y = array_of(a1).reshape(-1), array_of(a2).reshape(-1)
    size = max(x.size, y.size)
    first, second = (
        v if v.size == size else concatenate([zeros(size - v.size, v.dtype, device=v.device), v])
        for v in (x, y)
    )
    return first, second


def polyadd(a1: Any, a2: Any) -> ndarray:
    first, second = _padded(a1, a2)
    return first + second


def polysub(a1: Any, a2: Any) -> ndarray:
    first, second = _padded(a1, a2)
    return first - second


def polymul(a1: Any, a2: Any) -> ndarray:
    x, y = (trim_zeros(array_of(a).reshape(-1), "f") for a in (a1, a2))
    return convolve(x if x.size else zeros(1), y if y.size else zeros(1))


def polyfit(
    x: Any,
    y: Any,
    deg: int,
    rcond: float | None = None,
    full: bool = False,
    w: Any = None,
    cov: Any = False,
) -> Any:
    """The polynomial of least squares; its coefficients are all that is given."""
    if full or cov:
        raise UnsupportedOp("polyfit gives coefficients only: full and cov are not offered")
    points, values = array_of(x).astype(float), array_of(y)
    values = values + 0.0
    if points.ndim != 1 or not points.size or values.shape[:1] != points.shape:
        raise TypeError(f"points of shape {points.shape}, values of shape {values.shape}")
    left = vander(points, deg + 1)
    if w is not None:
        weights = array_of(w).astype(float)
        left = left * weights.reshape(-1, 1)
        values = values * (weights.reshape(-1, 1) if values.ndim == 2 else weights)
    scale = UFUNCS["sqrt"]((left * left).sum(axis=0))
    cut = points.size * float(np.finfo(float).eps) if rcond is None else rcond
    solved = single("pinv", left / scale, rtol=cut) @ values
    return (solved.T / scale).T


def poly(seq_of_zeros: Any) -> ndarray:
    """The polynomial with these roots, or the characteristic one of a square matrix."""
    zeros_ = array_of(seq_of_zeros)
    if zeros_.ndim == 2 and zeros_.shape[0] == zeros_.shape[1]:
        zeros_ = single("eigvals", zeros_)
    if zeros_.ndim != 1:
        raise ValueError("roots along one axis, or a square matrix, are needed")
    if not zeros_.size:
        return ones(())
    if zeros_.dtype.kind not in "fc" or zeros_.dtype.itemsize == 2:
        zeros_ = zeros_.astype(float)
    found = ones(1, zeros_.dtype, device=zeros_.device)
    for k in range(zeros_.size):
        factor = concatenate([ones(1, zeros_.dtype, device=zeros_.device), -zeros_[k : k + 1]])
        found = convolve(found, factor)
    return found


def roots(p: Any) -> ndarray:
    """The roots, as eigenvalues; waits for the place of the first and last coefficient that is
    not zero."""
    coefficients = array_of(p)
    if coefficients.ndim != 1:
        raise ValueError("coefficients along one axis are needed")
    front = trim_zeros(coefficients, "f")
    core = trim_zeros(front, "b")
    behind = front.size - core.size
    degree = core.size - 1
    if degree < 1:
        return zeros(max(behind if core.size else 0, 0))
    kind = np.result_type(core.dtype, np.float64)
    companion = zeros((degree, degree), kind, device=core.device)
    if degree > 1:
        companion.reshape(-1)[degree :: degree + 1] = 1
    companion[0, :] = -core[1:] / core[0]
    found = single("eigvals", companion)
    if behind:
        found = concatenate([found, zeros(behind, found.dtype, device=found.device)])
    return found
