"""Ops that make arrays from nothing but parameters and scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.operands import Operand, default_dtype, kind_of, shape_of
from gpuremote.ops.shapes import bool_param, dtype_param, dtypes_of, int_param, shape_param
from gpuremote.ops.spec import Infer, Inferred, OpSpec, Params

__all__ = ["SPECS", "arange_length"]

_FLOAT64 = np.dtype(np.float64)


def _filled(operands: Sequence[Operand], params: Params) -> Inferred:
    if operands:
        raise ShapeError(f"{len(operands)} operands instead of none")
    return ((shape_param(params), dtype_param(params) or _FLOAT64),)


def _full(operands: Sequence[Operand], params: Params) -> Inferred:
    if len(operands) != 1 or shape_of(operands[0]):
        raise ShapeError("one operand is needed, a scalar or an array without axes")
    kind = kind_of(operands[0])
    dtype = dtype_param(params) or default_dtype(kind)
    if default_dtype(kind).kind == "c" and dtype.kind != "c":
        raise DTypeError(f"a complex value in an array of {dtype}")
    return ((shape_param(params), dtype),)


def _scalars(operands: Sequence[Operand], n: int) -> None:
    if len(operands) != n or not all(isinstance(operand, str) for operand in operands):
        raise ShapeError(f"{n} scalar operands are needed")


def arange_length(start: Any, stop: Any, step: Any) -> int:
    """Number of elements of ``arange(start, stop, step)``.

    The client names it (parameter ``length`` of the op) and the server checks it, both with this
    function, before anything is allocated.

    Raises
    ------
    ShapeError
        The step is zero, or a value is complex, infinite or not a number.
    """
    try:
        # NumPy's own arithmetic, rounding included, so that the lengths are the same.
        with np.errstate(all="ignore"):
            difference = stop - start
            quotient = difference / step
        if quotient == 0 and difference != 0:  # Underflow, or an infinite step.
            length = 0 if math.copysign(1.0, quotient) < 0 else 1
        else:
            length = math.ceil(float(quotient))
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise ShapeError(
            f"no range from {start} to {stop} in steps of {step}: {error}", op="arange"
        ) from error
    return max(length, 0)


def _arange(operands: Sequence[Operand], params: Params) -> Inferred:
    _scalars(operands, 3)
    dtype = dtype_param(params)
    if dtype is None:
        kinds = [kind_of(operand) for operand in operands]
        (dtype,) = dtypes_of(np.arange, *kinds)
    if dtype.kind not in "iuf":
        raise DTypeError(f"no range of {dtype}")
    return ((shape_param({"length": int_param(params, "length")}, "length"), dtype),)


def _linspace(operands: Sequence[Operand], params: Params) -> Inferred:
    _scalars(operands, 2)
    bool_param(params, "endpoint", True)
    dtype = dtype_param(params)
    if dtype is None:
        kinds = [kind_of(operand) for operand in operands]
        (dtype,) = dtypes_of(np.linspace, *kinds, num=2)
    elif any(default_dtype(kind_of(o)).kind == "c" for o in operands) and dtype.kind != "c":
        raise DTypeError(f"complex ends of a range of {dtype}")
    return ((shape_param({"num": int_param(params, "num")}, "num"), dtype),)


def _eye(operands: Sequence[Operand], params: Params) -> Inferred:
    if operands:
        raise ShapeError(f"{len(operands)} operands instead of none")
    rows = int_param(params, "n_rows")
    shape = shape_param({"shape": (rows, int_param(params, "n_cols", rows))})
    if abs(int_param(params, "k", 0)) >= 1 << 62:
        raise ShapeError(f"parameter k is {params['k']}")
    return ((shape, dtype_param(params) or _FLOAT64),)


def _random(operands: Sequence[Operand], params: Params) -> Inferred:
    _scalars(operands, 1)
    if operands[0] not in ("i", "I"):
        raise DTypeError("the seed has to be an integer")
    dtype = dtype_param(params) or _FLOAT64
    if dtype.kind != "f":
        raise DTypeError(f"random numbers are made as floats, not as {dtype}")
    return ((shape_param(params), dtype),)


def _spec(name: str, infer: Infer, *params: str) -> OpSpec:
    return OpSpec(name, infer, params=frozenset(params))


SPECS: list[OpSpec] = [
    _spec("empty", _filled, "shape", "dtype"),
    _spec("zeros", _filled, "shape", "dtype"),
    _spec("ones", _filled, "shape", "dtype"),
    _spec("full", _full, "shape", "dtype"),
    _spec("arange", _arange, "length", "dtype"),
    _spec("linspace", _linspace, "num", "endpoint", "dtype"),
    _spec("eye", _eye, "n_rows", "n_cols", "k", "dtype"),
    _spec("random_uniform", _random, "shape", "dtype"),
    _spec("random_normal", _random, "shape", "dtype"),
]
