"""gpuremote, the blocking API."""

from __future__ import annotations

import time
from time import process_time_ns
from typing import Any

import numpy as np

import gpuremote
from benchmarks.contenders import _devices as devices
from benchmarks.contenders.base import ALL, Bytes, Contender, Ops, now
from benchmarks.stamps import Stamps
from gpuremote.client.blocking import BlockingArray, Session

__all__ = ["BlockingDevices"]


class BlockingDevices(Contender):
    """``connect_sync``, ``put``, ``get(out=)`` and operators."""

    kinds = ALL | {"echo", "first_op", "busy_thread"}

    def open(self) -> None:
        self._session = gpuremote.connect_sync(self.setup.url)
        self._device = self._session.devices[0]
        self._kept: BlockingArray | None = None
        self._stamps: Stamps | None = None
        self._stamped: Session | None = None

    def close(self) -> None:
        self._kept = None
        if self._stamped is not None:
            self._stamped.close()
        if self._stamps is not None:
            self._stamps.close()
        self._session.close()

    @property
    def peer(self) -> int:
        return self._session.worker_pid

    def facts(self) -> dict[str, Any]:
        return devices.facts(self._session)

    def round_trips(self, size: int, count: int) -> list[int]:
        return self.rested_round_trips(size, count, 0.0)

    def rested_round_trips(self, size: int, count: int, rest: float) -> list[int]:
        host = np.arange(size, dtype=np.uint8)
        out = np.empty_like(host)
        array = self._device.put(host)
        times = []
        for _ in range(count):
            if rest:
                time.sleep(rest)
            begin = now()
            array.get(out=out)
            times.append(now() - begin)
        assert np.array_equal(out, host)
        return times

    def echoes(self, size: int, count: int) -> list[int]:
        host = np.arange(size, dtype=np.uint8)
        out = np.empty_like(host)
        put = self._device.put
        times = []
        for _ in range(count):
            begin = now()
            put(host).get(out=out)
            times.append(now() - begin)
        assert np.array_equal(out, host)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._kept = self._device.put(source)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        array = self._kept
        assert array is not None
        times = []
        for _ in range(count):
            begin = now()
            array.get(out=out)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._kept = None
        self._session.synchronize()

    def ops(self, size: int, count: int) -> Ops:
        start, addend = self._device.put_many([devices.START, devices.ADDEND])
        out = np.empty_like(devices.START)
        trips, counted = devices.traffic(self._session.stats())
        result = start
        cpu, begin = process_time_ns(), now()
        for _ in range(count):
            result = result + addend
        issued, cpu = now(), process_time_ns() - cpu
        result.get(out=out)
        total = now() - begin
        after = devices.traffic(self._session.stats())
        assert np.array_equal(out, devices.START + count * devices.ADDEND)
        return Ops(issued - begin, total, cpu, after[0] - trips, after[1] - counted)

    def first_ops(self, count: int, burn: int) -> list[int]:
        if self._stamps is None or self._stamped is None:
            self._stamps = Stamps(self.setup.stamps)
            self._stamped = gpuremote.connect_sync(self.setup.stamping_url)
        stamps, session = self._stamps, self._stamped
        start, addend = session.devices[0].put_many([devices.START, devices.ADDEND])
        (start + addend).get()  # brings the plan over
        times = []
        for _ in range(count):
            time.sleep(devices.IDLE)
            before, _ = stamps.last()
            begin = now()
            result = start + addend
            devices.burn(begin + burn)
            times.append(devices.reached(stamps, before, begin, burn))
            result.get()
        return times
