"""torch on an accelerator: CUDA, and by the same interface XPU, NPU, MLU, MUSA and HPU.

Run on CUDA only (``tests/gpu``); elsewhere its tests use the host's processors in place of one.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from gpuremote._types import Shape
from gpuremote.backend.base import Backend, Compiled, DeviceInfo
from gpuremote.backend.torch_calls import Block, Permits, compile_call, translate
from gpuremote.backend.torch_inductor import compile_graph, compiler, remove_cache
from gpuremote.errors import GpuRemoteError, UnsupportedOp
from gpuremote.memory.device import DeviceTarget
from gpuremote.ops.operands import DType
from gpuremote.ops.plan import Plan
from gpuremote.ops.torch_call import Call
from gpuremote.ops.torch_graph import Graph

__all__ = ["AcceleratorTorchBackend", "accelerator"]

_BYTE = np.dtype(np.uint8)


class AcceleratorTorchBackend(Backend):
    """Runs torch's own ops on storages. The ops of NumPy-like arrays need another backend.

    Parameters
    ----------
    devices : int
        How many of the visible devices to offer; 0 means all.
    kind : str, optional
        What torch calls them; by default the accelerator that it has found.
    """

    name = "torch"

    def __init__(self, devices: int = 0, *, kind: str = "") -> None:
        super().__init__(devices)
        self._kind = kind or accelerator() or "cpu"
        self._module: Any = torch.get_device_module(self._kind)
        visible = int(self._module.device_count())
        count = min(self._wanted, visible) if self._wanted else visible
        self._devices = [self._describe(index) for index in range(count)]
        self._permits = Permits()
        # Staging that the device may still be reading, each with the event behind the copy.
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()
        self._lock = threading.Lock()

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        kind = accelerator()
        if not kind:
            return False, f"torch {torch.__version__} finds no accelerator"
        count = torch.accelerator.device_count()
        return True, f"torch {torch.__version__}, {count} devices of kind {kind}"

    def _describe(self, index: int) -> DeviceInfo:
        module = self._module
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else self._kind
        memory = module.mem_get_info(index)[1] if hasattr(module, "mem_get_info") else 0
        return DeviceInfo(index, self._kind, str(name), int(memory))

    def devices(self) -> list[DeviceInfo]:
        return self._devices

    def facts(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "device_type": self._kind,
            "inductor": compiler(torch.device(self._kind)),
        }

    def _device(self, index: int) -> torch.device:
        return torch.device(self._kind, index)

    # -- running --------------------------------------------------------------------------------

    def compile(self, plan: Plan) -> Compiled:
        raise UnsupportedOp(
            f"the backend torch runs torch's ops on {self._kind}; for arrays start a server with "
            "--backend cupy",
            op=plan.spec.name,
        )

    def permit(self, namespaces: Mapping[str, str], weights: str, kernels: bool) -> None:
        super().permit({}, "", kernels)
        self._permits = Permits(namespaces, weights)

    def compile_call(
        self, call: Call
    ) -> tuple[Callable[[Sequence[Any]], list[Block]], tuple[int, ...]]:
        return compile_call(call, self._device(call.device), self._permits)

    def end(self) -> None:
        remove_cache()

    def compile_graph(
        self, graph: Graph, calls: Sequence[Call]
    ) -> Callable[[list[Any]], list[Any]]:
        devices = {call.device for call in calls}
        if len(devices) > 1:
            raise UnsupportedOp("its ops are on several devices")
        return compile_graph(graph, calls, self._device(*devices), self._permits)

    def translate_error(self, error: BaseException) -> GpuRemoteError:
        return translate(error) or super().translate_error(error)

    # -- memory: every array is a storage -------------------------------------------------------

    def empty(self, shape: Shape, dtype: DType, device: int) -> Block:
        nbytes = math.prod(shape) * dtype.itemsize
        return Block(torch.empty(nbytes, dtype=torch.uint8, device=self._device(device)), nbytes)

    def copy_to_device(self, array: Any, device: int) -> Block:
        copied = array.flat().to(self._device(device), copy=True)
        return Block(copied, array.nbytes)

    def _staging(self, nbytes: int) -> torch.Tensor:
        """Page-locked host memory, so that the device copies from it directly."""
        with self._lock:
            while self._in_flight and self._in_flight[0][0].query():
                self._in_flight.popleft()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._kind != "cpu" and nbytes > 0)

    def receive_view(self, array: Any) -> memoryview:
        view: memoryview = self._staging(array.nbytes).numpy().data
        return view

    def received(self, array: Any, target: memoryview | DeviceTarget) -> None:
        assert isinstance(target, memoryview)  # receive_target gives no other
        if target.nbytes:
            staged = torch.from_numpy(np.frombuffer(target, np.uint8))
            array.flat().copy_(staged, non_blocking=True)
            event = self._module.Event()
            event.record(self._module.current_stream(array.tensor.device))
            with self._lock:
                self._in_flight.append((event, staged))

    def send_view(self, array: Any) -> tuple[memoryview, bool]:
        staged = self._staging(array.nbytes)
        if array.nbytes:
            flat = array.flat()
            if flat.device.type == self._kind:
                staged.copy_(flat, non_blocking=True)
                self._module.current_stream(flat.device).synchronize()
            else:
                # On the host: a generator's state, what attention says of its random numbers.
                staged.copy_(flat)
        view: memoryview = staged.numpy().data
        return view, True

    def meta(self, array: Any) -> tuple[Shape, DType]:
        return (array.nbytes,), _BYTE

    def describe(self, array: Any) -> tuple[Shape, str]:
        return array.shape, str(array.tensor.dtype)[6:]

    def storage_of(self, array: Any) -> Any:
        return array.tensor.untyped_storage()

    # -- streams and events: a stream is (device, torch's stream) -------------------------------

    def create_stream(self, device: int) -> Any:
        return device, self._module.Stream(device=self._device(device))

    def activate(self, stream: Any) -> AbstractContextManager[Any]:
        return self._active(stream)

    @contextlib.contextmanager
    def _active(self, stream: Any) -> Iterator[None]:
        # Gradients are the client's business.
        with torch.no_grad():
            if stream is None:
                yield
                return
            with self._module.device(stream[0]), self._module.stream(stream[1]):
                yield

    def _streams(self, stream: Any) -> list[Any]:
        """The device's streams that a stream of ours stands for."""
        if stream is not None:
            return [stream[1]]
        return [self._module.default_stream(self._device(d.index)) for d in self._devices]

    def record(self, stream: Any) -> Any:
        events = []
        for native in self._streams(stream):
            event = self._module.Event(enable_timing=True)
            event.record(native)
            events.append(event)
        return events

    def wait(self, stream: Any, event: Any) -> None:
        for native in self._streams(stream):
            for part in event:
                native.wait_event(part)

    def reached(self, event: Any) -> bool:
        return all(part.query() for part in event)

    def idle(self, stream: Any) -> bool:
        return all(native.query() for native in self._streams(stream))

    def synchronize_event(self, event: Any) -> None:
        for part in event:
            part.synchronize()

    def elapsed(self, start: Any, end: Any) -> float | None:
        if not self.reached(start) or not self.reached(end):
            return None
        return float(start[0].elapsed_time(end[0]))

    def synchronize(self, stream: Any) -> None:
        for native in self._streams(stream):
            native.synchronize()


def accelerator() -> str:
    """What torch calls the accelerator of this machine; "" if there is none.

    One that is somewhere else (``gpuremote.torch`` in the same process) does not count.
    """
    if not torch.accelerator.is_available():
        return ""
    device = torch.accelerator.current_accelerator()
    return "" if device is None or device.type == "remote" else device.type
