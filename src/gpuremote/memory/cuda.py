"""The CUDA driver, as far as memory goes: whose memory a pointer is, how a network card may get at
it, and page-locked host memory with copies that do not wait.

Called through ``libcuda.so.1`` itself, so that it works beside CuPy, PyTorch or neither, whatever
CUDA version those were built for. Nothing is loaded before it is asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Final, NamedTuple, Protocol

__all__ = ["Allocation", "CudaDriver", "CudaError", "LibCuda", "cuda_driver"]

_OUT_OF_MEMORY, _NOT_READY = 2, 600
# Of pointers.
_MEMORY_TYPE, _SYNC_MEMOPS, _BUFFER_ID, _IS_MANAGED = 2, 6, 7, 8
_DEVICE_ORDINAL, _MEMPOOL = 9, 17
_DEVICE_MEMORY = 2
# Of devices.
_FLUSH_OPTIONS, _WRITES_ORDERING, _DMA_BUF = 117, 118, 124
_FLUSH_BY_HOST = 1
_ORDERED_FOR_OWNER = 100
_DMA_BUF_FD = 1
_TARGET_CURRENT_CONTEXT, _TO_OWNER = 0, 100
_PORTABLE, _NON_BLOCKING, _NO_TIMING = 1, 1, 2

# As in cuda.h, which maps several names to a second version of theirs.
_PROTOTYPES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuPointerSetAttribute": (c_void_p, c_int, c_uint64),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuMemGetHandleForAddressRange": (c_void_p, c_uint64, c_size_t, c_int, c_uint64),
    "cuFlushGPUDirectRDMAWrites": (c_int, c_int),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
}


class CudaError(Exception):
    """A call of the driver failed, or there is no driver.

    Attributes
    ----------
    result : int
        The driver's number; 0 where there is none.
    """

    def __init__(self, text: str, result: int = 0) -> None:
        super().__init__(text)
        self.result = result


class Allocation(NamedTuple):
    """The allocation that a pointer lies in.

    Attributes
    ----------
    base, size : int
    ident : int
        The driver's number for it, never used twice in a process, unlike addresses.
    device : int
    pooled : bool
        From the driver's own pools (``cudaMallocAsync``), which no card can reach.
    """

    base: int
    size: int
    ident: int
    device: int
    pooled: bool


class CudaDriver(Protocol):
    """What is asked of the driver. Streams and events are numbers; stream 0 is the default one.

    Every method raises CudaError where the driver refuses.
    """

    def allocation(self, pointer: int) -> Allocation:
        """Whose memory it is. Memory of the host or managed memory is refused."""

    def exports_dmabuf(self, device: int) -> bool:
        """Whether memory of the device can be exported as a dma-buf."""

    def export_dmabuf(self, device: int, address: int, size: int) -> int:
        """A descriptor for whole pages of device memory, the caller's to close."""

    def synchronous_copies(self, device: int, pointer: int) -> None:
        """From here on what CUDA calls a synchronous copy of this memory is over on return."""

    def orders_writes(self, device: int) -> bool:
        """Whether kernels see what a card wrote without a flush."""

    def flushes_writes(self, device: int) -> bool:
        """Whether the host can ask for that flush."""

    def flush_writes(self, device: int) -> None:
        """Make what a card wrote, and reported, visible to the device."""

    def allocate_host(self, device: int, size: int) -> int:
        """Page-locked memory, for every device."""

    def free_host(self, device: int, address: int) -> None: ...

    def create_stream(self, device: int) -> int:
        """One that does not wait for the default stream."""

    def destroy_stream(self, device: int, stream: int) -> None: ...

    def copy_out(self, device: int, host: int, pointer: int, size: int, stream: int) -> None:
        """From the device, in the order of the stream; returns at once."""

    def copy_in(self, device: int, pointer: int, host: int, size: int, stream: int) -> None:
        """To the device, in the order of the stream; returns at once."""

    def synchronize(self, device: int, stream: int) -> None:
        """Block this thread until the stream has done what it was given."""

    def record(self, device: int, stream: int) -> int:
        """A new event, behind what the stream has been given."""

    def reached(self, device: int, event: int) -> bool: ...

    def destroy_event(self, device: int, event: int) -> None: ...


class LibCuda:
    """The driver of this machine.

    Raises
    ------
    CudaError
        There is none, or it finds no device.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"no CUDA driver ({error})") from None
        self._functions: dict[str, Any] = {}
        self._contexts: dict[int, int] = {}
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        if result := self._result(name, *arguments):
            raise CudaError(f"{name}: {self._named(result)}", result)

    def _result(self, name: str, *arguments: Any) -> int:
        function = self._functions.get(name)
        if function is None:
            try:
                function = self._library[name]
            except AttributeError:
                raise CudaError(f"this CUDA driver has no {name}; it is too old") from None
            function.argtypes = _PROTOTYPES[name]
            function.restype = c_int
            self._functions[name] = function
        result: int = function(*arguments)
        return result

    def _named(self, result: int) -> str:
        name = c_char_p()
        self._result("cuGetErrorName", result, byref(name))
        return name.value.decode() if name.value else f"error {result}"

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """The device's primary context, which CuPy and PyTorch use as well, for this thread."""
        context = self._contexts.get(device)
        if context is None:
            number, made = c_int(), c_void_p()
            self._call("cuDeviceGet", byref(number), device)
            # Never released: it is the process's, and ends with it.
            self._call("cuDevicePrimaryCtxRetain", byref(made), number)
            context = self._contexts[device] = made.value or 0
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._result("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _of_pointer(self, kind: Any, attribute: int, pointer: int) -> int:
        value = kind()
        self._call("cuPointerGetAttribute", byref(value), attribute, pointer)
        return value.value or 0

    def _of_device(self, device: int, attribute: int) -> int:
        number, value = c_int(), c_int()
        self._call("cuDeviceGet", byref(number), device)
        self._call("cuDeviceGetAttribute", byref(value), attribute, number)
        return value.value

    def devices(self) -> int:
        """How many there are."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def allocation(self, pointer: int) -> Allocation:
        kind = self._of_pointer(c_uint, _MEMORY_TYPE, pointer)
        if kind != _DEVICE_MEMORY or self._of_pointer(c_uint, _IS_MANAGED, pointer):
            raise CudaError(f"{pointer:#x} is not memory of one device")
        base, size = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", byref(base), byref(size), pointer)
        try:
            pool = self._of_pointer(c_void_p, _MEMPOOL, pointer)
        except CudaError:
            pool = 0  # a driver that knows no pools has none
        return Allocation(
            base.value,
            size.value,
            self._of_pointer(c_uint64, _BUFFER_ID, pointer),
            self._of_pointer(c_int, _DEVICE_ORDINAL, pointer),
            bool(pool),
        )

    def exports_dmabuf(self, device: int) -> bool:
        return bool(self._of_device(device, _DMA_BUF))

    def export_dmabuf(self, device: int, address: int, size: int) -> int:
        descriptor = c_int(-1)
        with self._on(device):
            self._call(
                "cuMemGetHandleForAddressRange",
                byref(descriptor),
                address,
                size,
                _DMA_BUF_FD,
                0,
            )
        return descriptor.value

    def synchronous_copies(self, device: int, pointer: int) -> None:
        with self._on(device):
            self._call("cuPointerSetAttribute", byref(c_uint(1)), _SYNC_MEMOPS, pointer)

    def orders_writes(self, device: int) -> bool:
        return self._of_device(device, _WRITES_ORDERING) >= _ORDERED_FOR_OWNER

    def flushes_writes(self, device: int) -> bool:
        return bool(self._of_device(device, _FLUSH_OPTIONS) & _FLUSH_BY_HOST)

    def flush_writes(self, device: int) -> None:
        with self._on(device):
            self._call("cuFlushGPUDirectRDMAWrites", _TARGET_CURRENT_CONTEXT, _TO_OWNER)

    def allocate_host(self, device: int, size: int) -> int:
        address = c_void_p()
        with self._on(device):
            self._call("cuMemHostAlloc", byref(address), size, _PORTABLE)
        return address.value or 0

    def free_host(self, device: int, address: int) -> None:
        with self._on(device):
            self._call("cuMemFreeHost", address)

    def create_stream(self, device: int) -> int:
        stream = c_void_p()
        with self._on(device):
            self._call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, device: int, stream: int) -> None:
        with self._on(device):
            self._call("cuStreamDestroy_v2", stream)

    def copy_out(self, device: int, host: int, pointer: int, size: int, stream: int) -> None:
        with self._on(device):
            self._call("cuMemcpyDtoHAsync_v2", host, pointer, size, stream)

    def copy_in(self, device: int, pointer: int, host: int, size: int, stream: int) -> None:
        with self._on(device):
            self._call("cuMemcpyHtoDAsync_v2", pointer, host, size, stream)

    def synchronize(self, device: int, stream: int) -> None:
        with self._on(device):
            self._call("cuStreamSynchronize", stream)

    def record(self, device: int, stream: int) -> int:
        event = c_void_p()
        with self._on(device):
            self._call("cuEventCreate", byref(event), _NO_TIMING)
            try:
                self._call("cuEventRecord", event, stream)
            except CudaError:
                self._result("cuEventDestroy_v2", event)
                raise
        return event.value or 0

    def reached(self, device: int, event: int) -> bool:
        with self._on(device):
            result = self._result("cuEventQuery", event)
        if result not in (0, _NOT_READY):
            raise CudaError(f"cuEventQuery: {self._named(result)}", result)
        return result == 0

    def destroy_event(self, device: int, event: int) -> None:
        with self._on(device):
            self._call("cuEventDestroy_v2", event)


@functools.cache
def _loaded() -> LibCuda | CudaError:
    try:
        return LibCuda()
    except CudaError as error:
        return error


def cuda_driver() -> LibCuda:
    """The driver of this machine, loaded once.

    Raises
    ------
    CudaError
        There is none.
    """
    found = _loaded()
    if isinstance(found, CudaError):
        raise CudaError(str(found), found.result)
    return found
