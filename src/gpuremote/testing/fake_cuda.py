"""The CUDA driver without a GPU: ordinary memory stands in for a device's, and says what was done
to it, in which order."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from gpuremote.memory.cuda import Allocation, CudaError

__all__ = ["FakeCuda"]

_PAGE: Final = 4096


def void(_: object) -> None: ...


class FakeCuda:
    """A driver (see ``gpuremote.memory.cuda``).

    Parameters
    ----------
    dmabuf : bool
        Whether memory can be exported as a dma-buf.
    ordered : bool
        Whether kernels see what a card wrote without a flush.
    flushes : bool
        Whether the host can ask for that flush.

    Attributes
    ----------
    holding : bool
        What streams are given is not carried out until :meth:`let_go`, or until somebody waits
        for the stream.
    calls : list of tuple
        Name and arguments of what was called, in order: exports, flushes, copies, waits.
    exported : dict of int to int
        Descriptors that were given out, and the addresses that they stand for.
    pinned : dict of int to mmap
        Page-locked memory that was not given back.
    streams, events : set of int
        Those that were not given back.
    pinnable : int
        Bytes of page-locked memory that there are.
    """

    def __init__(self, *, dmabuf: bool = True, ordered: bool = False, flushes: bool = True) -> None:
        self.dmabuf = dmabuf
        self.ordered = ordered
        self.flushes = flushes
        self.holding = False
        self.pinnable = 1 << 40
        self.calls: list[tuple[Any, ...]] = []
        self.exported: dict[int, int] = {}
        self.pinned: dict[int, mmap.mmap] = {}
        self.streams: set[int] = set()
        self.events: set[int] = set()
        self._reached: set[int] = set()
        self._numbers = count(1)
        self._allocations: dict[int, tuple[Allocation, Any]] = {}
        self._queues: dict[int, deque[Callable[[], None]]] = {}
        self._failures: dict[str, CudaError] = {}

    # -- what tests do with it -----------------------------------------------------------------

    def allocate(self, size: int, *, device: int = 0, pooled: bool = False) -> int:
        """Memory of a device; its address."""
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.adopt(address, size, memory, device=device, pooled=pooled)
        return address

    def adopt(
        self, address: int, size: int, owner: Any, *, device: int = 0, pooled: bool = False
    ) -> None:
        """From here on this memory, which ``owner`` holds, is a device's."""
        found = Allocation(address, size, next(self._numbers), device, pooled)
        self._allocations[address] = found, owner

    def free(self, address: int) -> None:
        """An allocation is gone; its memory stays where it is, and may be adopted again."""
        del self._allocations[address]

    def owns(self, address: int) -> bool:
        return self._find(address) is not None

    def fail(self, name: str, result: int = 999) -> None:
        """A method raises from here on."""
        self._failures[name] = CudaError(f"{name}: CUDA_ERROR_UNKNOWN", result)

    def called(self, *names: str) -> list[str]:
        """The names of the calls so far, of those that matter, in order."""
        return [call[0] for call in self.calls if call[0] in names]

    def let_go(self, steps: int = 1 << 30) -> None:
        """Carry out what was held, or some of it."""
        self.holding = self.holding and steps < 1 << 30
        for queue in self._queues.values():
            while queue and steps:
                queue.popleft()()
                steps -= 1

    # -- what the library does with it ---------------------------------------------------------

    def _call(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self._failures:
            raise self._failures[name]

    def _find(self, address: int) -> Allocation | None:
        for found, _ in self._allocations.values():
            if found.base <= address < found.base + found.size:
                return found
        return None

    def devices(self) -> int:
        return 1

    def allocation(self, pointer: int) -> Allocation:
        if "allocation" in self._failures:
            raise self._failures["allocation"]
        found = self._find(pointer)
        if found is None:
            raise CudaError("cuPointerGetAttribute: CUDA_ERROR_INVALID_VALUE", 1)
        return found

    def exports_dmabuf(self, device: int) -> bool:
        return self.dmabuf

    def export_dmabuf(self, device: int, address: int, size: int) -> int:
        self._call("export_dmabuf", address, size)
        if address % _PAGE or size % _PAGE:
            raise CudaError("cuMemGetHandleForAddressRange: CUDA_ERROR_INVALID_VALUE", 1)
        descriptor = os.memfd_create("dma-buf", os.MFD_CLOEXEC)
        self.exported[descriptor] = address
        return descriptor

    def synchronous_copies(self, device: int, pointer: int) -> None:
        self._call("synchronous_copies", pointer)

    def orders_writes(self, device: int) -> bool:
        return self.ordered

    def flushes_writes(self, device: int) -> bool:
        return self.flushes

    def flush_writes(self, device: int) -> None:
        self._call("flush_writes", device)

    def allocate_host(self, device: int, size: int) -> int:
        self._call("allocate_host", size)
        if sum(map(len, self.pinned.values())) + size > self.pinnable:
            raise CudaError("cuMemHostAlloc: CUDA_ERROR_OUT_OF_MEMORY", 2)
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.pinned[address] = memory
        return address

    def free_host(self, device: int, address: int) -> None:
        self._call("free_host", address)
        del self.pinned[address]

    def create_stream(self, device: int) -> int:
        stream = 100 + next(self._numbers)
        self.streams.add(stream)
        return stream

    def destroy_stream(self, device: int, stream: int) -> None:
        self.streams.remove(stream)

    def copy_out(self, device: int, host: int, pointer: int, size: int, stream: int) -> None:
        self._copy("copy_out", host, pointer, size, stream)

    def copy_in(self, device: int, pointer: int, host: int, size: int, stream: int) -> None:
        self._copy("copy_in", pointer, host, size, stream)

    def _copy(self, name: str, target: int, source: int, size: int, stream: int) -> None:
        self._call(name, size, stream)
        device = source if name == "copy_out" else target
        found = self._find(device)
        if found is None or device + size > found.base + found.size:
            raise CudaError(f"{name}: CUDA_ERROR_INVALID_VALUE", 1)
        self._queue(stream, lambda: ctypes.memmove(target, source, size))

    def _queue(self, stream: int, step: Callable[[], object]) -> None:
        queue = self._queues.setdefault(stream, deque())
        queue.append(lambda: void(step()))
        while queue and not self.holding:
            queue.popleft()()

    def synchronize(self, device: int, stream: int) -> None:
        self._call("synchronize", stream)
        queue = self._queues.get(stream, deque())
        while queue:
            queue.popleft()()

    def record(self, device: int, stream: int) -> int:
        event = next(self._numbers)
        self.events.add(event)
        self._queue(stream, lambda: self._reached.add(event))
        return event

    def reached(self, device: int, event: int) -> bool:
        if "reached" in self._failures:
            raise self._failures["reached"]
        assert event in self.events
        return event in self._reached

    def destroy_event(self, device: int, event: int) -> None:
        self.events.remove(event)
