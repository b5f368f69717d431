"""Where the seeds of random numbers come from: a sequence of them for each generator."""

from __future__ import annotations

import threading
from typing import Any, Final, Self

import numpy as np

__all__ = ["XORWOW", "BitGenerator", "MRG32k3a", "Philox4x3210"]

_WORD: Final = (1 << 64) - 1


class BitGenerator:
    """A sequence of seeds, one for each draw.

    What makes the bits on the server is its backend's own (Philox), whatever this class is called.

    Parameters
    ----------
    seed : int, sequence of int, SeedSequence, optional
        Without it, one from the operating system.
    size
        CuPy's, without effect.
    """

    def __init__(self, seed: Any = None, *, size: int = -1) -> None:
        sequence = np.random.SeedSequence
        self._lock = threading.Lock()
        self._begin(seed if isinstance(seed, sequence) else sequence(seed))

    def _begin(self, seed_seq: np.random.SeedSequence) -> None:
        self.seed_seq = seed_seq
        first, step = self.seed_seq.generate_state(2, np.uint64)
        # An odd step: all 2**64 numbers come before one comes again.
        self._first, self._step, self._drawn = int(first), int(step) | 1, 0

    def next_seed(self) -> int:
        """The seed of the next draw, as a signed 64-bit integer."""
        with self._lock:
            self._drawn += 1
            drawn = self._drawn
        # The finaliser of SplitMix64: each bit of its argument reaches all bits of the result.
        x = (self._first + drawn * self._step) & _WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
        return (x ^ (x >> 31)) - (1 << 63)

    @property
    def state(self) -> dict[str, Any]:
        """What a generator with the same numbers ahead is made from; may be assigned."""
        return {"first": self._first, "step": self._step, "drawn": self._drawn}

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        with self._lock:
            self._first, self._step = value["first"], value["step"]
            self._drawn = value["drawn"]

    def spawn(self, n_children: int) -> list[Self]:
        """Generators that are independent of this one and of each other."""
        return [type(self)(child) for child in self.seed_seq.spawn(n_children)]

    def __getstate__(self) -> dict[str, Any]:
        return {"seed_seq": self.seed_seq, "state": self.state}

    def __setstate__(self, value: dict[str, Any]) -> None:
        self._lock = threading.Lock()
        self._begin(value["seed_seq"])
        self.state = value["state"]


class XORWOW(BitGenerator):
    """A :class:`BitGenerator`."""


class MRG32k3a(BitGenerator):
    """A :class:`BitGenerator`."""


class Philox4x3210(BitGenerator):
    """A :class:`BitGenerator`."""
