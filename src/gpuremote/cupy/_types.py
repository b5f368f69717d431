"""Dtypes, constants, and what the namespace says of itself (array API)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpuremote._dtypes import DTYPES
from gpuremote.client.array import RemoteArray
from gpuremote.cupy._home import current, device_of, session

__all__ = ["FROM_NUMPY", "can_cast", "finfo", "iinfo", "info", "isdtype", "result_type"]

FROM_NUMPY: Final = [
    "bool_",
    "byte",
    "cdouble",
    "complex128",
    "complex64",
    "complexfloating",
    "csingle",
    "double",
    "dtype",
    "float16",
    "float32",
    "float64",
    "floating",
    "generic",
    "half",
    "inexact",
    "int16",
    "int32",
    "int64",
    "int8",
    "int_",
    "intc",
    "integer",
    "intp",
    "long",
    "longlong",
    "number",
    "short",
    "signedinteger",
    "single",
    "ubyte",
    "uint",
    "uint16",
    "uint32",
    "uint64",
    "uint8",
    "uintc",
    "uintp",
    "ulong",
    "ulonglong",
    "unsignedinteger",
    "ushort",
    "e",
    "euler_gamma",
    "inf",
    "nan",
    "newaxis",
    "pi",
    "index_exp",
    "s_",
    "ndindex",
    "issubdtype",
    "promote_types",
    "mintypecode",
    "typename",
    "broadcast_shapes",
    "iterable",
    "format_float_positional",
    "format_float_scientific",
    "base_repr",
    "binary_repr",
    "get_printoptions",
    "set_printoptions",
    "printoptions",
    "errstate",
    "geterr",
    "seterr",
]
"""Names that are NumPy's own objects: they hold no arrays."""


def _plain(x: Any) -> Any:
    return x.dtype if isinstance(x, RemoteArray) else x


def result_type(*arrays_and_dtypes: Any) -> np.dtype[Any]:
    """The dtype of an operation on all of these; Python scalars are weak (NEP 50)."""
    return np.result_type(*map(_plain, arrays_and_dtypes))


def can_cast(from_: Any, to: npt.DTypeLike, casting: str = "safe") -> bool:
    return bool(np.can_cast(_plain(from_), to, casting))  # type: ignore[arg-type]


def min_scalar_type(a: Any) -> np.dtype[Any]:
    return _plain(a) if isinstance(a, RemoteArray) else np.min_scalar_type(a)


def common_type(*arrays: Any) -> Any:
    return np.common_type(*(np.empty(0, _plain(a)) for a in arrays))


def isdtype(dtype: Any, kind: Any) -> bool:
    """Whether a dtype is of a kind: ``"bool"``, ``"real floating"``, ..., a dtype, or several."""
    return bool(np.isdtype(np.dtype(dtype), kind))


def issctype(rep: Any) -> bool:
    """Whether it stands for a dtype."""
    try:
        return not isinstance(rep, str) and np.dtype(rep).kind in "biufc"
    except TypeError:
        return False


def issubsctype(arg1: Any, arg2: Any) -> bool:
    return bool(np.issubdtype(np.dtype(_plain(arg1)), arg2))


def obj2sctype(rep: Any, default: Any = None) -> Any:
    """The scalar type of a dtype."""
    try:
        return np.dtype(_plain(rep)).type
    except TypeError:
        return default


def sctype2char(sctype: Any) -> str:
    return str(np.dtype(_plain(sctype)).char)


def find_common_type(array_types: Any, scalar_types: Any) -> np.dtype[Any]:
    return np.result_type(*array_types, *scalar_types)


class finfo:
    """The limits of a floating point dtype, as Python numbers.

    Attributes
    ----------
    bits : int
    eps, max, min, smallest_normal, tiny, resolution : float
    dtype : numpy.dtype
    """

    eps: float
    max: float
    min: float
    resolution: float
    smallest_normal: float
    tiny: float
    __slots__ = (
        "bits",
        "dtype",
        "eps",
        "epsneg",
        "max",
        "min",
        "precision",
        "resolution",
        "smallest_normal",
        "smallest_subnormal",
        "tiny",
    )

    def __init__(self, type: Any, /) -> None:
        found = np.finfo(_plain(type))
        self.bits = int(found.bits)
        self.dtype = np.dtype(found.dtype)
        self.precision = int(found.precision)
        for name in (
            "eps",
            "epsneg",
            "max",
            "min",
            "resolution",
            "smallest_normal",
            "smallest_subnormal",
            "tiny",
        ):
            setattr(self, name, float(getattr(found, name)))

    def __repr__(self) -> str:
        return f"finfo({self.dtype}, eps={self.eps}, max={self.max})"


class iinfo:
    """The limits of an integer dtype.

    Attributes
    ----------
    bits, max, min : int
    dtype : numpy.dtype
    """

    __slots__ = ("bits", "dtype", "max", "min")

    def __init__(self, type: Any, /) -> None:
        found = np.iinfo(_plain(type))
        self.bits, self.max, self.min = int(found.bits), int(found.max), int(found.min)
        self.dtype = np.dtype(found.dtype)

    def __repr__(self) -> str:
        return f"iinfo({self.dtype}, min={self.min}, max={self.max})"


_KINDS: Final = {
    "bool": "b",
    "signed integer": "i",
    "unsigned integer": "u",
    "integral": "iu",
    "real floating": "f",
    "complex floating": "c",
    "numeric": "iufc",
}


class info:
    """What ``__array_namespace_info__()`` gives."""

    def capabilities(self) -> dict[str, Any]:
        """Shapes that depend on values are known, after a round trip."""
        return {"boolean indexing": True, "data-dependent shapes": True, "max dimensions": 64}

    def default_device(self) -> Any:
        return current()

    def default_dtypes(self, *, device: Any = None) -> dict[str, np.dtype[Any]]:
        device_of(device)
        return {
            "real floating": np.dtype(np.float64),
            "complex floating": np.dtype(np.complex128),
            "integral": np.dtype(np.int64),
            "indexing": np.dtype(np.intp),
        }

    def dtypes(self, *, device: Any = None, kind: Any = None) -> dict[str, np.dtype[Any]]:
        """The dtypes of the standard by name, of one kind or of several."""
        device_of(device)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = "biufc"
        if kind is not None:
            for one in kinds:
                if one not in _KINDS:
                    raise ValueError(f"unsupported kind: {one!r}")
            wanted = "".join(_KINDS[one] for one in kinds)
        standard = [dtype for dtype in DTYPES.values() if dtype != np.float16]
        return {dtype.name: dtype for dtype in standard if dtype.kind in wanted}

    def devices(self) -> list[Any]:
        return list(session().devices)


__all__ += [
    "common_type",
    "find_common_type",
    "issctype",
    "issubsctype",
    "min_scalar_type",
    "obj2sctype",
    "sctype2char",
]
