"""What is known of an array without its values: shape, dtype, device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpuremote._dtypes import DTYPES, check_dtype
from gpuremote._types import Shape

__all__ = ["DTYPES", "Meta", "MetaTable", "check_dtype"]


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
