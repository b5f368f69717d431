"""A payload on its way into memory that both ends see. Private; ``_loan`` is its other end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from gpuremote._speed import native
from gpuremote.memory.host import copy_bytes
from gpuremote.transport._loan import LARGE

__all__ = ["Fill", "Pair"]

Pair: TypeAlias = tuple[memoryview | None, memoryview]
"""To where bytes are copied (None: they lie there already), and from where."""


class Fill:
    """A payload that is being copied into its block.

    Parameters
    ----------
    channel : int
    pairs : sequence of Pair
    done : callable or None
        To be called when the receiver has been told of the last byte.
    counter : memoryview or None
        Where the receiver sees how much there is.

    Attributes
    ----------
    filled, said : int
        Bytes that are in place, and those of which the receiver was told.
    """

    __slots__ = ("_counter", "_large", "_pairs", "channel", "done", "filled", "said", "total")

    def __init__(
        self,
        channel: int,
        pairs: Sequence[Pair],
        done: Callable[[], None] | None,
        counter: memoryview | None = None,
    ) -> None:
        self.channel = channel
        self.done = done
        self.filled = self.said = self.total = 0
        self._counter = counter
        # With the byte of the payload that each begins with. How far it is ``filled`` alone says,
        # as an interruption may come anywhere.
        self._pairs: deque[tuple[int, memoryview | None, memoryview]] = deque()
        for there, here in pairs:
            self._pairs.append((self.total, there, here))
            self.total += here.nbytes
        self._large = self.total >= LARGE

    @property
    def left(self) -> int:
        """Bytes that are not in place yet."""
        return self.total - self.filled

    def copy(self, limit: int) -> int:
        """Copy about ``limit`` bytes more; the number of those copied."""
        copied = 0
        while self._pairs:
            start, there, here = self._pairs[0]
            begin = self.filled - start
            if begin == here.nbytes:
                self._pairs.popleft()
            elif there is None:
                self.filled = start + here.nbytes
            elif copied < limit:
                size = min(here.nbytes - begin, limit - copied)
                to, of = there[begin : begin + size], here[begin : begin + size]
                if self._counter is not None:
                    native.lead(to, of, self._counter, self.filled, self._large)
                else:
                    copy_bytes(to, of)
                copied += size
                self.filled += size
            else:
                break
        return copied
