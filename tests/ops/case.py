"""What a case is, and values to fill its arrays with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuremote.ops.meta import MetaTable
from gpuremote.ops.operands import Operand, scalar_operand

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

ALL = ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
SOME = ["b1", "i4", "u1", "f2", "f4", "f8", "c8"]
SHAPES: list[Shape] = [(), (3,), (2, 3), (0,), (2, 0, 3)]
CUBE: Shape = (2, 3, 4)
WEAK: list[Any] = [True, 1, 2.0, 1j]
STRONG: list[Any] = [np.dtype(name).type(1) for name in ALL]

METAS = MetaTable()


class Case(NamedTuple):
    """Operands (arrays and scalars) and parameters of one call.

    ``index`` is what the reference gets in place of the index's operands.
    """

    operands: tuple[Any, ...]
    params: dict[str, Any] = {}  # noqa: RUF012
    index: Any = None

    def kinds(self) -> list[Operand]:
        """The operands as a plan sees them."""
        return [
            METAS.get(o.shape, np.dtype(o.dtype), 0)
            if isinstance(o, np.ndarray)
            else scalar_operand(o)[0]
            for o in self.operands
        ]


def values(shape: Shape, dtype: str, seed: int = 0) -> Array:
    """Small values, different from each other where there is room."""
    rng = np.random.default_rng([seed, len(shape), *shape])
    kind = np.dtype(dtype)
    found: Any
    if kind.kind in "biu":
        found = rng.integers(0, 2, shape) if kind.kind == "b" else rng.integers(1, 7, shape)
    else:
        found = rng.uniform(0.1, 0.9, shape)
        if kind.kind == "c":
            found = found + 1j * rng.uniform(0.1, 0.9, shape)
    return np.asarray(found).astype(kind)


def square(shape: Shape, dtype: str) -> Array:
    """Symmetric (Hermitian), positive definite matrices."""
    x = values(shape, "c16" if dtype[0] == "c" else "f8")
    found = x @ x.conj().swapaxes(-1, -2) + 3 * np.eye(shape[-1])
    return (np.rint(found) if dtype[0] in "iu" else found).astype(dtype)
