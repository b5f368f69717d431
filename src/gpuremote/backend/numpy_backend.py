"""NumPy on the host's processors: the embedded default."""

from __future__ import annotations

import math
import os
import platform
import resource
import time
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.backend.array_namespace import ArrayNamespaceBackend
from gpuremote.backend.base import Compiled, DeviceInfo
from gpuremote.backend.blocks import BlockPool
from gpuremote.backend.fused import Blocked, Chain, Fused, Piece, Scratch
from gpuremote.errors import InvalidBuffer
from gpuremote.memory.device import DeviceTarget
from gpuremote.memory.host import host_memory
from gpuremote.ops.counting import SCATTERED
from gpuremote.ops.operands import DType
from gpuremote.ops.plan import Plan

__all__ = ["ROOM", "NumpyBackend", "limit_data"]

ROOM: Final = 1 << 30
"""Bytes at least that ops may take while they run."""

_PER_CORE: Final = 48 << 20
"""What a library that multiplies matrices takes for each of its threads: a buffer, and a stack."""

# Ops that look at an operand, and then rely on what they saw: where an index leads, how much room
# the result needs, where an order ends. Memory that another process can write to must not change
# in between, so they get a copy. The number is that of the first such operand.
_READ_TWICE: Final = {
    "getitem_advanced": 1,
    "getitem_mask": 1,
    "setitem": 1,
    "take": 1,
    "take_along_axis": 1,
    "nonzero": 0,
    "unique_values": 0,
    "sort": 0,
    "argsort": 0,
    "argpartition": 0,
    "argwhere": 0,
    "bincount": 0,
    "choose": 0,
    "compress": 0,
    "extract": 0,
    "flatnonzero": 0,
    "histogram": 0,
    "histogramdd": 0,
    "interp": 0,
    "intersect1d": 0,
    "isin": 0,
    "lexsort": 0,
    "partition": 0,
    "place_": 1,
    "put_": 1,
    "put_along_axis_": 1,
    "putmask_": 1,
    "searchsorted": 0,
    "setdiff1d": 0,
    "setxor1d": 0,
    "trim_zeros": 0,
    "union1d": 0,
    "unique": 0,
    **{f"{name}.at_": 1 for name in SCATTERED},
}


def _private(operand: Any) -> Any:
    """The operand, or a copy if it lies in adopted memory."""
    base = operand
    while isinstance(base, np.ndarray):
        base = base.base
    return operand.copy() if isinstance(base, memoryview) else operand


class NumpyBackend(ArrayNamespaceBackend):
    """Any number of logical devices, all of them the host's processors and memory.

    Ops run in the thread that calls them, so a stream is done with everything it was given as
    soon as it is given the next thing, and an event is passed when it is recorded.

    Parameters
    ----------
    devices : int
        Number of logical devices; 0 means 1.
    """

    name = "numpy"
    exports_memory = True
    exact = True

    def __init__(self, devices: int = 0) -> None:
        super().__init__(np, devices or 1)
        self._blocks = BlockPool()
        self._scratch = Scratch()
        self._devices = [
            DeviceInfo(i, "cpu", platform.machine() or "cpu", host_memory())
            for i in range(self._wanted)
        ]

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        return True, f"NumPy {np.__version__}"

    def devices(self) -> list[DeviceInfo]:
        return self._devices

    def empty(self, shape: Shape, dtype: DType, device: int) -> npt.NDArray[Any]:
        return self._blocks.empty(shape, dtype, math.prod(shape) * dtype.itemsize)

    def copy_to_device(self, array: Any, device: int) -> Any:
        return array.copy()

    def receive_view(self, array: Any) -> memoryview:
        flags = array.flags
        if not (flags.c_contiguous and flags.writeable):
            raise InvalidBuffer("bytes can be received into writable C-contiguous arrays only")
        if not array.nbytes:
            return memoryview(bytearray())
        view: memoryview = array.data.cast("B")
        return view

    def received(self, array: Any, target: memoryview | DeviceTarget) -> None:
        """The bytes are in the array already."""

    def adopt(self, view: memoryview, shape: Shape, dtype: DType) -> npt.NDArray[Any] | None:
        array = np.frombuffer(view, dtype).reshape(shape) if view.nbytes else None
        return array if array is not None and array.flags.aligned else None

    def compile(self, plan: Plan) -> Compiled:
        run = super().compile(plan)
        first = _READ_TWICE.get(plan.spec.name)
        if first is None:
            return run
        return lambda arguments: run(
            [*arguments[:first], *(_private(argument) for argument in arguments[first:])]
        )

    def confine(self, nbytes: int) -> None:
        """What ops take while they run is counted by rules of ours on how NumPy goes about it.
        Should one be wrong, the kernel stops this process before the machine is out of memory."""
        # Operands and results several times over, and blocks that are kept for the next op.
        limit_data(nbytes + max(ROOM, 6 * nbytes))

    def piece(self, plan: Plan) -> Piece | None:
        return Piece.of(plan)

    def fuse(self, chain: Chain) -> Fused | None:
        try:
            return Blocked(chain, self._scratch)
        except LookupError:
            return None

    def send_view(self, array: Any) -> tuple[memoryview, bool]:
        private = not array.flags.c_contiguous
        flat = np.ascontiguousarray(array).reshape(-1)
        return flat.view(np.uint8).data, private

    def small_bytes(self, array: Any) -> bytes:
        data: bytes = array.tobytes()
        return data

    def storage_of(self, array: Any) -> Any:
        base = array.base
        while isinstance(base, np.ndarray):
            array, base = base, base.base
        return array if base is None else base

    def create_stream(self, device: int) -> Any:
        return None

    def activate(self, stream: Any) -> AbstractContextManager[Any]:
        # Results say inf and nan, as on a GPU; warnings in the server's log help nobody.
        return np.errstate(all="ignore")

    def record(self, stream: Any) -> int:
        return time.perf_counter_ns()

    def wait(self, stream: Any, event: Any) -> None:
        """Passed already."""

    def reached(self, event: Any) -> bool:
        return True

    def synchronize_event(self, event: Any) -> None:
        """Passed already."""

    def elapsed(self, start: Any, end: Any) -> float | None:
        return float(end - start) / 1e6

    def synchronize(self, stream: Any) -> None:
        """Done already."""


def limit_data(nbytes: int) -> None:
    """Let this process have ``nbytes`` of memory of its own beyond what it has. What it shares with
    others does not count."""
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + nbytes + _PER_CORE * (os.cpu_count() or 1)
    if wanted < (1 << 62) and (most == resource.RLIM_INFINITY or wanted < most):
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
