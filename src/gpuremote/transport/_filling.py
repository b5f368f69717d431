"""A payload on its way into memory that both ends see. Private; ``_loan`` is its other end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from gpuremote._speed import native
from gpuremote.memory.host import copy_bytes
from gpuremote.transport._loan import LARGE

__all__ = ["Fill", "Pair"]

Pair: TypeAlias = tuple[memoryview | None, memoryview]
"""To where bytes are copied (None: they lie there already), and from where."""


class Fill:
    """A payload that is being copied into its block."""

    __slots__ = ("channel", "counter", "done", "filled", "large", "pairs", "said")

    def __init__(
        self,
        channel: int,
        pairs: deque[Pair],
        done: Callable[[], None] | None,
        counter: memoryview | None = None,
    ) -> None:
        self.channel = channel
        self.large = sum(here.nbytes for _, here in pairs) >= LARGE
        self.counter = counter  # where the receiver sees how far it is
        self.pairs = pairs
        self.done = done
        self.filled = 0
        self.said = 0

    def copy(self, limit: int) -> int:
        """Copy about ``limit`` bytes more; the number of those copied."""
        copied = 0
        while self.pairs:
            there, here = self.pairs[0]
            if there is None:
                self.filled += here.nbytes
                self.pairs.popleft()
                continue
            if copied >= limit:
                break
            size = min(here.nbytes, limit - copied)
            if self.counter is not None:
                native.lead(there[:size], here[:size], self.counter, self.filled, self.large)
            else:
                copy_bytes(there[:size], here[:size])
            copied += size
            self.filled += size
            if size == here.nbytes:
                self.pairs.popleft()
            else:
                self.pairs[0] = there[size:], here[size:]
        return copied
