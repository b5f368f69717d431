"""No transport at all: a copy inside one process, the floor for whatever moves bytes."""

from __future__ import annotations

from time import process_time_ns

import numpy as np

from benchmarks.contenders.base import Bytes, Contender, Ops, now

__all__ = ["Memcpy"]


class Memcpy(Contender):
    """``numpy.copyto``."""

    def open(self) -> None:
        self._kept: Bytes = np.empty(0, np.uint8)

    def close(self) -> None:
        self.forget()

    @property
    def peer(self) -> None:
        return None

    def round_trips(self, size: int, count: int) -> list[int]:
        here, there = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        times = []
        for _ in range(count):
            begin = now()
            np.copyto(there, here)
            np.copyto(here, there)
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            if self._kept.nbytes != source.nbytes:
                self._kept = np.empty_like(source)
            np.copyto(self._kept, source)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            np.copyto(out, self._kept)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._kept = np.empty(0, np.uint8)

    def ops(self, size: int, count: int) -> Ops:
        here, there = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        cpu, begin = process_time_ns(), now()
        for _ in range(count):
            np.copyto(there, here)
        total, cpu = now() - begin, process_time_ns() - cpu
        return Ops(total, total, cpu, 0)
