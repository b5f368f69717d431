"""torch on the host's processors, beside NumPy's ops in the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from gpuremote._types import Shape
from gpuremote.backend.base import Compiled
from gpuremote.backend.numpy_backend import ROOM, NumpyBackend, limit_data
from gpuremote.backend.torch_calls import Block, Permits, compile_call, translate
from gpuremote.backend.torch_inductor import compile_graph, compiler, remove_cache
from gpuremote.errors import GpuRemoteError, ShapeError
from gpuremote.memory.device import DeviceTarget
from gpuremote.ops.operands import DType
from gpuremote.ops.plan import Plan
from gpuremote.ops.torch_call import Call
from gpuremote.ops.torch_graph import Graph

__all__ = ["HostTorchBackend"]


class HostTorchBackend(NumpyBackend):
    """Runs torch's own ops on storages, and NumPy's on arrays, in the same memory.

    Parameters
    ----------
    devices : int
        Number of logical devices; 0 means 1.
    """

    name = "torch"

    def __init__(self, devices: int = 0) -> None:
        super().__init__(devices)
        self._device = torch.device("cpu")
        self._permits = Permits()

    @classmethod
    def probe(cls) -> tuple[bool, str]:
        return True, f"torch {torch.__version__} on cpu"

    def facts(self) -> dict[str, Any]:
        """What a client has to know to predict results."""
        device = self._device
        return {
            "torch": torch.__version__,
            "device_type": device.type,
            "inductor": compiler(device),
        }

    def confine(self, nbytes: int) -> None:
        """What a definition says of an op's memory is compared with what it made, and that is after
        the fact. So the kernel sees to it that this process stays within bounds: beyond what the
        session may hold there is room for what ops need while they run."""
        limit_data(nbytes + max(ROOM, nbytes // 2))

    def permit(self, namespaces: Mapping[str, str], weights: str, kernels: bool) -> None:
        super().permit({}, "", kernels)
        self._permits = Permits(namespaces, weights)

    def compile_call(
        self, call: Call
    ) -> tuple[Callable[[Sequence[Any]], list[Block]], tuple[int, ...]]:
        return compile_call(call, self._device, self._permits)

    def end(self) -> None:
        remove_cache()

    def compile_graph(
        self, graph: Graph, calls: Sequence[Call]
    ) -> Callable[[list[Any]], list[Any]]:
        return compile_graph(graph, calls, self._device, self._permits)

    def block(self, array: Any) -> Block:
        if array.__class__ is Block:
            return array
        if not array.flags.c_contiguous:
            raise ShapeError(
                "a tensor has to share the memory of its array, and this one is not contiguous "
                "there: make the tensor of array.copy()"
            )
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return Block(torch.from_numpy(flat), flat.nbytes, array=array)

    def adopt(self, view: memoryview, shape: Shape, dtype: DType) -> None:
        """Never: torch's ops look at an operand more than once, and rely on what they saw first."""
        return

    def compile(self, plan: Plan) -> Compiled:
        run = super().compile(plan)
        return lambda arguments: run([_array(argument) for argument in arguments])

    def translate_error(self, error: BaseException) -> GpuRemoteError:
        return translate(error) or super().translate_error(error)

    def copy_to_device(self, array: Any, device: int) -> Any:
        return super().copy_to_device(_array(array), device)

    def send_view(self, array: Any) -> tuple[memoryview, bool]:
        return super().send_view(_array(array))

    def small_bytes(self, array: Any) -> bytes:
        return super().small_bytes(_array(array))

    def meta(self, array: Any) -> tuple[Shape, DType]:
        return super().meta(_array(array))

    def describe(self, array: Any) -> tuple[Shape, str]:
        if isinstance(array, Block):
            return array.shape, str(array.tensor.dtype)[6:]
        return super().describe(array)

    def storage_of(self, array: Any) -> Any:
        root = super().storage_of(_array(array))
        # A storage may have several tensors, and arrays of each; torch has one object for it.
        return root.untyped_storage() if isinstance(root, torch.Tensor) else root

    def received(self, array: Any, target: memoryview | DeviceTarget) -> None:
        super().received(_array(array), target)

    def activate(self, stream: Any) -> AbstractContextManager[Any]:
        return self._activated()

    @contextlib.contextmanager
    def _activated(self) -> Iterator[None]:
        # Gradients are the client's business.
        with torch.no_grad(), np.errstate(all="ignore"):
            yield


def _array(value: Any) -> Any:
    """A storage as the array that it was, or of its bytes."""
    return value.as_array() if isinstance(value, Block) else value
