"""gpuremote, the asyncio API, on either loop."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from time import process_time_ns
from typing import Any

import numpy as np

import gpuremote
from benchmarks.contenders import _devices as devices
from benchmarks.contenders.base import ALL, Bytes, Contender, Ops, now
from benchmarks.stamps import Stamps
from gpuremote.client.aio import AsyncArray, AsyncSession

__all__ = ["AsyncioDevices", "UvloopDevices"]


class AsyncioDevices(Contender):
    """``connect``, ``await put``, ``await get(out=)`` and operators, on asyncio's own loop."""

    kinds = ALL | {"echo", "first_op"}

    def open(self) -> None:
        self._runner = asyncio.Runner(loop_factory=self.loop_factory())
        self._session = self._runner.run(_connect(self.setup.url))
        self._device = self._session.devices[0]
        self._kept: AsyncArray | None = None
        self._stamps: Stamps | None = None
        self._stamped: AsyncSession | None = None

    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop] | None:
        return None

    def close(self) -> None:
        self._kept = None
        if self._stamped is not None:
            self._runner.run(self._stamped.close())
        if self._stamps is not None:
            self._stamps.close()
        self._runner.run(self._session.close())
        self._runner.close()

    @property
    def peer(self) -> int:
        return self._session.worker_pid

    def facts(self) -> dict[str, Any]:
        return devices.facts(self._session)

    def round_trips(self, size: int, count: int) -> list[int]:
        return self._runner.run(self._round_trips(size, count))

    async def _round_trips(self, size: int, count: int) -> list[int]:
        host = np.arange(size, dtype=np.uint8)
        out = np.empty_like(host)
        array = await self._device.put(host)
        times = []
        for _ in range(count):
            begin = now()
            await array.get(out=out)
            times.append(now() - begin)
        assert np.array_equal(out, host)
        return times

    def echoes(self, size: int, count: int) -> list[int]:
        return self._runner.run(self._echoes(size, count))

    async def _echoes(self, size: int, count: int) -> list[int]:
        host = np.arange(size, dtype=np.uint8)
        out = np.empty_like(host)
        put = self._device.put
        times = []
        for _ in range(count):
            begin = now()
            await (await put(host)).get(out=out)
            times.append(now() - begin)
        assert np.array_equal(out, host)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._runner.run(self._puts(source, count))

    async def _puts(self, source: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._kept = await self._device.put(source)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._runner.run(self._gets(out, count))

    async def _gets(self, out: Bytes, count: int) -> list[int]:
        array = self._kept
        assert array is not None
        times = []
        for _ in range(count):
            begin = now()
            await array.get(out=out)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._kept = None
        self._runner.run(self._session.synchronize())

    def ops(self, size: int, count: int) -> Ops:
        return self._runner.run(self._ops(count))

    async def _ops(self, count: int) -> Ops:
        start, addend = await self._device.put_many([devices.START, devices.ADDEND])
        out = np.empty_like(devices.START)
        trips, counted = devices.traffic(self._session.stats())
        result = start
        cpu, begin = process_time_ns(), now()
        for _ in range(count):
            result = result + addend
        issued, cpu = now(), process_time_ns() - cpu
        await result.get(out=out)
        total = now() - begin
        after = devices.traffic(self._session.stats())
        assert np.array_equal(out, devices.START + count * devices.ADDEND)
        return Ops(issued - begin, total, cpu, after[0] - trips, after[1] - counted)

    def first_ops(self, count: int, burn: int) -> list[int]:
        return self._runner.run(self._first_ops(count, burn))

    async def _first_ops(self, count: int, burn: int) -> list[int]:
        if self._stamps is None or self._stamped is None:
            self._stamps = Stamps(self.setup.stamps)
            self._stamped = await _connect(self.setup.stamping_url)
        stamps, session = self._stamps, self._stamped
        start, addend = await session.devices[0].put_many([devices.START, devices.ADDEND])
        await (start + addend).get()  # brings the plan over
        times = []
        for _ in range(count):
            await asyncio.sleep(devices.IDLE)
            before, _ = stamps.last()
            begin = now()
            result = start + addend
            devices.burn(begin + burn)
            times.append(devices.reached(stamps, before, begin, burn))
            await result.get()
        return times


class UvloopDevices(AsyncioDevices):
    """The same on uvloop."""

    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop]:
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module(
            "uvloop"
        ).new_event_loop
        return factory


async def _connect(url: str) -> AsyncSession:
    return await gpuremote.connect(url)
