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
        self._blocks: list[tuple[memoryview, Place]] = []

    def take(self) -> tuple[memoryview, Place] | None:
        """A block that the other end does not have, to be lent; None: there is none now."""
        until = 0
        while True:
            for found in self._blocks:
                if self._arena.back(found[1]):
                    return found
            if len(self._blocks) < BLOCKS:
                taken = self._arena.take(PIECE)
                if taken is not None:
                    self._blocks.append(taken)
                    return taken
            now = now_ns()
            until = until or now + self._patience
            if now >= until:
                return None
            os.sched_yield()
