"""Reductions and running sums along axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import ShapeError
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import Operand, array_operand
from gpuremote.ops.shapes import (
    bool_param,
    dtype_param,
    dtypes_of,
    normal_axes,
    normal_axis,
    number_param,
    reduced,
    size_of,
)
from gpuremote.ops.spec import Infer, Inferred, OpSpec, Params
from gpuremote.ops.ufuncs import refuse_complex_to_real

__all__ = ["SPECS"]


def _dtype_kwargs(x: Meta, params: Params) -> dict[str, Any]:
    dtype = dtype_param(params)
    if dtype is None:
        return {}
    if dtype.kind != "b":
        refuse_complex_to_real(x.dtype, dtype)
    return {"dtype": dtype}


def _refuse_empty(shape: Shape, axes: tuple[int, ...]) -> None:
    """NumPy refuses where an element of the result would be made from none."""
    if any(shape[axis] == 0 for axis in axes) and size_of(reduced(shape, axes, False)):
        raise ShapeError(f"shape {shape} has no elements along axis {axes}, and no identity exists")


def _reduction(function: Callable[..., Any], identity: bool = True) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        x = array_operand(operands)
        axes = normal_axes(params.get("axis"), x.ndim)
        keepdims = bool_param(params, "keepdims")
        number_param(params, "correction", 0)
        if not (identity or x.size):
            _refuse_empty(x.shape, axes)
        (dtype,) = dtypes_of(function, x.dtype, **_dtype_kwargs(x, params))
        return ((reduced(x.shape, axes, keepdims), dtype),)

    return infer


def _position(function: Callable[..., Any]) -> Infer:
    """Argmax and argmin: one axis, or None for the position in the flattened array."""

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        x = array_operand(operands)
        axis = params.get("axis")
        axes = normal_axes(None, x.ndim) if axis is None else (normal_axis(axis, x.ndim),)
        keepdims = bool_param(params, "keepdims")
        if not x.size and any(x.shape[i] == 0 for i in axes):
            raise ShapeError(f"shape {x.shape} has no elements along axis {axes}")
        return ((reduced(x.shape, axes, keepdims), dtypes_of(function, x.dtype)[0]),)

    return infer


def _running(function: Callable[..., Any]) -> Infer:
    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        x = array_operand(operands)
        axis = params.get("axis")
        shape = (x.size,) if axis is None else x.shape
        at = normal_axis(0 if axis is None else axis, len(shape))
        if bool_param(params, "include_initial"):
            shape = (*shape[:at], shape[at] + 1, *shape[at + 1 :])
        (dtype,) = dtypes_of(function, x.dtype, **_dtype_kwargs(x, params))
        return ((shape, dtype),)

    return infer


def _spec(name: str, infer: Infer, *params: str) -> OpSpec:
    return OpSpec(name, infer, params=frozenset(params))


SPECS: list[OpSpec] = [
    _spec("sum", _reduction(np.sum), "axis", "keepdims", "dtype"),
    _spec("prod", _reduction(np.prod), "axis", "keepdims", "dtype"),
    _spec("mean", _reduction(np.mean), "axis", "keepdims", "dtype"),
    _spec("var", _reduction(np.var), "axis", "keepdims", "dtype", "correction"),
    _spec("std", _reduction(np.std), "axis", "keepdims", "dtype", "correction"),
    _spec("any", _reduction(np.any), "axis", "keepdims"),
    _spec("all", _reduction(np.all), "axis", "keepdims"),
    _spec("count_nonzero", _reduction(np.count_nonzero), "axis", "keepdims"),
    _spec("max", _reduction(np.max, identity=False), "axis", "keepdims"),
    _spec("min", _reduction(np.min, identity=False), "axis", "keepdims"),
    _spec("argmax", _position(np.argmax), "axis", "keepdims"),
    _spec("argmin", _position(np.argmin), "axis", "keepdims"),
    _spec("cumulative_sum", _running(np.cumsum), "axis", "dtype", "include_initial"),
    _spec("cumulative_prod", _running(np.cumprod), "axis", "dtype", "include_initial"),
]
