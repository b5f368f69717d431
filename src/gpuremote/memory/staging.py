"""Page-locked memory through which device memory travels piece by piece.

Two pieces of it are enough: while one is on the wire the other is being copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import deque
from typing import Final

from gpuremote.memory.cuda import CudaDriver, CudaError
from gpuremote.memory.device import DeviceMemory

__all__ = ["SLAB", "SLABS", "Slab", "Staging"]

SLAB: Final = 16 << 20
"""Bytes of a slab."""
SLABS: Final = 2
"""Slabs of one direction."""


class Slab:
    """A piece of it. ``view`` is all of its bytes."""

    __slots__ = ("address", "event", "memory", "pinned", "view")

    def __init__(self, address: int, size: int, mapping: mmap.mmap | None) -> None:
        # What is made from the exporter keeps it, and it can be watched.
        exporter = (
            (ctypes.c_ubyte * size).from_address(address)
            if mapping is None
            else (ctypes.c_ubyte * size).from_buffer(mapping)
        )
        self.view = memoryview(exporter).cast("B")
        self.address = address or ctypes.addressof(exporter)
        self.pinned = mapping is None
        self.event = 0
        """Behind the copy that was issued last; 0 once it is known to be over."""
        self.memory: DeviceMemory | None = None
        """The other side of that copy, which has to stay for it."""


class Staging:
    """The slabs of one direction and one device. Made when they are first needed.

    Where page-locked memory can't be had, ordinary memory takes its place: the copies then wait.

    Parameters
    ----------
    driver : CudaDriver
    device : int
    size : int
        Bytes of a slab.
    count : int
        At most so many of them.
    """

    def __init__(
        self, driver: CudaDriver, device: int, size: int = SLAB, count: int = SLABS
    ) -> None:
        self.size = size
        self._driver = driver
        self._device = device
        self._count = count
        self._slabs: list[Slab] = []
        self._free: list[Slab] = []
        self._leaving: list[Slab] = []  # given back, with a copy that may not be over
        self._stream = 0
        self._loading = 0

    @property
    def copying(self) -> bool:
        """Whether a copy is under way, the end of which nothing but a look tells of."""
        return self._loading > 0 or bool(self._leaving)

    def take(self) -> Slab | None:
        """A slab that nobody uses; None while there is none.

        Raises
        ------
        CudaError
        """
        for slab in [slab for slab in self._leaving if self._over(slab)]:
            self._leaving.remove(slab)
            self._free.append(slab)
        if self._free:
            return self._free.pop()
        if len(self._slabs) >= self._count:
            return None
        try:
            slab = Slab(self._driver.allocate_host(self._device, self.size), self.size, None)
        except CudaError:
            slab = Slab(0, self.size, mmap.mmap(-1, self.size))
        self._slabs.append(slab)
        return slab

    def load(self, slab: Slab, memory: DeviceMemory) -> None:
        """Begin to copy device memory into the slab. What produced it has to be done."""
        if not self._stream:
            # Work that is queued later in the producer's stream must not come in between.
            self._stream = self._driver.create_stream(self._device)
        self._driver.copy_out(
            self._device, slab.address, memory.pointer, memory.nbytes, self._stream
        )
        self._issued(slab, memory, self._stream)
        self._loading += 1

    def loaded(self, slab: Slab) -> bool:
        """Whether what :meth:`load` began is over."""
        before = slab.event
        if not self._over(slab):
            return False
        if before:
            self._loading -= 1
        return True

    def store(self, slab: Slab, memory: DeviceMemory) -> None:
        """Copy the slab to device memory, in the order of that memory's stream. The slab comes
        back by itself."""
        self._driver.copy_in(
            self._device, memory.pointer, slab.address, memory.nbytes, memory.stream
        )
        self._issued(slab, memory, memory.stream)
        self._leaving.append(slab)

    def give(self, slab: Slab) -> None:
        """A slab is not needed any more, whether what was loaded there is or not."""
        if slab.event:
            self._loading -= 1
            self._leaving.append(slab)
        else:
            self._free.append(slab)

    def _issued(self, slab: Slab, memory: DeviceMemory, stream: int) -> None:
        slab.memory = memory
        slab.event = self._driver.record(self._device, stream)

    def _over(self, slab: Slab) -> bool:
        return _over(self._driver, self._device, slab)

    def close(self) -> None:
        """Give everything back. What the device still copies stays until it has."""
        tidy()
        for slab in self._slabs:
            _left.append((self._driver, self._device, slab))
        self._slabs.clear()
        self._free.clear()
        self._leaving.clear()
        self._loading = 0
        stream, self._stream = self._stream, 0
        if stream:
            with contextlib.suppress(CudaError):
                self._driver.destroy_stream(self._device, stream)
        tidy()


_left: deque[tuple[CudaDriver, int, Slab]] = deque()
"""Slabs of connections that are gone, with a copy that may not be over; looked at whenever another
one goes."""


def _over(driver: CudaDriver, device: int, slab: Slab) -> bool:
    if slab.event and driver.reached(device, slab.event):
        driver.destroy_event(device, slab.event)
        slab.event = 0
        slab.memory = None
    return not slab.event


def tidy() -> None:
    """Give slabs back that connections left behind, as far as no copy needs them any more."""
    for _ in range(len(_left)):
        driver, device, slab = _left.popleft()
        try:
            if not _over(driver, device, slab):
                _left.append((driver, device, slab))
                continue
            slab.view.release()
            if slab.pinned:
                driver.free_host(device, slab.address)
        except CudaError:
            pass  # a device that is broken: its memory goes with the process
