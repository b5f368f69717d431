"""gpuremote, blocking, over other paths than the first TCP connection."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.contenders.base import TRANSFERS, Bytes, now
from benchmarks.contenders.device_blocking import BlockingDevices
from benchmarks.network import force_congestion

__all__ = ["OtherCongestion", "SharedArrays", "SharedMemory", "SharedResults"]


class OtherCongestion(BlockingDevices):
    """What its own choice of congestion control brings: the same without it."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        super().open()
        # The server sets its end up behind its welcome: by this answer it has.
        self._session.synchronize()
        for process in (os.getpid(), self.peer):
            if not force_congestion(process, self.setup.option):
                raise RuntimeError("its sockets can't be reached from outside")


class SharedMemory(BlockingDevices):
    """A session that has to use shared memory; arrays in ordinary memory."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        server = self.setup.url.partition("?")[0]
        self.setup = replace(self.setup, url=f"{server}?transport=shm")
        super().open()


class SharedArrays(SharedMemory):
    """Arrays that lie in the arena already: filled before, and not part of a put."""

    def puts(self, source: Bytes, count: int) -> list[int]:
        session: Any = self._session
        times = []
        for _ in range(count):
            array = session.empty(source.shape, source.dtype)
            np.copyto(array, source)
            begin = now()
            self._kept = self._device.put(array)
            times.append(now() - begin)
        return times


class SharedResults(SharedMemory):
    """Puts of arrays that an op uses, so that the server is told of each, and gets of what one has
    made, for which it has to be asked each time."""

    def puts(self, source: Bytes, count: int) -> list[int]:
        times: list[int] = []
        for _ in range(count):
            times += super().puts(source, 1)
            assert self._kept is not None
            self._used = self._kept[:1]
        self._kept = self._kept + np.uint8(0)
        return times
