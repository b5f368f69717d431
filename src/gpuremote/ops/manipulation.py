"""Ops that move elements around: shapes, order, joining, picking along axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import Operand, array_operand
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
    shape_param,
    size_of,
)
from gpuremote.ops.spec import Infer, Inferred, OpSpec, Params

__all__ = ["SPECS"]

ShapeRule = Callable[[Meta, Params], Shape]


def _moved(rule: ShapeRule) -> Infer:
    """Ops of one array that keep its dtype; ``rule`` gives the shape."""

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        if len(operands) != 1:
            raise ShapeError(f"{len(operands)} operands instead of 1")
        x = array_operand(operands)
        return ((rule(x, params), x.dtype),)

    return infer


def _reshape(x: Meta, params: Params) -> Shape:
    shape = shape_param(params, lowest=-1)
    unknown = shape.count(-1)
    known = size_of(tuple(n for n in shape if n != -1))
    if unknown > 1:
        raise ShapeError(f"shape {shape} has more than one unknown length")
    if unknown:
        if not known or x.size % known:
            raise ShapeError(f"an array of shape {x.shape} can't be reshaped to {shape}")
        return tuple(x.size // known if n == -1 else n for n in shape)
    if known != x.size:
        raise ShapeError(f"an array of shape {x.shape} can't be reshaped to {shape}")
    return shape


def _permute_dims(x: Meta, params: Params) -> Shape:
    axes = params.get("axes")
    order = tuple(reversed(range(x.ndim))) if axes is None else normal_axes(axes, x.ndim)
    if len(order) != x.ndim:
        raise ShapeError(f"axes {axes!r} are not all of the {x.ndim} axes")
    return tuple(x.shape[axis] for axis in order)


def _broadcast_to(x: Meta, params: Params) -> Shape:
    shape = shape_param(params)
    if len(shape) < x.ndim or broadcast(x.shape, shape) != shape:
        raise ShapeError(f"an array of shape {x.shape} can't be broadcast to {shape}")
    return shape


def _squeeze(x: Meta, params: Params) -> Shape:
    axis = params.get("axis")
    if axis is None:
        return tuple(n for n in x.shape if n != 1)
    axes = normal_axes(axis, x.ndim)
    if any(x.shape[i] != 1 for i in axes):
        raise ShapeError(f"shape {x.shape} is not of length 1 along axis {axis!r}")
    return tuple(n for i, n in enumerate(x.shape) if i not in axes)


def _expand_dims(x: Meta, params: Params) -> Shape:
    axis = params.get("axis")
    count = 1 if is_int(axis) else len(axis) if isinstance(axis, tuple | list) else -1
    if count < 0:
        raise ShapeError(f"axis {axis!r} is neither an integer nor a tuple of integers")
    axes = normal_axes(axis, x.ndim + count)
    lengths = iter(x.shape)
    return tuple(1 if i in axes else next(lengths) for i in range(x.ndim + count))


def _flip(x: Meta, params: Params) -> Shape:
    normal_axes(params.get("axis"), x.ndim)
    return x.shape


def _roll(x: Meta, params: Params) -> Shape:
    shift, axis = params.get("shift"), params.get("axis")
    shifts = (shift,) if is_int(shift) else shift
    if not isinstance(shifts, tuple | list) or not all(map(is_int, shifts)):
        raise ShapeError(f"parameter shift has to be an integer or a tuple, not {shift!r}")
    if any(abs(n) >= 1 << 62 for n in shifts):
        raise ShapeError(f"shift {shift!r} is too far")
    axes = (axis,) if is_int(axis) else axis
    if axes is None:
        if len(shifts) != 1:
            raise ShapeError(f"shift {shift!r} needs as many axes")
        return x.shape
    if not isinstance(axes, tuple | list):
        raise ShapeError(f"axis {axis!r} is neither an integer nor a tuple of integers")
    for item in axes:  # NumPy allows an axis to come twice here.
        normal_axis(item, x.ndim)
    broadcast((len(shifts),), (len(axes),))
    return x.shape


def _repeat(x: Meta, params: Params) -> Shape:
    repeats = int_param(params, "repeats")
    if repeats < 0:
        raise ShapeError(f"{repeats} repeats")
    if params.get("axis") is None:
        return (x.size * repeats,)
    axis = normal_axis(params["axis"], x.ndim)
    return tuple(n * repeats if i == axis else n for i, n in enumerate(x.shape))


def _tile(x: Meta, params: Params) -> Shape:
    reps = shape_param(params, "reps")
    ndim = max(len(reps), x.ndim)
    shape = (1,) * (ndim - x.ndim) + x.shape
    reps = (1,) * (ndim - len(reps)) + reps
    return tuple(n * times for n, times in zip(shape, reps, strict=True))


def _triangle(x: Meta, params: Params) -> Shape:
    if x.ndim < 2:
        raise ShapeError(f"shape {x.shape} is not a matrix or a stack of matrices")
    _offset(params, "k")
    return x.shape


def _offset(params: Params, name: str) -> int:
    value = int_param(params, name, 0)
    if abs(value) >= 1 << 62:
        raise ShapeError(f"parameter {name} is {value}")
    return value


def _diagonal(x: Meta, params: Params) -> Shape:
    offset = _offset(params, "offset")
    if x.ndim < 2:
        raise ShapeError(f"shape {x.shape} has no diagonal: it needs two axes")
    a = normal_axis(params.get("axis1", 0), x.ndim)
    b = normal_axis(params.get("axis2", 1), x.ndim)
    if a == b:
        raise ShapeError(f"axis1 and axis2 are both {a}")
    rows, columns = x.shape[a], x.shape[b]
    length = min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns)
    return (*[n for i, n in enumerate(x.shape) if i != a and i != b], max(length, 0))


def _sorted_axis(x: Meta, params: Params) -> None:
    bool_param(params, "descending")
    bool_param(params, "stable", True)
    normal_axis(params.get("axis", -1), x.ndim)


def _sort(x: Meta, params: Params) -> Shape:
    _sorted_axis(x, params)
    return x.shape


def _argsort(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    _sorted_axis(x, params)
    return ((x.shape, dtypes_of(np.argsort, x.dtype)[0]),)


def _arrays(operands: Sequence[Operand]) -> list[Meta]:
    if not operands:
        raise ShapeError("nothing to join")
    found = [operand for operand in operands if isinstance(operand, Meta)]
    if len(found) != len(operands):
        return [array_operand(operands, i) for i in range(len(operands))]  # which raises
    return found


def _concat(operands: Sequence[Operand], params: Params) -> Inferred:
    arrays = _arrays(operands)
    (dtype,) = dtypes_of(joined_dtype, *{x.dtype: None for x in arrays})
    given = params.get("axis", 0)
    if given is None:
        return (((sum(x.size for x in arrays),), dtype),)
    first = arrays[0].shape
    axis = normal_axis(given, len(first))
    for x in arrays:
        shape = x.shape
        if shape != first and (
            len(shape) != len(first)
            or shape[:axis] != first[:axis]
            or shape[axis + 1 :] != first[axis + 1 :]
        ):
            raise ShapeError(f"shapes {first} and {x.shape} differ in more than axis {axis}")
    total = sum([x.shape[axis] for x in arrays])
    return (((*first[:axis], total, *first[axis + 1 :]), dtype),)


def _stack(operands: Sequence[Operand], params: Params) -> Inferred:
    arrays = _arrays(operands)
    (dtype,) = dtypes_of(joined_dtype, *{x.dtype: None for x in arrays})
    first = arrays[0].shape
    for x in arrays:
        if x.shape != first:
            raise ShapeError(f"shapes {first} and {x.shape} differ")
    axis = normal_axis(params.get("axis", 0), len(first) + 1)
    return (((*first[:axis], len(arrays), *first[axis:]), dtype),)


def _indices(operands: Sequence[Operand]) -> tuple[Meta, Meta]:
    if len(operands) != 2:
        raise ShapeError(f"{len(operands)} operands instead of 2")
    x, indices = array_operand(operands, 0), array_operand(operands, 1)
    if indices.dtype.kind not in "iu":
        raise DTypeError(f"indices have to be integers, not {indices.dtype}")
    return x, indices


def _take(operands: Sequence[Operand], params: Params) -> Inferred:
    x, indices = _indices(operands)
    if params.get("axis") is None:
        shape: Shape = (x.size,)
        axis = 0
    else:
        shape = x.shape
        axis = normal_axis(params["axis"], x.ndim)
    if not shape[axis] and indices.size:
        raise ShapeError(f"nothing to take along axis {axis} of shape {shape}")
    return (((*shape[:axis], *indices.shape, *shape[axis + 1 :]), x.dtype),)


def _take_along_axis(operands: Sequence[Operand], params: Params) -> Inferred:
    x, indices = _indices(operands)
    if params.get("axis", -1) is None:
        raise ShapeError("parameter axis has to be an integer; reshape to one axis instead")
    axis = normal_axis(params.get("axis", -1), x.ndim)
    if indices.ndim != x.ndim:
        raise ShapeError(f"an array of shape {x.shape} and indices of shape {indices.shape}")
    others = broadcast(
        (*x.shape[:axis], 1, *x.shape[axis + 1 :]),
        (*indices.shape[:axis], 1, *indices.shape[axis + 1 :]),
    )
    return (((*others[:axis], indices.shape[axis], *others[axis + 1 :]), x.dtype),)


def _view(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    dtype = dtype_param(params)
    if dtype is None:
        raise DTypeError("parameter dtype is missing")
    if dtype.itemsize == x.dtype.itemsize:
        return ((x.shape, dtype),)
    if not x.ndim:
        raise DTypeError(f"an array without axes of {x.dtype} can't be read as {dtype}")
    length, rest = divmod(x.shape[-1] * x.dtype.itemsize, dtype.itemsize)
    if rest:
        raise ShapeError(f"the last axis of {x.dtype}{x.shape} can't be read as {dtype}")
    return (((*x.shape[:-1], length), dtype),)


def _spec(name: str, infer: Infer, *params: str, view: bool = False) -> OpSpec:
    return OpSpec(name, infer, params=frozenset(params), view=view)


SPECS: list[OpSpec] = [
    _spec("reshape", _moved(_reshape), "shape", view=True),
    _spec("permute_dims", _moved(_permute_dims), "axes", view=True),
    _spec("broadcast_to", _moved(_broadcast_to), "shape", view=True),
    _spec("squeeze", _moved(_squeeze), "axis", view=True),
    _spec("expand_dims", _moved(_expand_dims), "axis", view=True),
    _spec("flip", _moved(_flip), "axis", view=True),
    _spec("diagonal", _moved(_diagonal), "offset", "axis1", "axis2", view=True),
    _spec("view", _view, "dtype", view=True),
    _spec("roll", _moved(_roll), "shift", "axis"),
    _spec("repeat", _moved(_repeat), "repeats", "axis"),
    _spec("tile", _moved(_tile), "reps"),
    _spec("tril", _moved(_triangle), "k"),
    _spec("triu", _moved(_triangle), "k"),
    _spec("sort", _moved(_sort), "axis", "descending", "stable"),
    _spec("argsort", _argsort, "axis", "descending", "stable"),
    _spec("concat", _concat, "axis"),
    _spec("stack", _stack, "axis"),
    _spec("take", _take, "axis"),
    _spec("take_along_axis", _take_along_axis, "axis"),
]
