"""Large pieces of host memory, used again: fresh pages cost as much as receiving into them.

A freed block is kept for the next request of about its size. A request that none fits drops
them all first, so that nothing is held beside what is in use but what the latest requests were
like.
"""

from __future__ import annotations

import threading
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape

__all__ = ["BlockPool", "aligned"]

SMALLEST: Final = 1 << 20
"""Below this the C library's allocator does the same, and better."""
LINE: Final = 64
"""Bytes of a line of the cache."""


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that begins with a line of the cache. The C library puts large memory 16
    bytes behind one, and then every other vector lies in two: additions in the cache take a quarter
    longer."""
    memory = np.empty(nbytes + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + nbytes]


class _Memory(NamedTuple):
    """What a block is made of, and where that begins: to ask NumPy takes as long as the rest."""

    array: npt.NDArray[np.uint8]
    address: int


class _Block:
    """Memory that goes back to its pool when the last array or view over it is gone.

    NumPy keeps this object as the base of the arrays, and so does whoever exports their bytes.
    """

    __slots__ = ("__array_interface__", "_memory", "_pool")

    def __init__(self, memory: _Memory, nbytes: int, pool: BlockPool) -> None:
        self._memory = memory
        self._pool = pool
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        # May run in any thread, in the middle of anything: append is all.
        if len(self._pool.spare) < self._pool.keep:
            self._pool.spare.append(self._memory)


class BlockPool:
    """Spare blocks.

    Parameters
    ----------
    keep : int
        Spare blocks to keep.
    largest : int
        Bytes above which a block is never kept.

    Attributes
    ----------
    spare : list
        Of memory and its address.
    """

    def __init__(self, keep: int = 2, largest: int = 1 << 30) -> None:
        self.keep = keep
        self.spare: list[_Memory] = []
        self._largest = largest
        self._lock = threading.Lock()

    def empty(self, shape: Shape, dtype: np.dtype[Any], nbytes: int) -> npt.NDArray[Any]:
        """As ``numpy.empty``; ``nbytes`` is the size of that array."""
        if not SMALLEST <= nbytes <= self._largest:
            return np.empty(shape, dtype)
        with self._lock:
            memory = self._take(nbytes)
            if memory is None:
                self.spare.clear()
        if memory is None:
            fresh = aligned(nbytes)
            memory = _Memory(fresh, fresh.ctypes.data)
        return np.ndarray(shape, dtype, np.asarray(_Block(memory, nbytes, self)))

    def _take(self, nbytes: int) -> _Memory | None:
        for position, memory in enumerate(self.spare):
            if nbytes <= memory.array.nbytes <= nbytes + nbytes // 8:
                # Finalisers append at the end only, so the position still holds.
                return self.spare.pop(position)
        return None
