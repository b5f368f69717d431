"""What every backend offers to the server."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from gpuremote._types import Shape
from gpuremote.backend.fused import Chain, Fused
from gpuremote.errors import (
    ConfigError,
    GpuRemoteError,
    IndexOutOfBounds,
    OpFailed,
    OutOfDeviceMemory,
    UnsupportedOp,
)
from gpuremote.memory.device import DeviceMemory, DeviceTarget
from gpuremote.ops.operands import DType
from gpuremote.ops.plan import Plan
from gpuremote.ops.torch_call import Call
from gpuremote.ops.torch_graph import Graph

__all__ = ["Backend", "Compiled", "DeviceInfo"]

Compiled: TypeAlias = Callable[[Sequence[Any]], Sequence[Any] | None]
"""Runs a plan: takes arrays and scalars in operand order, gives the results (in place: None)."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device of a backend.

    Attributes
    ----------
    index : int
        Its number within the backend.
    kind : str
        ``"cpu"``, ``"cuda"``, or what torch calls another accelerator.
    name : str
        For people, such as ``"NVIDIA H100"``.
    memory_bytes : int
        Memory that it has in all; 0 where that can't be found out.
    """

    index: int
    kind: str
    name: str
    memory_bytes: int


class Backend(abc.ABC):
    """Runs plans on the devices of one kind.

    Not bound to a thread: each thread works on the stream that it has activated, and on the
    default stream otherwise. Streams and events are the backend's own objects, opaque to the
    caller; the stream None is the default stream (of every device).

    Arrays are the backend's own too. What is known of any of them: ``shape`` and ``dtype``, a
    NumPy one.

    Parameters
    ----------
    devices : int
        How many devices to offer; 0 leaves it to the backend.
    """

    name: str
    exports_memory = False
    """Whether arrays have the buffer protocol, with every op issued for them done."""

    def __init__(self, devices: int = 0) -> None:
        self._wanted = devices

    def permit(self, namespaces: Mapping[str, str], weights: str, kernels: bool) -> None:
        """What the operator allows beside the catalogue: ops of other namespaces, each with the
        module that makes them, files of weights in a folder, and kernels that programs bring.

        Raises
        ------
        ConfigError
            This backend has none of these, or there is no such module.
        """
        if namespaces or weights:
            raise ConfigError(
                f"--allow-ops and --weights are for the backend torch, not {self.name}"
            )
        if kernels:
            raise ConfigError(f"--allow-kernels is for the backend cupy, not {self.name}")

    # -- what there is --------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def probe(cls) -> tuple[bool, str]:
        """Whether it works on this machine, and what was found or what is missing."""

    @abc.abstractmethod
    def devices(self) -> list[DeviceInfo]:
        """The devices it offers; their numbers are 0, 1, ..."""

    # -- running --------------------------------------------------------------------------------

    @abc.abstractmethod
    def compile(self, plan: Plan) -> Compiled:
        """A function that runs the plan, as thin as it can be.

        Its results are arrays, never bare scalars, of exactly the shapes and dtypes that the
        plan says (where it says them), on the plan's device.

        Raises
        ------
        UnsupportedOp
            The backend lacks the op.
        """

    def piece(self, plan: Plan) -> Any:
        """What :meth:`fuse` takes for calls of this plan; None: they can't be part of a chain."""
        return None

    def fuse(self, chain: Chain) -> Fused | None:
        """A function that runs a chain of elementwise ops as one, with the same bits as result;
        None: it can't be done."""
        return None

    def compile_call(self, call: Call) -> tuple[Callable[[Sequence[Any]], Any], tuple[int, ...]]:
        """A function that runs a call of a torch op, and which operands it writes to.

        It takes storages (see :meth:`block`) and numbers in operand order, and gives the storages
        that the op makes.

        Raises
        ------
        UnsupportedOp
            This op does not run here, or none of torch's does.
        """
        raise UnsupportedOp(
            f"this server runs the backend {self.name}; torch needs a server that was started with "
            "--backend torch",
            op=call.name,
        )

    def compile_graph(
        self, graph: Graph, calls: Sequence[Call]
    ) -> Callable[[list[Any]], list[Any]]:
        """One function for a graph of calls of torch ops, of which ``calls`` are the definitions.

        It takes the storages of the graph's inputs, writes to those that the graph writes to, and
        gives the storages of its outputs.

        Raises
        ------
        UnsupportedOp
            The graph has to run op by op here; the message says why.
        """
        raise UnsupportedOp(f"the backend {self.name} compiles no graphs")

    def facts(self) -> dict[str, Any]:
        """What else a client has to know of every device to predict results."""
        return {}

    def end(self) -> None:
        """The process ends: delete what it has put on disk."""
        return

    def confine(self, nbytes: int) -> None:
        """This process serves a session that may hold ``nbytes``; see to it, as far as the backend
        can't count everything before it is allocated."""
        return

    def block(self, array: Any) -> Any:
        """An array as a storage that torch calls name."""
        return array

    def translate_error(self, error: BaseException) -> GpuRemoteError:
        """The library's error for whatever came out of a compiled plan or another call here."""
        if isinstance(error, GpuRemoteError):
            return error
        text = str(error) or type(error).__name__
        if isinstance(error, MemoryError):
            return OutOfDeviceMemory(f"the device is out of memory: {text}")
        if isinstance(error, IndexError):
            return IndexOutOfBounds(text)
        return OpFailed(f"{type(error).__name__}: {text}")

    # -- memory ---------------------------------------------------------------------------------

    @abc.abstractmethod
    def empty(self, shape: Shape, dtype: DType, device: int) -> Any:
        """An array whose values are yet to come; C-contiguous.

        Raises
        ------
        MemoryError
            It does not fit (a subclass of the backend's own may be raised).
        """

    @abc.abstractmethod
    def copy_to_device(self, array: Any, device: int) -> Any:
        """A copy on a device of this backend (the same one too), ordered like an op."""

    @abc.abstractmethod
    def receive_view(self, array: Any) -> memoryview:
        """Writable flat host bytes for the values of an array from :meth:`empty`.

        The array's own memory where the host can write it, staging otherwise.
        """

    def receive_target(self, array: Any) -> memoryview | DeviceTarget:
        """The same for who can write to a device's memory: that of the array itself, if it has
        any the driver knows of."""
        return self.receive_view(array)

    @abc.abstractmethod
    def received(self, array: Any, target: memoryview | DeviceTarget) -> None:
        """The bytes of :meth:`receive_view` or :meth:`receive_target` are there: bring them to
        the array.

        Ordered before what the calling thread's stream runs next. The caller may drop the target
        at once, and must not write to it again.
        """

    def adopt(self, view: memoryview, shape: Shape, dtype: DType) -> Any:
        """An array of the device in the flat host bytes ``view``, which it keeps; None where a
        device can't work in host memory, or not in this.

        Another process may change the bytes at any time.
        """
        return None

    @abc.abstractmethod
    def send_view(self, array: Any) -> tuple[memoryview, bool]:
        """Flat host bytes of an array in C order, and whether they are a private copy.

        Waits for what the calling thread's stream has queued. Without a private copy the array
        must not change until the bytes are sent.
        """

    def send_source(self, array: Any) -> tuple[memoryview | DeviceMemory, bool]:
        """The same for who can read a device's memory: that of the array itself, or of a private
        copy in C order beside it."""
        return self.send_view(array)

    def small_bytes(self, array: Any) -> bytes:
        """A copy of the bytes of a small array, in C order."""
        return bytes(self.send_view(array)[0])

    def meta(self, array: Any) -> tuple[Shape, DType]:
        """Shape and dtype of an array."""
        return array.shape, array.dtype

    def describe(self, array: Any) -> tuple[Shape, str]:
        """Shape, and the dtype by the name that its client knows."""
        shape, dtype = self.meta(array)
        return shape, dtype.str.lstrip("<|=")

    @abc.abstractmethod
    def storage_of(self, array: Any) -> Any:
        """Identity of the allocation that an array lies in: the same object for all its views.

        To be compared with ``is`` only.
        """

    # -- streams and events ---------------------------------------------------------------------

    @abc.abstractmethod
    def create_stream(self, device: int) -> Any:
        """A stream of the device; dropped with its last reference."""

    @abc.abstractmethod
    def activate(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which this thread works on the stream."""

    @abc.abstractmethod
    def record(self, stream: Any) -> Any:
        """An event at what the stream has been given so far."""

    @abc.abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """What the stream is given from here on runs after the event. Does not block the host."""

    @abc.abstractmethod
    def reached(self, event: Any) -> bool:
        """Whether the event has been passed."""

    def idle(self, stream: Any) -> bool:
        """Whether the stream has done what it was given; on devices that run behind their host this
        is known sooner than that an event was passed."""
        return self.reached(self.record(stream))

    @abc.abstractmethod
    def synchronize_event(self, event: Any) -> None:
        """Block this thread until the event is passed."""

    @abc.abstractmethod
    def elapsed(self, start: Any, end: Any) -> float | None:
        """Milliseconds between two events, or None while one is not passed yet."""

    @abc.abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Block this thread until the stream has done what it was given."""
