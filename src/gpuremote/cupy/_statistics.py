"""Reductions, running sums, averages, histograms."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.cupy._array import axis_of, integers, ndarray, several, single, wire
from gpuremote.cupy._creation import array_of, full, operand
from gpuremote.cupy._elementwise import UFUNCS
from gpuremote.errors import ShapeError

__all__ = [
    "all",
    "amax",
    "amin",
    "any",
    "argmax",
    "argmin",
    "average",
    "corrcoef",
    "count_nonzero",
    "cov",
    "cumprod",
    "cumsum",
    "cumulative_prod",
    "cumulative_sum",
    "diff",
    "ediff1d",
    "flag",
    "gradient",
    "max",
    "mean",
    "median",
    "min",
    "nanargmax",
    "nanargmin",
    "nancumprod",
    "nancumsum",
    "nanmax",
    "nanmean",
    "nanmedian",
    "nanmin",
    "nanprod",
    "nanstd",
    "nansum",
    "nanvar",
    "percentile",
    "plain",
    "prod",
    "ptp",
    "quantile",
    "std",
    "sum",
    "trapezoid",
    "unwrap",
    "var",
]

_divide, _subtract, _multiply = UFUNCS["divide"], UFUNCS["subtract"], UFUNCS["multiply"]


def plain(value: Any) -> Any:
    """A number as one of Python's; one on the device is waited for."""
    return value.item() if isinstance(value, np.generic | ndarray) else value


def flag(keepdims: Any) -> bool | None:
    return True if keepdims is True or (keepdims is not False and bool(keepdims)) else None


def sum(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return array_of(a).sum(axis, dtype, out, keepdims)


def prod(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return array_of(a).prod(axis, dtype, out, keepdims)


def mean(
    a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return array_of(a).mean(axis, dtype, out, keepdims)


def max(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return array_of(a).max(axis, out, keepdims)


def min(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return array_of(a).min(axis, out, keepdims)


amax, amin = max, min


def all(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return array_of(a).all(axis, out, keepdims)


def any(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return array_of(a).any(axis, out, keepdims)


def ptp(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return array_of(a).ptp(axis, out, keepdims)


def argmax(
    a: Any, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return array_of(a).argmax(axis, dtype, out, keepdims)


def argmin(
    a: Any, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return array_of(a).argmin(axis, dtype, out, keepdims)


def var(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    return array_of(a).var(axis, dtype, out, ddof if correction is None else correction, keepdims)


def std(
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    correction: float | None = None,
) -> Any:
    return array_of(a).std(axis, dtype, out, ddof if correction is None else correction, keepdims)


def count_nonzero(a: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    return single("count_nonzero", array_of(a), axis=integers(axis), keepdims=flag(keepdims))


def cumsum(a: Any, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
    return array_of(a).cumsum(axis, dtype, out)


def cumprod(a: Any, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
    return array_of(a).cumprod(axis, dtype, out)


def _cumulative(name: str) -> Callable[..., Any]:
    def function(
        x: Any,
        /,
        *,
        axis: int | None = None,
        dtype: npt.DTypeLike | None = None,
        out: Any = None,
        include_initial: bool = False,
    ) -> Any:
        x = array_of(x)
        if axis is None and x.ndim > 1:
            raise ValueError("an axis has to be named for an array of more than one")
        return single(
            name,
            x if x.ndim else x.reshape(1),
            axis=integers(-1 if axis is None else axis),
            dtype=None if dtype is None else wire(dtype),
            include_initial=flag(include_initial),
            out=out,
        )

    function.__name__ = function.__qualname__ = name
    return function


cumulative_sum = _cumulative("cumulative_sum")
cumulative_prod = _cumulative("cumulative_prod")


def _nan_reduction(name: str, spread: bool = False, dtyped: bool = True) -> Callable[..., Any]:
    """Reductions that leave NaN out."""
    if spread:

        def function(
            a: Any,
            axis: Any = None,
            dtype: Any = None,
            out: Any = None,
            ddof: float = 0,
            keepdims: bool = False,
        ) -> Any:
            kind = None if dtype is None else wire(dtype)
            axes, keep = integers(axis), flag(keepdims)
            x = array_of(a)
            return single(name, x, axis=axes, dtype=kind, ddof=ddof, keepdims=keep, out=out)

    elif dtyped:

        def function(  # type: ignore[misc]
            a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
        ) -> Any:
            kind = None if dtype is None else wire(dtype)
            axes, keep = integers(axis), flag(keepdims)
            return single(name, array_of(a), axis=axes, dtype=kind, keepdims=keep, out=out)

    else:

        def function(  # type: ignore[misc]
            a: Any, axis: Any = None, out: Any = None, keepdims: bool = False
        ) -> Any:
            axes, keep = integers(axis), flag(keepdims)
            return single(name, array_of(a), axis=axes, keepdims=keep, out=out)

    function.__name__ = function.__qualname__ = name
    return function


nansum = _nan_reduction("nansum")
nanprod = _nan_reduction("nanprod")
nanmean = _nan_reduction("nanmean")
nanvar = _nan_reduction("nanvar", spread=True)
nanstd = _nan_reduction("nanstd", spread=True)
nanmax = _nan_reduction("nanmax", dtyped=False)
nanmin = _nan_reduction("nanmin", dtyped=False)


def nanargmax(
    a: Any, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return single("nanargmax", array_of(a), axis=integers(axis), keepdims=flag(keepdims), out=out)


def nanargmin(
    a: Any, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
) -> Any:
    return single("nanargmin", array_of(a), axis=integers(axis), keepdims=flag(keepdims), out=out)


def nancumsum(a: Any, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
    kind = None if dtype is None else wire(dtype)
    return single("nancumsum", array_of(a), axis=integers(axis), dtype=kind, out=out)


def nancumprod(a: Any, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
    kind = None if dtype is None else wire(dtype)
    return single("nancumprod", array_of(a), axis=integers(axis), dtype=kind, out=out)


def median(
    a: Any,
    axis: Any = None,
    out: Any = None,
    overwrite_input: bool = False,
    keepdims: bool = False,
) -> Any:
    x = array_of(a)
    keep = flag(keepdims) if x.ndim else None  # CuPy makes an axis where there was none
    return single("median", x, axis=integers(axis), keepdims=keep, out=out)


def nanmedian(
    a: Any,
    axis: Any = None,
    out: Any = None,
    overwrite_input: bool = False,
    keepdims: bool = False,
) -> Any:
    x = array_of(a)
    keep = flag(keepdims) if x.ndim else None
    return single("nanmedian", x, axis=integers(axis), keepdims=keep, out=out)


def _at(name: str) -> Callable[..., Any]:
    def function(
        a: Any,
        q: Any,
        axis: Any = None,
        out: Any = None,
        overwrite_input: bool = False,
        method: str = "linear",
        keepdims: bool = False,
    ) -> Any:
        places = operand(q)
        axes, keep = integers(axis), flag(keepdims)
        return single(name, array_of(a), places, axis=axes, method=method, keepdims=keep, out=out)

    function.__name__ = function.__qualname__ = name
    return function


quantile, percentile = _at("quantile"), _at("percentile")


def average(
    a: Any,
    axis: Any = None,
    weights: Any = None,
    returned: bool = False,
    *,
    keepdims: bool = False,
) -> Any:
    x = array_of(a)
    if weights is None:
        found = x.mean(axis=axis, keepdims=keepdims)
        if not returned:
            return found
        count = x.size // found.size if found.size else 0
        return found, full(found.shape, float(count), found.dtype, device=found.device)
    w = array_of(weights)
    kind = np.result_type(x.dtype, w.dtype, *(["f8"] if x.dtype.kind in "iub" else []))
    if w.shape != x.shape:
        axes = integers(axis)
        if isinstance(axes, tuple):
            (axes,) = axes
        if axes is None or w.shape != (x.shape[axes],):
            raise ShapeError(f"weights of shape {w.shape} for shape {x.shape} along {axis}")
        w = w.reshape((-1,) + (1,) * (x.ndim - 1 - axes % x.ndim))
        w = single("broadcast_to", w, shape=x.shape)
    total = w.sum(axis=axis, dtype=kind, keepdims=keepdims)
    found = (x * w).sum(axis=axis, dtype=kind, keepdims=keepdims) / total
    return (found, total) if returned else found


def cov(
    a: Any,
    y: Any = None,
    rowvar: bool = True,
    bias: bool = False,
    ddof: int | None = None,
    fweights: Any = None,
    aweights: Any = None,
    *,
    dtype: npt.DTypeLike | None = None,
) -> Any:
    """The covariance of variables, each a row (or a column, without ``rowvar``)."""
    x = array_of(a)
    if x.ndim > 2:
        raise ShapeError(f"shape {x.shape}: one or two axes are needed", op="cov")
    others = [x] if y is None else [x, array_of(y)]
    kind = (
        np.dtype(dtype)
        if dtype is not None
        else np.result_type(*(o.dtype for o in others), np.float64)
    )
    rows = [_rows(o, rowvar or o.ndim == 1).astype(kind) for o in others]
    data = several("concat", rows, axis=0)[0] if len(rows) > 1 else rows[0]
    if not rowvar and y is None and x.ndim == 2 and x.shape[0] == 1:
        data = x.T.astype(kind)
    w = _weights(fweights, aweights)
    ddof = ddof if ddof is not None else (0 if bias else 1)
    if w is None:
        total: Any = data.shape[1]
        scale: Any = total - ddof if total > ddof else 0
        data = data - data.mean(axis=1, keepdims=True)
        weighted = data
    else:
        total = w.sum()
        scale = (
            total - ddof
            if aweights is None or ddof == 0
            else (total - ddof * (w * array_of(aweights)).sum() / total)
        )
        data = data - (data * w).sum(axis=1, keepdims=True) / total
        weighted = data * w
    found = (data @ weighted.T.conj()) * (_inverse(scale) if w is None else 1 / scale)
    return found.squeeze()


def _inverse(count: float) -> float:
    return 1 / count if count else float("inf")


def _rows(x: ndarray, rowvar: bool) -> Any:
    if x.ndim < 2:
        return x.reshape(1, -1)
    return x if rowvar else x.T


def _weights(frequency: Any, importance: Any) -> Any:
    if frequency is None and importance is None:
        return None
    if frequency is None or importance is None:
        return array_of(importance if frequency is None else frequency).astype(float)
    return array_of(frequency) * array_of(importance).astype(float)


def corrcoef(
    a: Any, y: Any = None, rowvar: bool = True, *, dtype: npt.DTypeLike | None = None
) -> Any:
    c = cov(a, y, rowvar, dtype=dtype)
    if not c.ndim:
        return c / c
    d = UFUNCS["sqrt"](c.diagonal().real)
    c = c / d.reshape(-1, 1) / d.reshape(1, -1)
    if c.dtype.kind == "c":
        real, imag = (single("clip", part, -1, 1) for part in (c.real, c.imag))
        return real + 1j * imag
    return single("clip", c, -1, 1)


# -- differences --------------------------------------------------------------------------------


def diff(a: Any, n: int = 1, axis: int = -1, prepend: Any = None, append: Any = None) -> ndarray:
    x = array_of(a)
    n = operator.index(n)
    if n < 0 or not x.ndim:
        raise ValueError(f"{n} differences of an array with {x.ndim} axes")
    axis = axis_of(axis, x.ndim)
    if n and (prepend is not None or append is not None):
        ends = [None if e is None else _end(array_of(e), x, axis) for e in (prepend, append)]
        parts = [p for p in (ends[0], x, ends[1]) if p is not None]
        x = several("concat", parts, axis=axis)[0]
    before = (slice(None),) * axis
    minus = UFUNCS["not_equal"] if x.dtype.kind == "b" else _subtract
    for _ in range(n):
        x = minus(x[(*before, slice(1, None))], x[(*before, slice(None, -1))])
    return x


def _end(value: ndarray, x: ndarray, axis: int) -> ndarray:
    if value.ndim:
        return value
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    return single("broadcast_to", value, shape=shape)


def ediff1d(ary: Any, to_end: Any = None, to_begin: Any = None) -> ndarray:
    x = array_of(ary).ravel()
    steps = x[1:] - x[:-1]
    ends = [
        None if end is None else array_of(end).ravel().astype(steps.dtype)
        for end in (to_begin, to_end)
    ]
    parts = [part for part in (ends[0], steps, ends[1]) if part is not None]
    return steps if len(parts) == 1 else several("concat", parts, axis=0)[0]


def gradient(f: Any, *varargs: Any, axis: Any = None, edge_order: int = 1) -> Any:
    """The slopes along each axis: an array, or a tuple of one for each."""
    found = several(
        "gradient",
        (array_of(f), *map(operand, varargs)),
        axis=integers(axis),
        edge_order=operator.index(edge_order),
    )
    return found[0] if len(found) == 1 else tuple(found)


def trapezoid(y: Any, x: Any = None, dx: float = 1.0, axis: int = -1) -> Any:
    values = array_of(y)
    if x is None:
        steps: Any = dx
    else:
        points = array_of(x)
        steps = diff(points, axis=axis if points.ndim > 1 else 0)
        if points.ndim == 1:
            shape = [1] * values.ndim
            shape[axis] = steps.size
            steps = steps.reshape(shape)
    before = (slice(None),) * (axis % values.ndim)
    pairs = values[(*before, slice(1, None))] + values[(*before, slice(None, -1))]
    return (steps * pairs / 2.0).sum(axis=axis)


def unwrap(p: Any, discont: Any = None, axis: int = -1, *, period: float = 2 * np.pi) -> ndarray:
    default = period == 2 * np.pi
    return single(
        "unwrap",
        array_of(p),
        axis=operator.index(axis),
        discont=plain(discont),
        period=None if default else plain(period),
    )
