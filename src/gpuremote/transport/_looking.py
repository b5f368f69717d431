"""When a thread looks for what it waits for, before it sleeps. Private.

A peer that is near answers within microseconds. To wake a thread that sleeps costs the one that
sends some 30 µs, and the one that sleeps about as much again. So it looks for some time first,
unless what came before took longer than that. Between two looks it offers its processor to
others: the peer may need it. The part in C does the same (``native/looking.h``).
"""

from __future__ import annotations

from typing import Final

__all__ = ["Looking"]

WITHIN: Final = 500e-6
"""Seconds that one looks at most: a peer that has to be woken first needs as long for a MiB. With
half of that one end after the other gave up, and both slept."""


class Looking:
    """What one side has learnt about looking. Touched by the thread that waits only."""

    __slots__ = ("_missed", "due")

    def __init__(self) -> None:
        self.due = True
        """Whether to look before the wait that comes now."""
        self._missed = False

    def looked(self, found: bool) -> None:
        """Something was there within that time, or not."""
        self._missed = not found
        self.due = found

    def waited(self, seconds: float) -> None:
        """So long took the wait that followed, or the one without looking first."""
        if not self._missed and seconds < WITHIN:
            self.due = True
        self._missed = False
