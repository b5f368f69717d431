"""A few blocks of shared memory that a large payload goes through. Private."""

from __future__ import annotations

import os
from typing import Final

from gpuremote._clock import now_ns
from gpuremote.memory.shared import Arena, Place

__all__ = ["PIECE", "Window"]

PIECE: Final = 4 << 20
"""Bytes of a block."""
BLOCKS: Final = 4
"""So that sender and receiver copy at a time, and neither waits long for the other."""


class Window:
    """Blocks of this end, used again as soon as the other one has given them back.

    Parameters
    ----------
    arena : Arena
        Of which they are.
    patience : int
        Nanoseconds to look for one, if the other end has all of them.
    """

    def __init__(self, arena: Arena, patience: int) -> None:
        self._arena = arena
        self._patience = patience
        self._most = BLOCKS
        self._blocks: list[tuple[memoryview, Place]] = []

    def take(self) -> tuple[memoryview, Place] | None:
        """A block that the other end does not have, to be lent; None: there is none now."""
        found = self._back()
        if found is None and len(self._blocks) < self._most:
            found = self._arena.take(PIECE)
            if found is None:
                self._most = len(self._blocks)  # to ask again would cost others what is kept
            else:
                self._blocks.append(found)
        until = now_ns() + self._patience if self._blocks else 0
        while found is None and now_ns() < until:
            os.sched_yield()
            found = self._back()
        return found

    def _back(self) -> tuple[memoryview, Place] | None:
        for found in self._blocks:
            if self._arena.back(found[1]):
                return found
        return None
