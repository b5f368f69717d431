"""Functions that a namespace like NumPy's has by the same name: what comes out of each.

An op here is ``path(*operands, **parameters)``, so the rule is all there is to say of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import DType, Operand, array_operand, kind_of, shape_of
from gpuremote.ops.shapes import (
    bool_param,
    broadcast,
    dtype_param,
    dtypes_of,
    int_param,
    is_int,
    joined_dtype,
    normal_axes,
    normal_axis,
    number_param,
    reduced,
    shape_param,
)
from gpuremote.ops.spec import VARIES, Infer, Inferred, OpSpec, Params
from gpuremote.ops.ufuncs import refuse_complex_to_real

__all__ = ["INTP", "SPECS", "elementwise", "exactly", "function", "reduction"]

INTP: DType = np.dtype(np.intp)


def function(
    path: str,
    infer: Infer,
    *params: str,
    n_out: int = 1,
    names: tuple[str, ...] = (),
    inplace: bool = False,
    data_dependent: bool = False,
    name: str = "",
) -> OpSpec:
    """The spec of an op that is done by the function at ``path``, named like it."""
    return OpSpec(
        name or path + "_" * inplace,
        infer,
        n_out=0 if inplace else n_out,
        params=frozenset(params) | ({"given"} if names else frozenset()),
        inplace=inplace,
        data_dependent=data_dependent,
        path=path,
        names=names,
    )


def exactly(operands: Sequence[Operand], n: int) -> None:
    if len(operands) != n:
        raise ShapeError(f"{len(operands)} operands instead of {n}")


# -- elementwise --------------------------------------------------------------------------------


def elementwise(function: Callable[..., Any], n: int = 1, **samples: Any) -> Infer:
    """Operands that broadcast; the dtype is what the function gives, whatever the parameters."""

    def infer(operands: Sequence[Operand], _params: Params) -> Inferred:
        exactly(operands, n)
        if Meta not in map(type, operands):
            raise DTypeError("one operand at least has to be an array")
        shape = broadcast(*map(shape_of, operands))
        dtypes = dtypes_of(function, *map(kind_of, operands), **samples)
        return tuple([(shape, dtype) for dtype in dtypes])

    return infer


def _nan_to_num(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    for name in ("nan", "posinf", "neginf"):
        if params.get(name) is not None:
            number_param(params, name, 0.0)
    return ((x.shape, x.dtype),)


def _isin(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 2)
    x, _ = array_operand(operands), array_operand(operands, 1)
    bool_param(params, "invert")
    (dtype,) = dtypes_of(np.isin, *map(kind_of, operands))
    return ((x.shape, dtype),)


_compared = elementwise(np.isclose, 2)


def _isclose(operands: Sequence[Operand], params: Params) -> Inferred:
    if params:
        for name in ("rtol", "atol"):
            number_param(params, name, 0.0)
        bool_param(params, "equal_nan")
    return _compared(operands, params)


def _interp(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 3)
    xp, fp = array_operand(operands, 1), array_operand(operands, 2)
    if xp.ndim != 1 or xp.shape != fp.shape or not xp.size:
        raise ShapeError(f"points of shape {xp.shape} with values of shape {fp.shape}")
    for name in ("left", "right", "period"):
        if params.get(name) is not None:
            number_param(params, name, 0.0)
    (dtype,) = dtypes_of(np.interp, *map(kind_of, operands))
    return ((shape_of(operands[0]), dtype),)


def _choose(operands: Sequence[Operand], params: Params) -> Inferred:
    index = array_operand(operands)
    if index.dtype.kind not in "iub" or len(operands) < 2:
        raise DTypeError("integers are needed, and something to choose from")
    if params.get("mode", "raise") not in ("raise", "wrap", "clip"):
        raise ShapeError(f"no mode {params['mode']!r}")
    kinds = dict.fromkeys(map(kind_of, operands[1:]))
    (dtype,) = dtypes_of(joined_dtype, *kinds)
    return ((broadcast(*map(shape_of, operands)), dtype),)


# -- reductions ---------------------------------------------------------------------------------


def _dtyped(x: Meta, params: Params) -> dict[str, Any]:
    dtype = dtype_param(params)
    if dtype is None:
        return {}
    if dtype.kind != "b":
        refuse_complex_to_real(x.dtype, dtype)
    return {"dtype": dtype}


def reduction(function: Callable[..., Any], *, empty: bool = True) -> Infer:
    """Along axes. ``empty``: an element of the result may be made from none."""

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 1)
        x = array_operand(operands)
        axes = normal_axes(params.get("axis"), x.ndim)
        number_param(params, "ddof", 0)
        shape = reduced(x.shape, axes, bool_param(params, "keepdims"))
        if not (empty or x.size) and any(x.shape[axis] == 0 for axis in axes):
            raise ShapeError(f"shape {x.shape} has no elements along axis {axes}")
        return ((shape, dtypes_of(function, x.dtype, **_dtyped(x, params))[0]),)

    return infer


def _position(function: Callable[..., Any]) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 1)
        x = array_operand(operands)
        axis = params.get("axis")
        axes = normal_axes(None, x.ndim) if axis is None else (normal_axis(axis, x.ndim),)
        if not x.size and any(x.shape[i] == 0 for i in axes):
            raise ShapeError(f"shape {x.shape} has no elements along axis {axes}")
        shape = reduced(x.shape, axes, bool_param(params, "keepdims"))
        return ((shape, dtypes_of(function, x.dtype)[0]),)

    return infer


_METHODS = frozenset(
    {
        "inverted_cdf",
        "averaged_inverted_cdf",
        "closest_observation",
        "interpolated_inverted_cdf",
        "hazen",
        "weibull",
        "linear",
        "median_unbiased",
        "normal_unbiased",
        "lower",
        "higher",
        "midpoint",
        "nearest",
    }
)


def _quantile(function: Callable[..., Any]) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 2)
        x, q = array_operand(operands), shape_of(operands[1])
        method = params.get("method", "linear")
        if method not in _METHODS or len(q) > 1:
            raise ShapeError(f"no quantile by method {method!r} at places of shape {q}")
        axes = normal_axes(params.get("axis"), x.ndim)
        if any(x.shape[axis] == 0 for axis in axes):
            raise ShapeError(f"shape {x.shape} has no elements along axis {axes}")
        shape = reduced(x.shape, axes, bool_param(params, "keepdims"))
        (dtype,) = dtypes_of(function, x.dtype, kind_of(operands[1]), method=method)
        return (((*q, *shape), dtype),)

    return infer


def _running(function: Callable[..., Any]) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 1)
        x = array_operand(operands)
        axis = params.get("axis")
        if axis is not None:
            normal_axis(axis, x.ndim)
        (found,) = dtypes_of(function, x.dtype, **_dtyped(x, params))
        return ((((x.size,) if axis is None else x.shape), found),)

    return infer


def _unwrap(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    normal_axis(params.get("axis", -1), x.ndim)
    for name in ("discont", "period"):
        if params.get(name) is not None:
            number_param(params, name, 0.0)
    period = params.get("period")
    extra = {} if period is None else {"period": period}
    return ((x.shape, dtypes_of(np.unwrap, x.dtype, **extra)[0]),)


# -- order --------------------------------------------------------------------------------------


def _partition(function: Callable[..., Any]) -> Infer:
    first = partial(function, kth=0)

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 1)
        x = array_operand(operands)
        axis = params.get("axis", -1)
        shape = (x.size,) if axis is None else x.shape
        length = shape[normal_axis(-1 if axis is None else axis, len(shape))]
        places: Any = params.get("kth")
        if not is_int(places) and not isinstance(places, tuple | list):
            raise ShapeError(f"parameter kth has to be an integer or several, not {places!r}")
        for kth in (places,) if is_int(places) else places:
            if not is_int(kth) or not -length <= kth < length:
                raise ShapeError(f"kth {places!r} is out of bounds for {length} elements")
        return ((shape, dtypes_of(first, x.dtype)[0]),)

    return infer


def _searchsorted(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 2)
    x = array_operand(operands)
    if x.ndim != 1 or params.get("side", "left") not in ("left", "right"):
        raise ShapeError(f"shape {x.shape} is not one sorted axis, or side is not left or right")
    dtypes_of(np.searchsorted, *map(kind_of, operands))
    return ((shape_of(operands[1]), INTP),)


def _lexsort(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    keys = array_operand(operands)
    if keys.ndim < 2 or not keys.shape[0]:
        raise ShapeError(f"keys of shape {keys.shape}: several of at least one axis are needed")
    normal_axis(params.get("axis", -1), keys.ndim - 1)
    dtypes_of(np.argsort, keys.dtype)
    return ((keys.shape[1:], INTP),)


# -- shapes -------------------------------------------------------------------------------------


def _cross(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 2)
    a, b = array_operand(operands), array_operand(operands, 1)
    axis = int_param(params, "axis", -1)
    at_a, at_b = normal_axis(axis, a.ndim), normal_axis(axis, b.ndim)
    if a.shape[at_a] != 3 or b.shape[at_b] != 3:
        raise ShapeError(f"shapes {a.shape} and {b.shape}: three elements along axis {axis}")
    shape = broadcast(reduced(a.shape, (at_a,), False), reduced(b.shape, (at_b,), False))
    at = normal_axis(axis, len(shape) + 1)
    (dtype,) = dtypes_of(np.multiply, a.dtype, b.dtype)
    dtypes_of(np.subtract, dtype, dtype)
    return (((*shape[:at], 3, *shape[at:]), dtype),)


def _trace(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    if abs(int_param(params, "offset", 0)) >= 1 << 31:
        raise ShapeError(f"parameter offset is {params['offset']}")
    if x.ndim < 2:
        raise ShapeError(f"shape {x.shape} has no diagonal: it needs two axes")
    axes = normal_axes((params.get("axis1", 0), params.get("axis2", 1)), x.ndim)
    shape = reduced(x.shape, axes, False)
    dtype = dtype_param(params)
    if dtype is None:
        return ((shape, dtypes_of(_sum_of_one, x.dtype)[0]),)
    return ((shape, dtypes_of(np.trace, x.dtype, ndim=2, dtype=dtype)[0]),)


def _sum_of_one(x: Any) -> Any:
    """As dtypes go, any trace."""
    return np.trace(x[:, None])


_PAD_MODES = frozenset(
    [
        "constant",
        "edge",
        "linear_ramp",
        "maximum",
        "mean",
        "median",
        "minimum",
        "reflect",
        "symmetric",
        "wrap",
        "empty",
    ]
)


def _pad(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    widths = params.get("pad_width")
    if (
        not isinstance(widths, tuple | list)
        or len(widths) != x.ndim
        or not all(
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(is_int(n) and n >= 0 for n in pair)
            for pair in widths
        )
    ):
        raise ShapeError(f"parameter pad_width has to be a pair for each axis, not {widths!r}")
    mode = params.get("mode", "constant")
    if mode not in _PAD_MODES:
        raise ShapeError(f"no mode {mode!r} to pad in")
    pairs = list(zip(x.shape, widths, strict=True))
    if mode not in ("constant", "empty") and any(not n and sum(pair) for n, pair in pairs):
        raise ShapeError(f"shape {x.shape} has nothing to pad with in mode {mode}")
    return ((tuple(n + before + after for n, (before, after) in pairs), x.dtype),)


def _resize(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x, shape = array_operand(operands), shape_param(params, "new_shape")
    return ((shape, x.dtype),)


def _packbits(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    _bit_order(params)
    axis = params.get("axis")
    shape = (x.size,) if axis is None else x.shape
    at = normal_axis(0 if axis is None else axis, len(shape))
    (dtype,) = dtypes_of(np.packbits, x.dtype)
    return (((*shape[:at], -(-shape[at] // 8), *shape[at + 1 :]), dtype),)


def _unpackbits(operands: Sequence[Operand], params: Params) -> Inferred:
    exactly(operands, 1)
    x = array_operand(operands)
    _bit_order(params)
    axis = params.get("axis")
    shape = (x.size,) if axis is None else x.shape
    at = normal_axis(0 if axis is None else axis, len(shape))
    (dtype,) = dtypes_of(np.unpackbits, x.dtype)
    return (((*shape[:at], 8 * shape[at], *shape[at + 1 :]), dtype),)


def _bit_order(params: Params) -> None:
    if params.get("bitorder", "big") not in ("big", "little"):
        raise ShapeError(f"parameter bitorder has to be big or little: {params['bitorder']!r}")


def _gradient(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    axes = normal_axes(params.get("axis"), x.ndim)
    edge = int_param(params, "edge_order", 1)
    if edge not in (1, 2) or any(x.shape[axis] <= edge for axis in axes):
        raise ShapeError(f"shape {x.shape} is too small for a gradient of edge_order {edge}")
    steps = operands[1:]
    if len(steps) not in (0, 1, len(axes)) or any(len(shape_of(step)) > 1 for step in steps):
        raise ShapeError(f"{len(steps)} spacings for {len(axes)} axes")
    dtypes_of(np.subtract, x.dtype, x.dtype)
    (dtype,) = dtypes_of(_differences, x.dtype)
    return ((x.shape, dtype),) * len(axes)


def _differences(x: Any) -> Any:
    return np.gradient(np.concatenate((x, x)))


SPECS: list[OpSpec] = [
    function("i0", elementwise(np.i0)),
    function("sinc", elementwise(np.sinc)),
    function("modf", elementwise(np.modf), n_out=2),
    function("frexp", elementwise(np.frexp), n_out=2),
    function("divmod", elementwise(np.divmod, 2), n_out=2),
    function("nan_to_num", _nan_to_num, "nan", "posinf", "neginf"),
    function("isclose", _isclose, "rtol", "atol", "equal_nan"),
    function("isin", _isin, "invert"),
    function("interp", _interp, "left", "right", "period"),
    function("choose", _choose, "mode"),
    function("nansum", reduction(np.nansum), "axis", "keepdims", "dtype"),
    function("nanprod", reduction(np.nanprod), "axis", "keepdims", "dtype"),
    function("nanmean", reduction(np.nanmean), "axis", "keepdims", "dtype"),
    function("nanvar", reduction(np.nanvar), "axis", "keepdims", "dtype", "ddof"),
    function("nanstd", reduction(np.nanstd), "axis", "keepdims", "dtype", "ddof"),
    function("nanmax", reduction(np.nanmax, empty=False), "axis", "keepdims"),
    function("nanmin", reduction(np.nanmin, empty=False), "axis", "keepdims"),
    function("ptp", reduction(np.ptp, empty=False), "axis", "keepdims"),
    function("median", reduction(np.median), "axis", "keepdims"),
    function("nanmedian", reduction(np.nanmedian), "axis", "keepdims"),
    function("nanargmax", _position(np.nanargmax), "axis", "keepdims"),
    function("nanargmin", _position(np.nanargmin), "axis", "keepdims"),
    function("quantile", _quantile(np.quantile), "axis", "keepdims", "method"),
    function("percentile", _quantile(np.percentile), "axis", "keepdims", "method"),
    function("nancumsum", _running(np.nancumsum), "axis", "dtype"),
    function("nancumprod", _running(np.nancumprod), "axis", "dtype"),
    function("unwrap", _unwrap, "axis", "discont", "period"),
    function("partition", _partition(np.partition), "axis", "kth"),
    function("argpartition", _partition(np.argpartition), "axis", "kth"),
    function("searchsorted", _searchsorted, "side"),
    function("lexsort", _lexsort, "axis"),
    function("cross", _cross, "axis"),
    function("trace", _trace, "offset", "axis1", "axis2", "dtype"),
    function(
        "pad",
        _pad,
        "pad_width",
        "mode",
        "constant_values",
        "end_values",
        "stat_length",
        "reflect_type",
    ),
    function("resize", _resize, "new_shape"),
    function("packbits", _packbits, "axis", "bitorder"),
    function("unpackbits", _unpackbits, "axis", "bitorder"),
    function("gradient", _gradient, "axis", "edge_order", n_out=VARIES),
]
