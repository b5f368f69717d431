"""What an op may take: an array's meta or the code of a scalar that travels with each call.

Scalars keep the kind they have in the program, because NumPy's promotion (NEP 50) depends on it:

============ ===================================== ==========
code         scalar                                struct
============ ===================================== ==========
``"b"``      Python bool                           ``?``
``"i"``      Python int within int64               ``q``
``"I"``      Python int from 2**63 to 2**64 - 1    ``Q``
``"f"``      Python float                          ``d``
``"c"``      Python complex (two fields)           ``dd``
``"f4"``     NumPy scalar of that wire dtype       ``4s``
============ ===================================== ==========
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.meta import DTYPES, Meta, check_dtype

__all__ = [
    "SCALAR_FORMATS",
    "WEAK",
    "DType",
    "Kind",
    "Operand",
    "array_operand",
    "default_dtype",
    "kind_of",
    "sample",
    "scalar_operand",
    "shape_of",
    "wire_dtype",
]

DType: TypeAlias = np.dtype[Any]
Operand: TypeAlias = Meta | str
Kind: TypeAlias = DType | str

WEAK: dict[str, Any] = {"b": True, "i": 1, "I": 1 << 63, "f": 1.0, "c": 1 + 0j}
"""Codes of Python scalars, each with a sample value."""

SCALAR_FORMATS: dict[str, str] = {"b": "?", "i": "q", "I": "Q", "f": "d", "c": "dd"} | {
    name: f"{dtype.itemsize}s" for name, dtype in DTYPES.items()
}
"""How each scalar code is packed in a plan call (``struct`` notation)."""

_WEAK_DTYPES: dict[str, DType] = {
    "b": np.dtype(np.bool_),
    "i": np.dtype(np.int64),
    "I": np.dtype(np.uint64),
    "f": np.dtype(np.float64),
    "c": np.dtype(np.complex128),
}


def wire_dtype(dtype: npt.DTypeLike) -> str:
    """The wire name of a dtype (``"f4"``); raises DTypeError for one that may not travel."""
    return check_dtype(dtype).str.lstrip("<|=")


def scalar_operand(value: Any) -> tuple[str, tuple[Any, ...]]:
    """The code of a scalar, and the fields that its code's struct format packs.

    Raises
    ------
    DTypeError
        Not a Python or NumPy scalar that may travel, or an integer of more than 64 bits.
    """
    kind = type(value)
    if kind is float:
        return "f", (value,)
    if kind is bool:
        return "b", (value,)
    # NumPy's float64 and complex128 are subclasses of Python's float and complex: ask for them
    # before the subclasses of Python's own types.
    if isinstance(value, np.generic):
        return wire_dtype(value.dtype), (value.tobytes(),)
    if isinstance(value, int):
        if -(1 << 63) <= value < 1 << 63:
            return "i", (int(value),)
        if 0 <= value < 1 << 64:
            return "I", (int(value),)
        raise DTypeError(f"integer {value} does not fit in 64 bits")
    if isinstance(value, float):
        return "f", (float(value),)
    if isinstance(value, complex):
        return "c", (value.real, value.imag)
    raise DTypeError(f"{kind.__name__} object is neither an array nor a scalar")


def shape_of(operand: Operand) -> Shape:
    """Shape of an operand; a scalar's is ``()``."""
    return operand.shape if isinstance(operand, Meta) else ()


def default_dtype(kind: Kind) -> DType:
    """The dtype of an array made from an operand of this kind alone."""
    if isinstance(kind, np.dtype):
        return kind
    found = _WEAK_DTYPES.get(kind)
    return DTYPES[kind] if found is None else found


def kind_of(operand: Operand) -> Kind:
    """What promotion looks at: an array's dtype or a scalar's code."""
    return operand.dtype if isinstance(operand, Meta) else operand


def sample(kind: Kind, ndim: int = 1) -> Any:
    """The smallest thing that NumPy treats as it would an operand of that kind: an array of one
    element with ``ndim`` axes, or a scalar.
    """
    if isinstance(kind, np.dtype):
        return np.ones((1,) * ndim, kind)
    return WEAK[kind] if kind in WEAK else DTYPES[kind].type(1)


def array_operand(operands: Sequence[Operand], position: int = 0) -> Meta:
    """The operand at a position, which has to be an array."""
    try:
        operand = operands[position]
    except IndexError:
        raise ShapeError(
            f"operand {position} is missing: there are {len(operands)} of them"
        ) from None
    if not isinstance(operand, Meta):
        raise DTypeError(f"operand {position} has to be an array, not a scalar")
    return operand
