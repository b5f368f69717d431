"""Memory of a GPU, by pointer and size, whichever library allocated it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, InvalidBuffer
from gpuremote.memory.cuda import Allocation, CudaDriver, cuda_driver

__all__ = ["DeviceArray", "DeviceMemory", "DeviceTarget", "device_array", "on_cuda_device"]

_CUDA: Final = 2
"""DLPack's number for CUDA devices."""
_DLPACK_KINDS: Final = {0: "i", 1: "u", 2: "f", 5: "c"}
_DLPACK_BOOL: Final = 6


class DeviceMemory:
    """A range of device memory.

    Parameters
    ----------
    driver : CudaDriver
    pointer, nbytes : int
    device : int
        The driver's number for the device.
    owner : object
        Kept, so that the memory is.
    stream : int
        The stream in whose order the memory is used; 0 is the default stream.
    """

    __slots__ = ("device", "driver", "nbytes", "owner", "pointer", "stream")

    def __init__(
        self,
        driver: CudaDriver,
        pointer: int,
        nbytes: int,
        device: int,
        owner: Any,
        stream: int = 0,
    ) -> None:
        self.driver = driver
        self.pointer = pointer
        self.nbytes = nbytes
        self.device = device
        self.owner = owner
        self.stream = stream

    def part(self, offset: int, size: int) -> DeviceMemory:
        """A range within it; the same owner and stream."""
        return DeviceMemory(
            self.driver, self.pointer + offset, size, self.device, self.owner, self.stream
        )

    def allocation(self) -> Allocation:
        """The allocation that its first byte lies in.

        Raises
        ------
        CudaError
        """
        return self.driver.allocation(self.pointer)

    def copy_to(self, host: memoryview) -> None:
        """Copy all of it to host memory, in the order of its stream; waits for it."""
        flat = np.frombuffer(host, np.uint8)
        self.driver.copy_out(self.device, flat.ctypes.data, self.pointer, self.nbytes, self.stream)
        self.driver.synchronize(self.device, self.stream)


class DeviceTarget:
    """Device memory that a payload is received into, by whatever comes.

    A transport that writes to it (``Incoming.takes_device``) does. Any other asks for
    :meth:`host`, and what lies there afterwards is for the owner of the target to upload.

    Parameters
    ----------
    memory : DeviceMemory
    stage : callable
        Gives that many bytes of host memory.
    idle : callable
        Whether everything has run that was queued for this memory before. Until then only copies
        in the order of its stream may write there.

    Attributes
    ----------
    nbytes : int
    staged : list of (int, memoryview)
        Host memory that was given out, and where its bytes go: the offset of the first one.
    """

    __slots__ = ("_begin", "_idle", "_stage", "memory", "nbytes", "staged")

    def __init__(
        self,
        memory: DeviceMemory,
        stage: Callable[[int], memoryview],
        idle: Callable[[], bool] = lambda: True,
    ) -> None:
        self.memory = memory
        self.nbytes = memory.nbytes
        self.staged: list[tuple[int, memoryview]] = []
        self._stage = stage
        self._idle = idle
        self._begin = 0

    def idle(self) -> bool:
        return self._idle()

    def host(self) -> memoryview:
        """Host memory for all of it."""
        view = self._stage(self.nbytes)
        self.staged.append((self._begin, view))
        return view

    def __getitem__(self, rest: slice) -> DeviceTarget:
        """What follows byte ``rest.start``, which is where a payload goes on that was interrupted:
        of the host memory that was given out, only what lies before counts any more."""
        start, stop, step = rest.indices(self.nbytes)
        if step != 1 or stop != self.nbytes:
            raise IndexError("only the rest of a target is a target")
        begin = self._begin + start
        kept = [(at, view[: max(0, begin - at)]) for at, view in self.staged]
        self.staged[:] = [(at, view) for at, view in kept if view.nbytes]
        found = DeviceTarget(self.memory.part(start, self.nbytes - start), self._stage, self._idle)
        found.staged = self.staged
        found._begin = begin
        return found


class DeviceArray(NamedTuple):
    """A C-contiguous array in device memory."""

    memory: DeviceMemory
    shape: Shape
    dtype: np.dtype[Any]


def on_cuda_device(value: Any) -> bool:
    """Whether an array lies in CUDA memory, as far as it says so."""
    device = getattr(value, "__dlpack_device__", None)
    if device is not None:
        # A torch tensor on the CPU has the other attribute as well; reading that raises.
        return bool(device()[0] == _CUDA)
    return hasattr(value, "__cuda_array_interface__")


def device_array(value: Any, driver: CudaDriver | None = None) -> DeviceArray:
    """An array of CuPy, PyTorch or another library as device memory; no copy.

    Work that its library has queued for it comes before whatever is done in the order of the
    memory's stream.

    Parameters
    ----------
    value : object
        With ``__cuda_array_interface__`` or, on a CUDA device, with ``__dlpack__``.
    driver : CudaDriver, optional
        By default the machine's.

    Raises
    ------
    InvalidBuffer
        It is no such array, or not C-contiguous.
    DTypeError
        NumPy has no such dtype (bfloat16, say).
    CudaError
        There is no driver, or the memory is not a device's.
    """
    driver = driver or cuda_driver()
    try:
        described = value.__cuda_array_interface__
    except (AttributeError, TypeError, RuntimeError):
        return _from_dlpack(value, driver)
    shape = tuple(int(n) for n in described["shape"])
    dtype = np.dtype(described["typestr"])
    _check_order(value, shape, described.get("strides"), dtype.itemsize)
    # 1 is the default stream; 2 is each thread's own. None: nothing is to be waited for.
    stream = described.get("stream")
    number = 0 if stream in (None, 1) else int(stream)
    return _found(driver, int(described["data"][0]), shape, dtype, value, number)


def _found(
    driver: CudaDriver,
    pointer: int,
    shape: Shape,
    dtype: np.dtype[Any],
    owner: Any,
    stream: int = 0,
) -> DeviceArray:
    nbytes = math.prod(shape) * dtype.itemsize
    device = driver.allocation(pointer).device if nbytes else 0
    return DeviceArray(DeviceMemory(driver, pointer, nbytes, device, owner, stream), shape, dtype)


def _check_order(value: Any, shape: Shape, strides: Any, itemsize: int) -> None:
    """Strides in bytes, or None for C order."""
    if strides is None or 0 in shape:
        return
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(tuple(strides)), strict=True):
        if length > 1 and stride != expected:
            raise InvalidBuffer(
                f"the {type(value).__name__} is not C-contiguous; give a contiguous copy of it"
            )
        expected *= length


class _DLDevice(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class _DLType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer.restype = ctypes.c_void_p


def _from_dlpack(value: Any, driver: CudaDriver) -> DeviceArray:
    if not on_cuda_device(value):
        raise InvalidBuffer(f"a {type(value).__name__} is no array in CUDA memory")
    exporter = value.detach() if hasattr(value, "detach") else value
    try:
        # Without a stream the exporter makes its work come before the default stream's. The
        # capsule is kept and not consumed, so it gives the memory back itself.
        capsule = exporter.__dlpack__()
    except (BufferError, RuntimeError, TypeError) as error:
        raise InvalidBuffer(
            f"{type(value).__name__} does not give its memory through DLPack: {error}"
        ) from error
    # The tensor is the first field of what the capsule points to.
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[n] for n in range(tensor.ndim))
    dtype = _dtype_of(value, tensor.dtype)
    if tensor.strides:
        strides = [tensor.strides[n] * dtype.itemsize for n in range(tensor.ndim)]
        _check_order(value, shape, strides, dtype.itemsize)
    pointer = (tensor.data or 0) + tensor.byte_offset
    return _found(driver, pointer, shape, dtype, (value, capsule))


def _dtype_of(value: Any, found: _DLType) -> np.dtype[Any]:
    if found.lanes == 1 and found.code == _DLPACK_BOOL and found.bits == 8:
        return np.dtype(np.bool_)
    kind = _DLPACK_KINDS.get(found.code)
    if found.lanes != 1 or kind is None or found.bits % 8:
        raise DTypeError(f"the dtype of this {type(value).__name__} has no counterpart in NumPy")
    return np.dtype(f"{kind}{found.bits // 8}")
