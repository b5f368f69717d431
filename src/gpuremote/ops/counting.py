"""Functions that count, look for elements, or write to some: see ``functions``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.functions import INTP, exactly, function
from gpuremote.ops.indexing import check_value_shape
from gpuremote.ops.operands import DType, Operand, array_operand, default_dtype, kind_of, shape_of
from gpuremote.ops.shapes import (
    bool_param,
    broadcast,
    dtypes_of,
    int_param,
    is_int,
    joined_dtype,
    normal_axis,
    shape_param,
)
from gpuremote.ops.spec import VARIES, Infer, Inferred, OpSpec, Params

__all__ = ["SCATTERED", "SPECS"]


def _given(
    spec_names: tuple[str, ...], required: int, operands: Sequence[Operand], params: Params
) -> dict[str, Operand]:
    """Operands that may be missing, by their keywords."""
    given = params.get("given", ())
    if given == () and len(operands) == required:
        return {}
    if (
        not isinstance(given, tuple | list)
        or not set(given) <= set(spec_names)
        or len(set(given)) != len(given)
        or len(operands) != required + len(given)
    ):
        raise ShapeError(f"{len(operands)} operands with {given!r} named")
    return dict(zip(given, operands[required:], strict=True))


# -- counting -----------------------------------------------------------------------------------


def _bincount(operands: Sequence[Operand], params: Params) -> Inferred:
    weights = _given(("weights",), 1, operands, params).get("weights")
    x = array_operand(operands)
    if x.ndim != 1 or x.dtype.kind not in "iub":
        raise DTypeError(f"{x.dtype} of shape {x.shape}: integers along one axis are needed")
    if weights is not None and shape_of(weights) != x.shape:
        raise ShapeError(f"weights of shape {shape_of(weights)} for shape {x.shape}")
    # How many there are is the client's to find out, before it asks.
    length = shape_param({"minlength": int_param(params, "minlength", 0)}, "minlength")
    kinds = [x.dtype] if weights is None or not x.size else [x.dtype, kind_of(weights)]
    return ((length, dtypes_of(np.bincount, *kinds)[0]),)


_HISTOGRAM = ("bins", "weights")


def _histogram(operands: Sequence[Operand], params: Params) -> Inferred:
    given = _given(_HISTOGRAM, 1, operands, params)
    x = array_operand(operands)
    edges, weights = given.get("bins"), given.get("weights")
    extra: dict[str, Any] = {"density": bool_param(params, "density")}
    if params.get("range") is not None:
        _range(params["range"])
        extra["range"] = (0.0, 2.0)
    if edges is None:
        bins = int_param(params, "bins", 10)
        if bins < 1:
            raise ShapeError(f"{bins} bins")
        found = dtypes_of(_two_bins, x.dtype, *_kinds(weights), **extra)
    else:
        shape = shape_of(edges)
        if len(shape) != 1 or shape[0] < 2:
            raise ShapeError(f"edges of bins of shape {shape}")
        bins = shape[0] - 1
        counts = dtypes_of(_two_bins, x.dtype, *_kinds(weights), **extra)[0]
        found = (counts, array_operand([edges]).dtype)
    if weights is not None and shape_of(weights) != x.shape:
        raise ShapeError(f"weights of shape {shape_of(weights)} for shape {x.shape}")
    return (((bins,), found[0]), ((bins + 1,), found[1]))


def _kinds(operand: Operand | None) -> tuple[Any, ...]:
    return () if operand is None else (kind_of(operand),)


def _counted(x: Any, weights: Any = None, **kwargs: Any) -> Any:
    return np.histogram(x, weights=weights, **kwargs)


_two_bins = partial(_counted, bins=2)  # made once, as what NumPy says is kept by it


def _range(value: Any) -> None:
    if (
        not isinstance(value, tuple | list)
        or len(value) != 2
        or not all(is_int(v) or isinstance(v, float) for v in value)
    ):
        raise ShapeError(f"parameter range has to be two numbers, not {value!r}")


def _histogramdd(operands: Sequence[Operand], params: Params) -> Inferred:
    weights = _given(("weights",), 1, operands, params).get("weights")
    x = array_operand(operands)
    bins = params.get("bins")
    if x.ndim != 2 or not isinstance(bins, tuple | list) or len(bins) != x.shape[1]:
        raise ShapeError(f"a number of bins is needed for each of the columns of {x.shape}")
    if not all(is_int(n) and n > 0 for n in bins):
        raise ShapeError(f"bins {bins!r}")
    for pair in params.get("range") or ():
        if pair is not None:
            _range(pair)
    bool_param(params, "density")
    if weights is not None and shape_of(weights) != x.shape[:1]:
        raise ShapeError(f"weights of shape {shape_of(weights)} for {x.shape[0]} points")
    (edges,) = dtypes_of(_edges, x.dtype)
    return ((tuple(bins), np.dtype(float)), *(((n + 1,), edges) for n in bins))


def _edges(x: Any) -> Any:
    return np.histogramdd(x.reshape(1, 1), bins=(2,))[1][0]


def _convolved(function: Callable[..., Any]) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 2)
        a, b = array_operand(operands), array_operand(operands, 1)
        if a.ndim != 1 or b.ndim != 1 or not a.size or not b.size:
            raise ShapeError(f"shapes {a.shape} and {b.shape}: one axis with elements is needed")
        mode = params.get("mode", "full")
        most, least = max(a.size, b.size), min(a.size, b.size)
        lengths = {"full": most + least - 1, "same": most, "valid": most - least + 1}
        if mode not in lengths:
            raise ShapeError(f"parameter mode has to be full, same or valid, not {mode!r}")
        return (((lengths[mode],), dtypes_of(function, a.dtype, b.dtype)[0]),)

    return infer


def _put(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 3)
    array_operand(operands)
    if array_operand(operands, 1).dtype.kind not in "iu":
        raise DTypeError(f"indices have to be integers, not {kind_of(operands[1])}")
    if params.get("mode", "raise") not in ("raise", "wrap", "clip"):
        raise ShapeError(f"no mode {params['mode']!r}")
    return ()


def _masked(operands: Sequence[Operand], _params: Params) -> Inferred:
    exactly(operands, 3)
    x, mask = array_operand(operands), array_operand(operands, 1)
    if mask.size != x.size:
        raise ShapeError(f"a mask of shape {mask.shape} for an array of shape {x.shape}")
    return ()


def _put_along_axis(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 3)
    x, indices = array_operand(operands), array_operand(operands, 1)
    if indices.dtype.kind not in "iu" or indices.ndim != x.ndim:
        raise ShapeError(f"indices {indices.dtype}{indices.shape} for an array of {x.shape}")
    normal_axis(params.get("axis", -1), x.ndim)
    return ()


def _scatter(operands: Sequence[Operand], _params: Params) -> Inferred:
    x = array_operand(operands)
    if not 3 <= len(operands) <= 2 + x.ndim:
        raise ShapeError(f"{len(operands) - 2} index arrays for an array of shape {x.shape}")
    places = [array_operand(operands, k) for k in range(2, len(operands))]
    if any(place.dtype.kind not in "iu" for place in places):
        raise DTypeError("index arrays have to be of integers")
    joint = broadcast(*(place.shape for place in places))
    value = shape_of(operands[1])
    check_value_shape((*joint, *x.shape[len(places) :]), value)
    if not np.can_cast(default_dtype(kind_of(operands[1])), x.dtype, "same_kind"):
        raise DTypeError(f"{kind_of(operands[1])} does not go into an array of {x.dtype}")
    return ()


def _fill_diagonal(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 2)
    x = array_operand(operands)
    bool_param(params, "wrap")
    if x.ndim < 2 or (x.ndim > 2 and len(set(x.shape)) > 1):
        raise ShapeError(f"shape {x.shape} has no diagonal to fill")
    return ()


# -- shapes that depend on values ---------------------------------------------------------------


def _flat(dtype: DType | None = None) -> Infer:
    def infer(operands: Sequence[Operand], _params: Params) -> Inferred:
        exactly(operands, 1)
        x = array_operand(operands)
        return (((x.size,), dtype or x.dtype),)

    return infer


def _unique(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    bool_param(params, "equal_nan", True)
    flags = [bool_param(params, f"return_{name}") for name in ("index", "inverse", "counts")]
    axis = params.get("axis")
    if axis is None:
        bound: Shape = (x.size,)
        inverse: Shape = x.shape
        length = x.size
    else:
        at = normal_axis(axis, x.ndim)
        bound, length = x.shape, x.shape[at]
        inverse = (length,)
    if not any(flags):
        return ((bound, x.dtype),)
    counted: list[tuple[Shape, DType]] = [((length,), INTP), (inverse, INTP), ((length,), INTP)]
    return ((bound, x.dtype), *(one for one, flag in zip(counted, flags, strict=True) if flag))


def _sets(joined: bool) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 2)
        a, b = array_operand(operands), array_operand(operands, 1)
        bool_param(params, "assume_unique")
        (dtype,) = dtypes_of(joined_dtype, *dict.fromkeys((a.dtype, b.dtype)))
        return (((a.size + b.size,), dtype),) if joined else (((a.size,), a.dtype),)

    return infer


def _argwhere(operands: Sequence[Operand], _params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    return (((x.size, x.ndim), INTP),)


def _extract(operands: Sequence[Operand], _params: Params) -> Inferred:
    exactly(operands, 2)
    mask, x = array_operand(operands), array_operand(operands, 1)
    if mask.size != x.size:
        raise ShapeError(f"a condition of shape {mask.shape} for an array of shape {x.shape}")
    return (((x.size,), x.dtype),)


def _compress(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 2)
    mask, x = array_operand(operands), array_operand(operands, 1)
    axis = params.get("axis")
    shape = (x.size,) if axis is None else x.shape
    at = normal_axis(0 if axis is None else axis, len(shape))
    if mask.ndim != 1 or mask.size > shape[at]:
        raise ShapeError(f"a condition of shape {mask.shape} along axis {at} of shape {shape}")
    return (((*shape[:at], mask.size, *shape[at + 1 :]), x.dtype),)


def _trim_zeros(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    trim = params.get("trim", "fb")
    if x.ndim != 1 or not isinstance(trim, str) or not set(trim.lower()) <= {"f", "b"}:
        raise ShapeError(f"shape {x.shape} trimmed at {trim!r}")
    return ((x.shape, x.dtype),)


SCATTERED = (
    "add",
    "subtract",
    "maximum",
    "minimum",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
)
"""Ufuncs that have ``at``: those that CuPy has it for."""

SPECS: list[OpSpec] = [
    *(function(f"{name}.at", _scatter, inplace=True) for name in SCATTERED),
    function("bincount", _bincount, "minlength", names=("weights",)),
    function("histogram", _histogram, "bins", "range", "density", n_out=2, names=_HISTOGRAM),
    function("convolve", _convolved(np.convolve), "mode"),
    function("correlate", _convolved(np.correlate), "mode"),
    function("put", _put, "mode", inplace=True),
    function("place", _masked, inplace=True),
    function("putmask", _masked, inplace=True),
    function("put_along_axis", _put_along_axis, "axis", inplace=True),
    function("fill_diagonal", _fill_diagonal, "wrap", inplace=True),
    function(
        "histogramdd", _histogramdd, "bins", "range", "density", n_out=VARIES, names=("weights",)
    ),
    function(
        "unique",
        _unique,
        "return_index",
        "return_inverse",
        "return_counts",
        "axis",
        "equal_nan",
        n_out=VARIES,
        data_dependent=True,
    ),
    function("union1d", _sets(True), data_dependent=True),
    function("intersect1d", _sets(True), "assume_unique", data_dependent=True),
    function("setxor1d", _sets(True), "assume_unique", data_dependent=True),
    function("setdiff1d", _sets(False), "assume_unique", data_dependent=True),
    function("argwhere", _argwhere, data_dependent=True),
    function("flatnonzero", _flat(INTP), data_dependent=True),
    function("extract", _extract, data_dependent=True),
    function("compress", _compress, "axis", data_dependent=True),
    function("trim_zeros", _trim_zeros, "trim", data_dependent=True),
]
