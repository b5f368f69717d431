"""What is known of an array without its values: shape, dtype, device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.errors import DTypeError

__all__ = ["DTYPES", "Meta", "MetaTable", "check_dtype"]

DTYPES: dict[str, np.dtype[Any]] = {
    np.dtype(name).str.lstrip("<|="): np.dtype(name)
    for name in (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    )
}
"""Every dtype that may travel, by its name on the wire (``"f4"``, ``"i8"``, ``"b1"``, ...)."""


class Meta:
    """Shape, dtype and device of an array.

    Interned by :class:`MetaTable`: within one table two equal metas are the same object, so a
    plan's cache key hashes and compares them by identity.
    """

    __slots__ = ("device", "dtype", "nbytes", "ndim", "shape", "size", "wire_dtype")

    def __init__(self, shape: Shape, dtype: np.dtype[Any], device: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize
        self.wire_dtype = dtype.str.lstrip("<|=")

    def __repr__(self) -> str:
        return f"Meta({self.shape}, {self.dtype}, device={self.device})"


class MetaTable:
    """Interns metas. Bounded: at ``limit`` entries it starts anew (metas in use live on)."""

    __slots__ = ("_limit", "_table")

    def __init__(self, limit: int = 1 << 16) -> None:
        self._table: dict[tuple[Shape, np.dtype[Any], int], Meta] = {}
        self._limit = limit

    def get(self, shape: Shape, dtype: np.dtype[Any], device: int) -> Meta:
        key = (shape, dtype, device)
        meta = self._table.get(key)
        if meta is None:
            if len(self._table) >= self._limit:
                self._table.clear()
            meta = self._table[key] = Meta(shape, dtype, device)
        return meta


def check_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The NumPy dtype in native byte order, if it is one that may travel.

    Raises
    ------
    DTypeError
        Object, string, datetime, structured or extended-precision dtype.
    """
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise DTypeError(f"{dtype!r} is not a dtype: {error}") from error
    native = DTYPES.get(found.str.lstrip("<>|="))
    if native is None or found.names is not None:
        raise DTypeError(
            f"dtype {found} can't live on a remote device; supported are "
            + ", ".join(str(d) for d in DTYPES.values())
        )
    return native
