"""When a thread looks for what it waits for, before it sleeps. Private.

A peer that is near answers within microseconds. To wake a thread that sleeps costs the one that
sends some 30 µs, and the one that sleeps about as much again. So it looks for some time first,
unless that was in vain some times in a row. Between two looks it offers its processor to
others: the peer may need it. The part in C does the same (``native/looking.h``).
"""

from __future__ import annotations

from typing import Final

__all__ = ["Looking"]

WITHIN: Final = 500e-6
"""Seconds that one looks at most: a peer that has to be woken first needs as long for a MiB. With
half of that one end after the other gave up, and both slept."""
MISSES: Final = 3
"""Looks in vain, one after the other, after which there are no more."""
REST: Final = 50e-3
"""Seconds of a wait after which one looks again for what follows: something new begins."""


class Looking:
    """What one side has learnt about looking. Touched by the thread that waits only."""

    __slots__ = ("_missed", "_misses")

    def __init__(self) -> None:
        self._misses = 0
        self._missed = False

    @property
    def due(self) -> bool:
        """Whether to look before the wait that comes now."""
        return self._misses < MISSES

    def looked(self, found: bool) -> None:
        """Something was there within that time, or not."""
        self._missed = not found
        self._misses = 0 if found else self._misses + 1

    def waited(self, seconds: float, came: bool) -> None:
        """So long took the wait that followed, or the one without looking first; and whether
        something came."""
        if (not self._missed and seconds < WITHIN) or (came and seconds > REST):
            self._misses = 0
        self._missed = False
