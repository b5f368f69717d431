"""CuPy on CUDA devices (and on ROCm ones, with a CuPy that was built for them)."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.backend.array_namespace import ArrayNamespaceBackend
from gpuremote.backend.base import Compiled, DeviceInfo
from gpuremote.backend.cupy_kernels import CLIENT_KERNELS
from gpuremote.backend.cupy_order import Order
from gpuremote.errors import InvalidBuffer
from gpuremote.memory.cuda import CudaDriver, CudaError, cuda_driver
from gpuremote.memory.device import DeviceMemory, DeviceTarget
from gpuremote.ops.operands import DType
from gpuremote.ops.plan import Plan

__all__ = ["CupyBackend"]


class CupyBackend(ArrayNamespaceBackend):
    """CUDA devices through CuPy.

    Parameters
    ----------
    devices : int
        How many of the visible devices to offer; 0 means all.
    cupy : module, optional
        Stands in for CuPy (tests).
    driver : CudaDriver, optional
        Stands in for the CUDA driver, beside such a CuPy.

    Notes
    -----
    Values of index arrays are not checked on the device: as in CuPy, an index out of bounds
    wraps around. Singular matrices give inf and nan, as in CuPy, not an error.
    """

    name = "cupy"

    def __init__(
        self, devices: int = 0, *, cupy: Any = None, driver: CudaDriver | None = None
    ) -> None:
        super().__init__(importlib.import_module("cupy") if cupy is None else cupy, devices)
        cuda = self._cuda = self.xp.cuda
        visible = int(cuda.runtime.getDeviceCount())
        count = min(self._wanted, visible) if self._wanted else visible
        self._devices = [self._describe(i) for i in range(count)]
        # Staging that the device may still be reading, each with the event behind the copy.
        self._in_flight: deque[tuple[Any, memoryview]] = deque()
        self._lock = threading.Lock()
        self._order = Order(cuda)
        self._driver = _driver_beside_cupy() if cupy is None else driver

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        try:
            cupy = importlib.import_module("cupy")
        except Exception as error:  # A broken installation raises whatever it likes.
            return False, f"CuPy can't be imported: {error}"
        try:
            count = int(cupy.cuda.runtime.getDeviceCount())
        except Exception as error:  # CUDARuntimeError has no stable base class.
            return False, f"CuPy {cupy.__version__} finds no CUDA driver: {error}"
        if not count:
            return False, f"CuPy {cupy.__version__} finds no CUDA device"
        return True, f"CuPy {cupy.__version__}, {count} devices"

    def _describe(self, index: int) -> DeviceInfo:
        properties = self._cuda.runtime.getDeviceProperties(index)
        name = properties["name"]
        return DeviceInfo(
            index,
            "cuda",
            name.decode() if isinstance(name, bytes) else str(name),
            int(properties["totalGlobalMem"]),
        )

    def permit(self, namespaces: Mapping[str, str], weights: str, kernels: bool) -> None:
        super().permit(namespaces, weights, False)
        if kernels:
            self.makers = {**self.makers, **CLIENT_KERNELS}

    def devices(self) -> list[DeviceInfo]:
        return self._devices

    def compile(self, plan: Plan) -> Compiled:
        function = super().compile(plan)
        order = self._order

        def run(arguments: Sequence[Any]) -> Sequence[Any] | None:
            if order.active:
                found: Sequence[Any] | None = order.run(function, arguments)
                return found
            return function(arguments)

        if len(self._devices) == 1:
            return run
        device = self._cuda.Device(plan.device)

        def on_device(arguments: Sequence[Any]) -> Sequence[Any] | None:
            with device:
                return run(arguments)

        return on_device

    def empty(self, shape: Shape, dtype: DType, device: int) -> Any:
        with self._cuda.Device(device):
            array = self.xp.empty(shape, dtype)
            if self._order.active:
                self._order.leave(self._cuda.get_current_stream(), (), (array,))
            return array

    def copy_to_device(self, array: Any, device: int) -> Any:
        with self._cuda.Device(device):
            # Across devices CuPy orders the copy behind the source's stream and ours.
            made = self._order.run(lambda given: [self.xp.array(given[0])], [array])
            return made[0]

    def _staging(self, nbytes: int) -> memoryview:
        """Page-locked host memory, so that the device copies from it directly."""
        self._reap()
        if not nbytes:
            return memoryview(bytearray())
        memory = self._cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes).data

    def _reap(self) -> None:
        with self._lock:
            while self._in_flight and self._in_flight[0][0].done:
                self._in_flight.popleft()

    def receive_view(self, array: Any) -> memoryview:
        if not array.flags.c_contiguous:
            raise InvalidBuffer("bytes can be received into C-contiguous arrays only")
        return self._staging(array.nbytes)

    def receive_target(self, array: Any) -> memoryview | DeviceTarget:
        if self._driver is None or not array.nbytes:
            return self.receive_view(array)
        if not array.flags.c_contiguous:
            raise InvalidBuffer("bytes can be received into C-contiguous arrays only")
        with array.device:
            stream = self._cuda.get_current_stream()
            # The pool gives memory out again while kernels that were queued before still use it.
            before = stream.record()
        return DeviceTarget(self._memory(array, stream), self._staging, lambda: bool(before.done))

    def _memory(self, array: Any, stream: Any) -> DeviceMemory:
        assert self._driver is not None
        return DeviceMemory(
            self._driver,
            int(array.data.ptr),
            array.nbytes,
            array.device.id,
            array,
            int(stream.ptr),
        )

    def received(self, array: Any, target: memoryview | DeviceTarget) -> None:
        if isinstance(target, DeviceTarget):
            # The rest has been written to the array, or in the order of its stream.
            for offset, view in target.staged:
                self._upload(array, offset, view)
        elif target.nbytes:
            self._upload(array, 0, target)

    def _upload(self, array: Any, offset: int, view: memoryview) -> None:
        with array.device:
            stream = self._cuda.get_current_stream()
            if view.nbytes == array.nbytes:
                array.set(np.frombuffer(view, array.dtype).reshape(array.shape), stream=stream)
            else:
                part = array.reshape(-1).view(np.uint8)[offset : offset + view.nbytes]
                part.set(np.frombuffer(view, np.uint8), stream=stream)
            event = stream.record()
            self._order.leave(stream, (array,), ())
        with self._lock:
            self._in_flight.append((event, view))

    def send_view(self, array: Any) -> tuple[memoryview, bool]:
        view = self._staging(array.nbytes)
        if view.nbytes:
            with array.device:
                stream = self._cuda.get_current_stream()
                self._order.enter(stream, (array,))
                out = np.frombuffer(view, array.dtype).reshape(array.shape)
                # Which gives an array without axes one.
                flat = self.xp.ascontiguousarray(array).reshape(array.shape)
                flat.get(stream=stream, out=out)
                stream.synchronize()
        return view, True

    def send_source(self, array: Any) -> tuple[memoryview | DeviceMemory, bool]:
        if self._driver is None or not array.nbytes:
            return self.send_view(array)
        with array.device:
            stream = self._cuda.get_current_stream()
            self._order.enter(stream, (array,))
            private = not array.flags.c_contiguous
            flat = self.xp.ascontiguousarray(array) if private else array
            # A card does not wait for streams.
            stream.synchronize()
        return self._memory(flat, stream), private

    def storage_of(self, array: Any) -> Any:
        return array.data.mem

    # -- streams and events: a stream is (device, CuPy's stream) --------------------------------

    def create_stream(self, device: int) -> Any:
        with self._cuda.Device(device):
            stream = self._cuda.Stream(non_blocking=True)
            self._order.begin(stream)
            return device, stream

    def activate(self, stream: Any) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if stream is None else self._active(*stream)

    @contextlib.contextmanager
    def _active(self, device: int, stream: Any) -> Iterator[None]:
        with self._cuda.Device(device), stream:
            yield

    def _streams(self, stream: Any) -> list[tuple[int, Any]]:
        """The CUDA streams that a stream of ours stands for."""
        if stream is not None:
            return [stream]
        return [(info.index, self._cuda.Stream.null) for info in self._devices]

    def record(self, stream: Any) -> Any:
        events = []
        for device, native in self._streams(stream):
            with self._cuda.Device(device):
                events.append(native.record(self._cuda.Event()))
        return events

    def wait(self, stream: Any, event: Any) -> None:
        for device, native in self._streams(stream):
            with self._cuda.Device(device):
                for part in event:
                    native.wait_event(part)

    def reached(self, event: Any) -> bool:
        return all(part.done for part in event)

    def idle(self, stream: Any) -> bool:
        return all(native.done for _, native in self._streams(stream))

    def synchronize_event(self, event: Any) -> None:
        for part in event:
            part.synchronize()

    def elapsed(self, start: Any, end: Any) -> float | None:
        if not self.reached(start) or not self.reached(end):
            return None
        try:
            return float(self._cuda.get_elapsed_time(start[0], end[0]))
        except Exception:  # Events of different devices have no common clock.
            return None

    def synchronize(self, stream: Any) -> None:
        for device, native in self._streams(stream):
            with self._cuda.Device(device):
                native.synchronize()


def _driver_beside_cupy() -> CudaDriver | None:
    """The driver that CuPy works on; None where that is not CUDA's (ROCm), and arrays are staged
    by CuPy alone."""
    try:
        return cuda_driver()
    except CudaError:
        return None
