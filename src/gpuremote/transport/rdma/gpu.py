"""How a card gets at a GPU's memory. Private.

By itself, if it can be registered: as a dma-buf, or by its address, which the module
nvidia-peermem makes possible. Otherwise through page-locked memory of the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from gpuremote.memory.cuda import Allocation, CudaError
from gpuremote.memory.device import DeviceMemory
from gpuremote.memory.staging import SLAB, Staging
from gpuremote.transport.verbs.base import Access, Device, Memory, VerbsError
from gpuremote.transport.verbs.explain import explain_errno

__all__ = ["DMA_BUF", "PEERMEM", "STAGING", "Direct", "Stages"]

DMA_BUF: Final = "dma-buf"
PEERMEM: Final = "nvidia-peermem"
STAGING: Final = "page-locked staging"
KNOWN: Final = 256
"""Allocations of which it is known that they can't be registered."""
_PAGE: Final = 4096
_FOR_GOOD: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPROTONOSUPPORT)


class _Refused(Exception):
    """A way does not work, for the reason that the text says."""

    def __init__(self, why: str, *, for_good: bool = False) -> None:
        super().__init__(why)
        self.for_good = for_good


class Direct:
    """Registers memory of GPUs with one card, in the best way that works.

    Parameters
    ----------
    device : Device

    Attributes
    ----------
    used : str
        The way that was taken last; empty before the first.
    reasons : dict of str to str
        Ways that did not work, and why: of the last memory that was asked for.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.used = ""
        self.reasons: dict[str, str] = {}
        self._never: dict[tuple[int, str], str] = {}
        self._refused: OrderedDict[tuple[int, int], dict[str, str]] = OrderedDict()

    def describe(self) -> str:
        """For ``explain()``."""
        if not self.used:
            return "no GPU memory was moved yet"
        why = "; ".join(f"{way}: {reason}" for way, reason in self.reasons.items())
        return f"{self.used} ({why})" if why else self.used

    def refuse(self, why: str) -> None:
        """It is no memory that anything is known of."""
        self.used, self.reasons = STAGING, {DMA_BUF: why, PEERMEM: why}

    def register(
        self, memory: DeviceMemory, allocation: Allocation, begin: int, size: int, access: Access
    ) -> tuple[Memory, int] | None:
        """Register device memory that begins at ``begin``.

        Returns
        -------
        (Memory, int) or None
            And the address by which the card calls its first byte. None where it has to be staged.
        """
        known = (allocation.ident, int(access))
        if (reasons := self._refused.get(known)) is not None:
            self.used, self.reasons = STAGING, reasons
            return None
        reasons = {}
        ways: tuple[tuple[str, Callable[..., tuple[Memory, int]]], ...] = (
            (DMA_BUF, self._by_dmabuf),
            (PEERMEM, self._by_address),
        )
        for way, register in ways:
            never = (memory.device, way)
            try:
                if never in self._never:
                    raise _Refused(self._never[never])
                _check(memory, allocation, begin, size, access)
                found = register(memory, begin, size, access)
            except _Refused as refusal:
                reasons[way] = str(refusal)
                if refusal.for_good:
                    self._never[never] = str(refusal)
            except CudaError as error:
                reasons[way] = str(error)
            except VerbsError as error:
                reasons[way] = explain_errno(error)
                if error.errno in _FOR_GOOD:
                    self._never[never] = reasons[way]
            else:
                self.used, self.reasons = way, reasons
                return found
        self._refused[known] = reasons
        while len(self._refused) > KNOWN:
            self._refused.popitem(last=False)
        self.used, self.reasons = STAGING, reasons
        return None

    def _by_dmabuf(
        self, memory: DeviceMemory, begin: int, size: int, access: Access
    ) -> tuple[Memory, int]:
        driver = memory.driver
        if not driver.exports_dmabuf(memory.device):
            raise _Refused("the driver exports none (the open kernel modules do)", for_good=True)
        _synchronous(memory)
        start = begin - begin % _PAGE
        whole = -(-(begin + size - start) // _PAGE) * _PAGE
        descriptor = driver.export_dmabuf(memory.device, start, whole)
        try:
            return self._device.register_dmabuf(descriptor, begin - start, size, begin, access)
        finally:
            os.close(descriptor)  # what is registered keeps the memory

    def _by_address(
        self, memory: DeviceMemory, begin: int, size: int, access: Access
    ) -> tuple[Memory, int]:
        _synchronous(memory)
        return self._device.register(begin, size, access), begin


def _synchronous(memory: DeviceMemory) -> None:
    # For copies that others make; what is lent here waits for its stream anyway, so memory that
    # does not take it is no worse.
    with contextlib.suppress(CudaError):
        memory.driver.synchronous_copies(memory.device, memory.pointer)


def _check(
    memory: DeviceMemory, allocation: Allocation, begin: int, size: int, access: Access
) -> None:
    """Refuse what no card may touch."""
    if allocation.pooled:
        raise _Refused("memory of cudaMallocAsync can't be reached by a card")
    if begin < allocation.base or begin + size > allocation.base + allocation.size:
        raise _Refused("the array lies in several allocations")
    driver, device = memory.driver, memory.device
    writes = access & Access.WRITE_THERE
    if writes and not driver.orders_writes(device) and not driver.flushes_writes(device):
        raise _Refused("the device can't be told to take in what a card has written")


class Stages:
    """The staging of one direction of a connection: slabs for each GPU that it is used with.

    Parameters
    ----------
    size : int
        Bytes of a slab.
    """

    def __init__(self, size: int = SLAB) -> None:
        self.size = size
        self._stagings: dict[int, Staging] = {}

    def of(self, memory: DeviceMemory) -> Staging:
        found = self._stagings.get(memory.device)
        if found is None:
            found = Staging(memory.driver, memory.device, self.size)
            self._stagings[memory.device] = found
        return found

    @property
    def copying(self) -> bool:
        """Whether a copy is under way, the end of which nothing but a look tells of."""
        return any(staging.copying for staging in self._stagings.values())

    def close(self) -> None:
        """After the cards were told to leave the slabs alone."""
        while self._stagings:
            _, staging = self._stagings.popitem()
            with contextlib.suppress(CudaError):
                staging.close()
