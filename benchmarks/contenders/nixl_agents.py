"""nixl with its UCX backend: one-sided WRITE and READ between registered memory, polled."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.contenders._control import accept, connect
from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now
from benchmarks.contenders.ucx import UCX
from benchmarks.workloads import MIB

__all__ = ["Nixl", "serve"]

ARENA: Final = 256 * MIB
"""Bytes that the other side has registered, once."""


class Nixl(Contender):
    """A transfer is posted once per call from handles that are made before."""

    kinds = TRANSFERS | {"round_trip"}
    restless = True

    def open(self) -> None:
        os.environ.update(UCX[self.setup.option])
        self._peer = Peer("nixl_agents", self.setup.congestion)
        self._control = connect(self._peer.port)
        self._agent = _agent("client", thread=False)
        metadata, self._address = self._control.receive()
        self._there = self._agent.add_remote_agent(metadata)
        self._control.send(self._agent.get_agent_metadata())
        self._control.receive()
        self._local: dict[tuple[int, int], Any] = {}
        self._handles: dict[tuple[str, int, int], Any] = {}

    def close(self) -> None:
        self.forget()
        self._control.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        return self.gets(np.zeros(size, np.uint8), count)

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._transfers("WRITE", source, count)

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._transfers("READ", out, count)

    def forget(self) -> None:
        for handle in self._handles.values():
            self._agent.release_xfer_handle(handle)
        for registered in self._local.values():
            self._agent.deregister_memory(registered)
        self._handles, self._local = {}, {}

    def _transfers(self, operation: str, memory: Bytes, count: int) -> list[int]:
        handle = self._handle(operation, memory)
        transfer, state = self._agent.transfer, self._agent.check_xfer_state
        times = []
        for _ in range(count):
            begin = now()
            found = transfer(handle)
            while found == "PROC":
                found = state(handle)
            times.append(now() - begin)
            if found != "DONE":
                raise RuntimeError(f"nixl's {operation} ended as {found}")
        return times

    def _handle(self, operation: str, memory: Bytes) -> Any:
        if memory.nbytes > ARENA:
            raise ValueError(f"{memory.nbytes} bytes; the other side has registered {ARENA}")
        address, size = memory.ctypes.data, memory.nbytes
        if (address, size) not in self._local:
            if any(address < a + s and a < address + size for a, s in self._local):
                self.forget()
            self._local[address, size] = self._agent.register_memory(
                [(address, size, 0, "")], "DRAM"
            )
        if (operation, address, size) not in self._handles:
            self._handles[operation, address, size] = self._agent.initialize_xfer(
                operation,
                self._agent.get_xfer_descs([(address, size, 0)], "DRAM"),
                self._agent.get_xfer_descs([(self._address, size, 0)], "DRAM"),
                self._there,
            )
        return self._handles[operation, address, size]


def _agent(name: str, thread: bool) -> Any:
    """``thread``: its own, which polls; one that waits by polling itself needs none."""
    # It brings one package per CUDA version, and works without CUDA with either.
    api = importlib.import_module("nixl._api")
    agent = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=thread, backends=[]))
    # Its way of noticing a lost peer rules shared memory out.
    agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
    return agent


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    control = accept(ready)
    agent = _agent("server", thread=True)
    arena = np.empty(ARENA, np.uint8)
    arena[:] = 0  # touched
    agent.register_memory([(arena.ctypes.data, ARENA, 0, "")], "DRAM")
    control.send((agent.get_agent_metadata(), arena.ctypes.data))
    agent.add_remote_agent(control.receive())
    control.send("ready")
    # What is left is done by the agent's own thread.
    control.wait()
