"""mooncake-transfer-engine over TCP: one-sided writes and reads between registered memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.contenders._control import accept, connect
from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now
from benchmarks.workloads import MIB

__all__ = ["Mooncake", "serve"]

ARENA: Final = 256 * MIB
"""Bytes that the other side has registered, once."""


class Mooncake(Contender):
    """``transfer_sync_write`` and ``transfer_sync_read``."""

    kinds = TRANSFERS | {"round_trip"}
    restless = True

    def open(self) -> None:
        self._peer = Peer("mooncake_engine", self.setup.congestion)
        self._control = connect(self._peer.port)
        self._engine = _engine()
        self._there, self._address = self._control.receive()
        self._local: dict[int, int] = {}

    def close(self) -> None:
        self._control.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        return self.gets(np.zeros(size, np.uint8), count)

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._transfers(self._engine.transfer_sync_write, source, count)

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._transfers(self._engine.transfer_sync_read, out, count)

    def forget(self) -> None:
        for address in self._local:
            self._engine.unregister_memory(address)
        self._local = {}

    def _transfers(self, transfer: Any, memory: Bytes, count: int) -> list[int]:
        if memory.nbytes > ARENA:
            raise ValueError(f"{memory.nbytes} bytes; the other side has registered {ARENA}")
        address, size = memory.ctypes.data, memory.nbytes
        self._register(address, size)
        times = []
        for _ in range(count):
            begin = now()
            result = transfer(self._there, address, self._address, size)
            times.append(now() - begin)
            if result != 0:
                raise RuntimeError(f"mooncake's transfer ended with {result}")
        return times

    def _register(self, address: int, size: int) -> None:
        if self._local.get(address) == size:
            return
        if any(address < a + s and a < address + size for a, s in self._local.items()):
            self.forget()
        result = self._engine.register_memory(address, size)
        if result != 0:
            raise RuntimeError(f"mooncake does not register {size} bytes: {result}")
        self._local[address] = size


def _engine() -> Any:
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    result = engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    if result != 0:
        raise RuntimeError(f"mooncake's engine does not start: {result}")
    return engine


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    control = accept(ready)
    engine = _engine()
    arena = np.empty(ARENA, np.uint8)
    arena[:] = 0  # touched
    engine.register_memory(arena.ctypes.data, ARENA)
    control.send((f"127.0.0.1:{engine.get_rpc_port()}", arena.ctypes.data))
    # What is left is done by the engine's own threads.
    control.wait()
