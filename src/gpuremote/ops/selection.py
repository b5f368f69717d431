"""Specs of the ops that pick or write elements: indexing, and searches that depend on values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.indexing import (
    Template,
    advanced_shape,
    basic_shape,
    check_template,
    check_value_shape,
    largest_shape,
)
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import Operand, array_operand, kind_of, shape_of
from gpuremote.ops.shapes import bool_param
from gpuremote.ops.spec import VARIES, Infer, Inferred, OpSpec, Params
from gpuremote.ops.ufuncs import refuse_complex_to_real

__all__ = ["SPECS"]

_INTP = np.dtype(np.intp)


def _index_operands(
    operands: Sequence[Operand], params: Params, first: int
) -> tuple[Template, int, list[Meta]]:
    """The template, the number of integers and the index arrays; all of them checked."""
    template = check_template(params.get("index"))
    ints = sum(1 if item == "i" else item.count("1") for item in template)
    kinds = [item for item in template if item in ("a", "m")]
    if len(operands) != first + ints + len(kinds):
        raise ShapeError(
            f"index {template} takes {ints} integers and {len(kinds)} arrays, and there are "
            f"{len(operands) - first} operands for it"
        )
    if any(operand != "i" for operand in operands[first : first + ints]):
        raise DTypeError("an index that is not an integer")
    arrays = [array_operand(operands, first + ints + i) for i in range(len(kinds))]
    for kind, array in zip(kinds, arrays, strict=True):
        if array.dtype.kind not in ("b" if kind == "m" else "iu"):
            raise DTypeError(f"an index array of {array.dtype}: integers or bools are needed")
    return template, ints, arrays


def _getitem(kinds: str) -> Infer:
    """Reading through an index whose array items are of the given kinds ("", "a" or "am")."""

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        x = array_operand(operands)
        template, ints, arrays = _index_operands(operands, params, 1)
        found = {item for item in template if item in ("a", "m")}
        if ("m" in found) != ("m" in kinds) or bool(found) != bool(kinds):
            raise ShapeError(f"index {template} needs another of the getitem ops")
        shapes = [array.shape for array in arrays]
        if ints:
            shape = largest_shape(x.shape, template, shapes)
        elif kinds:
            shape = advanced_shape(x.shape, template, (), shapes)
        else:
            shape = basic_shape(x.shape, template, ())
        return ((shape, x.dtype),)

    return infer


def _setitem(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    if len(operands) < 2:
        raise ShapeError("the value is missing")
    value = operands[1]
    template, ints, arrays = _index_operands(operands, params, 2)
    refuse_complex_to_real(kind_of(value), x.dtype)
    shapes = [array.shape for array in arrays]
    if ints or "m" in template:
        largest_shape(x.shape, template, shapes)  # Only for its checks.
    else:
        target: Shape = advanced_shape(x.shape, template, (), shapes)
        check_value_shape(target, shape_of(value))
    return ()


def _fill(operands: Sequence[Operand], _params: Params) -> Inferred:
    x = array_operand(operands)
    if len(operands) != 2 or shape_of(operands[1]):
        raise ShapeError("the value has to be a scalar or an array without axes")
    refuse_complex_to_real(kind_of(operands[1]), x.dtype)
    return ()


def _nonzero(operands: Sequence[Operand], _params: Params) -> Inferred:
    x = array_operand(operands)
    if not x.ndim:
        raise ShapeError("an array without axes: reshape it to (1,) first")
    return (((x.size,), _INTP),) * x.ndim


def _unique(operands: Sequence[Operand], params: Params) -> Inferred:
    x = array_operand(operands)
    bool_param(params, "equal_nan", True)
    return (((x.size,), x.dtype),)


_INDEX = frozenset({"index"})

SPECS: list[OpSpec] = [
    OpSpec("getitem", _getitem(""), params=_INDEX, view=True, indexed=True),
    OpSpec("getitem_advanced", _getitem("a"), params=_INDEX, indexed=True),
    OpSpec("getitem_mask", _getitem("am"), params=_INDEX, data_dependent=True, indexed=True),
    OpSpec("setitem", _setitem, n_out=0, params=_INDEX, inplace=True, indexed=True),
    OpSpec("fill_", _fill, n_out=0, inplace=True),
    OpSpec("nonzero", _nonzero, n_out=VARIES, data_dependent=True),
    OpSpec("unique_values", _unique, params=frozenset({"equal_nan"}), data_dependent=True),
]
