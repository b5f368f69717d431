"""Objects that make arrays of an index: ``r_[1:4, 0, x]``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuremote.cupy._array import ndarray
from gpuremote.cupy._creation import arange, array_of, asarray, linspace, meshgrid
from gpuremote.cupy._manipulation import concatenate, stack
from gpuremote.errors import UnsupportedOp

__all__ = ["c_", "mgrid", "ogrid", "r_"]


def _range(part: slice) -> Any:
    """A slice's values; with an imaginary step, so many from start to stop."""
    start, step = part.start or 0, part.step
    if isinstance(step, complex):
        return asarray(linspace(start, part.stop, int(abs(step))))
    return arange(start, part.stop, 1 if step is None else step)


class _Joined:
    """``r_`` and ``c_``: the parts of an index one after the other."""

    def __init__(self, name: str, columns: bool) -> None:
        self._name = name
        self._columns = columns

    def __getitem__(self, key: Any) -> ndarray:
        parts = []
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, str):
                raise UnsupportedOp("axes named by a string", op=self._name)
            found = _range(part) if isinstance(part, slice) else array_of(part)
            found = found if found.ndim else found.reshape(1)
            if self._columns and found.ndim == 1:
                found = found.reshape(-1, 1)
            parts.append(found)
        return concatenate(parts, -1)

    def __repr__(self) -> str:
        return f"<gpuremote.cupy.{self._name}>"


class _Grid:
    """``mgrid`` and ``ogrid``: coordinates of a grid."""

    def __init__(self, name: str, sparse: bool) -> None:
        self._name = name
        self._sparse = sparse

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return _range(key)
        ranges = [_range(part) for part in key]
        kind = np.result_type(*(r.dtype for r in ranges))
        grids = meshgrid(
            *(r.astype(kind, copy=False) for r in ranges), indexing="ij", sparse=self._sparse
        )
        return tuple(grids) if self._sparse else stack(grids)

    def __repr__(self) -> str:
        return f"<gpuremote.cupy.{self._name}>"


r_ = _Joined("r_", False)
c_ = _Joined("c_", True)
mgrid = _Grid("mgrid", False)
ogrid = _Grid("ogrid", True)
