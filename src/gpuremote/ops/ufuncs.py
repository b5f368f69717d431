"""Elementwise ops: ufuncs, their in-place variants, where and clip, round, casts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import (
    DType,
    Kind,
    Operand,
    array_operand,
    default_dtype,
    kind_of,
    shape_of,
)
from gpuremote.ops.shapes import (
    broadcast,
    dtype_param,
    dtypes_of,
    int_param,
    names_of,
    supported,
)
from gpuremote.ops.spec import Infer, Inferred, OpSpec, Params

__all__ = ["BINARY", "SPECS", "UNARY", "refuse_complex_to_real"]

UNARY: dict[str, np.ufunc] = {
    "negative": np.negative,
    "positive": np.positive,
    "abs": np.absolute,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "square": np.square,
    "reciprocal": np.reciprocal,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "log10": np.log10,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "isfinite": np.isfinite,
    "signbit": np.signbit,
    "logical_not": np.logical_not,
    "bitwise_invert": np.invert,
    "conj": np.conjugate,
    "rint": np.rint,
    "cbrt": np.cbrt,
    "deg2rad": np.deg2rad,
    "rad2deg": np.rad2deg,
    "fabs": np.fabs,
    "spacing": np.spacing,
    "bitwise_count": np.bitwise_count,
}
"""Ufuncs of one operand; ``ufunc.__name__`` is its name in NumPy and CuPy."""

BINARY: dict[str, np.ufunc] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "floor_divide": np.floor_divide,
    "remainder": np.remainder,
    "power": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "fmax": np.fmax,
    "fmin": np.fmin,
    "atan2": np.arctan2,
    "hypot": np.hypot,
    "logaddexp": np.logaddexp,
    "copysign": np.copysign,
    "nextafter": np.nextafter,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "bitwise_left_shift": np.left_shift,
    "bitwise_right_shift": np.right_shift,
    "fmod": np.fmod,
    "float_power": np.float_power,
    "logaddexp2": np.logaddexp2,
    "ldexp": np.ldexp,
    "heaviside": np.heaviside,
    "gcd": np.gcd,
    "lcm": np.lcm,
}
"""Ufuncs of two operands, of which one may be a scalar; each has an in-place variant ``name_``."""

# What resolve_dtypes takes for a Python scalar. A Python bool promotes as NumPy's bool does.
_RESOLVED: dict[str, Any] = {"b": np.dtype(np.bool_), "i": int, "I": int, "f": float, "c": complex}


@lru_cache(maxsize=8192)
def _resolve(ufunc: np.ufunc, kinds: tuple[Kind, ...], out: DType | None = None) -> DType:
    given = [
        _RESOLVED[kind] if isinstance(kind, str) and kind in _RESOLVED else default_dtype(kind)
        for kind in kinds
    ]
    try:
        return supported(ufunc.resolve_dtypes((*given, out))[-1])
    except TypeError as error:
        into = f" into {out}" if out is not None else ""
        raise DTypeError(f"dtypes {names_of(kinds)}{into} are refused: {error}") from error


def _count(operands: Sequence[Operand], n: int) -> None:
    if len(operands) != n:
        raise ShapeError(f"{len(operands)} operands instead of {n}")


def _unary(ufunc: np.ufunc) -> Infer:
    def infer(operands: Sequence[Operand], _params: Params) -> Inferred:
        _count(operands, 1)
        x = array_operand(operands)
        return ((x.shape, _resolve(ufunc, (x.dtype,))),)

    return infer


def _elementwise(operands: Sequence[Operand]) -> tuple[Shape, tuple[Kind, ...]]:
    """Broadcast shape and kinds of operands of which one at least is an array."""
    kinds = tuple(map(kind_of, operands))
    if Meta not in map(type, operands):
        raise DTypeError("one operand at least has to be an array")
    return broadcast(*map(shape_of, operands)), kinds


def _binary(ufunc: np.ufunc) -> Infer:
    def infer(operands: Sequence[Operand], _params: Params) -> Inferred:
        _count(operands, 2)
        shape, kinds = _elementwise(operands)
        return ((shape, _resolve(ufunc, kinds)),)

    return infer


def _binary_inplace(ufunc: np.ufunc) -> Infer:
    def infer(operands: Sequence[Operand], _params: Params) -> Inferred:
        _count(operands, 2)
        target = array_operand(operands)
        shape, kinds = _elementwise(operands)
        if shape != target.shape:
            raise ShapeError(
                f"an array of shape {target.shape} can't take in place a result of shape {shape}"
            )
        _resolve(ufunc, kinds, target.dtype)
        return ()

    return infer


def _where(operands: Sequence[Operand], _params: Params) -> Inferred:
    _count(operands, 3)
    array_operand(operands)
    shape, kinds = _elementwise(operands)
    return ((shape, dtypes_of(np.where, *kinds)[0]),)


def _clip(operands: Sequence[Operand], params: Params) -> Inferred:
    bounds = params.get("bounds", "both")
    if bounds not in ("both", "min", "max"):
        raise ShapeError(f"parameter bounds has to be 'both', 'min' or 'max', not {bounds!r}")
    _count(operands, 3 if bounds == "both" else 2)
    array_operand(operands)
    shape, kinds = _elementwise(operands)
    function = {"both": np.clip, "min": np.maximum, "max": np.minimum}[bounds]
    return ((shape, dtypes_of(function, *kinds)[0]),)


def _round(operands: Sequence[Operand], params: Params) -> Inferred:
    _count(operands, 1)
    x = array_operand(operands)
    decimals = int_param(params, "decimals", 0)
    if abs(decimals) > 400:
        raise ShapeError(f"rounding to {decimals} decimals")
    return ((x.shape, dtypes_of(np.round, x.dtype, decimals=decimals)[0]),)


def _part(operands: Sequence[Operand], _params: Params) -> Inferred:
    _count(operands, 1)
    x = array_operand(operands)
    return ((x.shape, dtypes_of(np.real, x.dtype)[0]),)


def refuse_complex_to_real(source: Kind, target: DType) -> None:
    """Raise DTypeError for a conversion that would drop imaginary parts."""
    if default_dtype(source).kind == "c" and target.kind != "c":
        raise DTypeError(
            f"{names_of((source,))} to {target} would drop the imaginary part; take .real first"
        )


def _astype(operands: Sequence[Operand], params: Params) -> Inferred:
    _count(operands, 1)
    x = array_operand(operands)
    dtype = dtype_param(params)
    if dtype is None:
        raise DTypeError("parameter dtype is missing")
    if dtype.kind != "b":
        refuse_complex_to_real(x.dtype, dtype)
    return ((x.shape, dtype),)


def _copy(operands: Sequence[Operand], _params: Params) -> Inferred:
    _count(operands, 1)
    x = array_operand(operands)
    return ((x.shape, x.dtype),)


SPECS: list[OpSpec] = [
    *(OpSpec(name, _unary(ufunc)) for name, ufunc in UNARY.items()),
    *(OpSpec(name, _binary(ufunc)) for name, ufunc in BINARY.items()),
    *(
        OpSpec(name + "_", _binary_inplace(ufunc), n_out=0, inplace=True)
        for name, ufunc in BINARY.items()
    ),
    OpSpec("where", _where),
    OpSpec("clip", _clip, params=frozenset({"bounds"})),
    OpSpec("round", _round, params=frozenset({"decimals"})),
    OpSpec("real", _part, view=True),
    OpSpec("imag", _part, view=True),
    OpSpec("astype", _astype, params=frozenset({"dtype"})),
    OpSpec("copy", _copy),
]
