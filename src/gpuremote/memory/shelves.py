"""Blocks of memory that two processes see, kept by the one that owns them. Private.

A block is *out* while somebody in this process refers to it, and *lent* while the other process has
it: that one counts in the first page of the segment how often it gave the block back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from gpuremote import _clock
from gpuremote._speed import native

__all__ = ["SWEEP", "Mapping", "PythonSegment", "PythonShelf", "Segment", "Shelf"]

SWEEP: Final = 32
"""Blocks that are looked at, whether the other process has given them back, before there is a new
segment."""


class Mapping(Protocol):
    """A segment in this process's address space, see ``shared``."""

    @property
    def address(self) -> int: ...

    def counters(self, count: int) -> memoryview: ...

    def written(self, index: int) -> memoryview: ...

    def look(self, offset: int, nbytes: int) -> memoryview: ...

    def memory(self, offset: int, nbytes: int, on_gone: Callable[[], object]) -> memoryview: ...


class PythonSegment:
    """Blocks of one size, and who has them.

    Parameters
    ----------
    ident : int
        Number of the segment.
    block, blocks : int
        Bytes of each, and how many there are.
    mapping : Mapping
        Where they lie; kept as long as one of them is out.
    address, offset : int
        Of the mapping, and of the first block in it.

    Attributes
    ----------
    left_at : float
        When a block of it was dropped last.
    """

    def __init__(
        self, ident: int, block: int, blocks: int, mapping: Mapping, address: int, offset: int
    ) -> None:
        self.ident = ident
        self.block = block
        self.blocks = blocks
        self.mapping = mapping
        self.left_at = 0.0
        self._offset = offset
        self._returned = mapping.counters(blocks)
        self._sent = [0] * blocks
        self._used = [0] * blocks  # bytes of the block that is out; 0: no reference here
        self._given = [False] * blocks  # sent whole: no longer this process's own

    def lent(self, index: int) -> bool:
        """Whether the other process has the block."""
        return (self._sent[index] & 0xFFFFFFFF) != self._returned[index]

    def used(self, index: int) -> int:
        """Bytes of the block that are out; 0: nobody here refers to it."""
        return self._used[index]

    def given(self, index: int) -> bool:
        """Whether the block that is out was given away."""
        return self._given[index]

    def times(self, index: int) -> int:
        """How often the block was lent, by 32 bits."""
        return self._sent[index] & 0xFFFFFFFF

    def lend(self, index: int, given: bool) -> None:
        """The other process has it once more, or for good."""
        self._sent[index] += 1
        if given:
            self._given[index] = True

    def unused(self) -> bool:
        """Whether nobody has any of its blocks."""
        return not any(self._used) and not any(map(self.lent, range(self.blocks)))

    def take(self, index: int, nbytes: int, gone: Callable[[], object]) -> memoryview:
        """A view of a block that is out from now on; ``gone`` is called when it is dropped."""
        self._used[index] = nbytes
        self._given[index] = False
        return self.mapping.memory(self._offset + index * self.block, nbytes, gone)

    def drop(self, index: int) -> None:
        """Nobody here refers to it any more."""
        self._used[index] = 0
        self.left_at = _clock.now()


class PythonShelf:
    """The blocks of one size to which nobody here refers.

    Attributes
    ----------
    looks : int
        How often it was looked whether the other process has given one back.
    """

    def __init__(self) -> None:
        # Those that nobody has, the latest last: it may be in the caches. And those that the
        # other process has not given back.
        self._idle: list[tuple[PythonSegment, int]] = []
        self._lent: deque[tuple[PythonSegment, int]] = deque()
        # Those whose last reference here is gone; finalisers only append.
        self._gone: deque[tuple[PythonSegment, int]] = deque()
        self.looks = 0

    def add(self, segment: PythonSegment) -> None:
        """All blocks of a new segment, the first one to be used first."""
        self._idle[:0] = [(segment, k) for k in range(segment.blocks - 1, -1, -1)]

    def remove(self, segment: PythonSegment) -> None:
        """Of which nobody has a block."""
        self._idle = [block for block in self._idle if block[0] is not segment]
        self._lent = deque(block for block in self._lent if block[0] is not segment)

    def take(self, nbytes: int) -> tuple[memoryview, PythonSegment, int] | None:
        """A view of a block, its segment and its number; None: there is none."""
        self.collect()
        # The one that was left last, if it is back already; one that nobody has; any other.
        if not (self._sweep(1) or self._idle or self._sweep(SWEEP)):
            return None
        segment, index = self._idle[-1]
        if not 0 < nbytes <= segment.block:
            raise ValueError(f"{nbytes} bytes of a block of {segment.block}")
        gone, block = self._gone, self._idle.pop()
        return segment.take(index, nbytes, lambda: gone.append(block)), segment, index

    def _sweep(self, most: int) -> bool:
        """Look at ``most`` blocks, the latest first, whether one of them came back."""
        lent = self._lent
        for _ in range(min(len(lent), most)):
            self.looks += 1
            if not lent[-1][0].lent(lent[-1][1]):
                self._idle.append(lent.pop())
                return True
            if most > 1:
                lent.rotate(1)  # each in its turn
        return False

    def collect(self) -> None:
        """Take note of the blocks that were dropped."""
        while self._gone:
            segment, index = block = self._gone.popleft()
            segment.drop(index)
            (self._lent if segment.lent(index) else self._idle).append(block)

    def close(self) -> None:
        """Nothing more is given out; what is out stays valid as long as it lives."""
        self._idle = []
        self._lent = deque()
        self._gone = deque()


Segment = PythonSegment
Shelf = PythonShelf
if not TYPE_CHECKING and native is not None:
    Segment = native.Segment
    Shelf = native.Shelf
