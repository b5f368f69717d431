"""Arrays of other libraries as host memory, and where results go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuremote._dtypes import check_dtype
from gpuremote._speed import native
from gpuremote._types import Shape
from gpuremote.errors import DTypeError, GpuRemoteError, InvalidBuffer
from gpuremote.memory.cuda import CudaError
from gpuremote.memory.device import device_array, on_cuda_device

__all__ = ["HostArray", "copy_bytes", "fits", "host_array", "host_memory", "output_view"]

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory() -> int:
    """Bytes of memory that this machine has, or that the container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            with open(path) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # No such file, or "max".
            pass
    return total


class HostArray(NamedTuple):
    """An array to upload.

    Attributes
    ----------
    view : memoryview
        Its bytes, C-contiguous; holds the exporter alive.
    copied : int
        Bytes that had to be copied because the input was not contiguous or not in native order.
    """

    shape: Shape
    dtype: np.dtype[Any]
    view: memoryview
    copied: int


def _python_copy(target: memoryview, source: memoryview, _away: bool, /) -> None:
    if target.nbytes != source.nbytes:  # NumPy would repeat a single byte
        raise ValueError(f"{source.nbytes} bytes do not fit into {target.nbytes} exactly")
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


_copy = _python_copy
if not TYPE_CHECKING and native is not None:
    _copy = native.copy


def copy_bytes(target: memoryview, source: memoryview, *, away: bool = False) -> None:
    """Copy flat bytes without the interpreter's lock, which a slice assignment would keep.

    They must not overlap, and be of equal size. In C a large copy may go past the caches, a
    middling one too if its bytes are for another process (``away``).
    """
    _copy(target, source, away)


def host_array(value: Any, dtype: npt.DTypeLike | None = None) -> HostArray:
    """View ``value`` as a contiguous array in host memory.

    Takes NumPy arrays, anything with the buffer protocol, DLPack on the CPU (torch tensors),
    arrays on a CUDA device (CuPy, torch and others: copied to the host), Python scalars and nested
    lists.

    Raises
    ------
    DTypeError
        Object, string or other dtypes that can't live on a device.
    InvalidBuffer
        A DLPack exporter refused, or an array on a CUDA device is not C-contiguous or can't be
        copied.
    """
    if type(value) is np.ndarray and dtype is None and value.flags.c_contiguous:
        dtype = value.dtype
        kind = check_dtype(dtype)
        if kind is dtype or kind == dtype:  # nearly every one
            return HostArray(value.shape, kind, _bytes_of(value), 0)
    array = _as_numpy(value)
    wanted = check_dtype(array.dtype if dtype is None else dtype)
    ready = array if array.dtype == wanted and array.flags.c_contiguous else None
    if ready is None:
        # astype gives native byte order and C order in one pass.
        ready = array.astype(wanted, order="C")
        copied = ready.nbytes
    else:
        copied = 0
    return HostArray(ready.shape, wanted, _bytes_of(ready), copied)


def _as_numpy(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray):
        raise DTypeError("a mask can't live on a device: give value.filled(...) or value.data")
    if isinstance(value, np.ndarray):
        return np.asarray(value)  # of a subclass its memory only: a matrix reshapes differently
    if isinstance(value, (bytes, bytearray)):
        return np.frombuffer(value, np.uint8)
    if not isinstance(value, np.generic) and on_cuda_device(value):
        if hasattr(value, "get"):
            staged: npt.NDArray[Any] = value.get()  # CuPy's, in whatever order of elements
            return staged
        return _from_device(value)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        exporter = value.detach() if hasattr(value, "detach") else value
        try:
            return np.from_dlpack(exporter)
        except (BufferError, RuntimeError, TypeError) as error:
            raise InvalidBuffer(
                f"{type(value).__name__} does not give its memory through DLPack: {error}"
            ) from error
    try:
        array = np.asarray(value)
    except ValueError as error:
        if isinstance(error, GpuRemoteError):
            raise
        raise DTypeError(
            f"this {type(value).__name__} makes no array (is the nested list ragged?): {error}"
        ) from error
    if array.dtype == object:
        raise DTypeError(
            f"a {type(value).__name__} of objects can't live on a device; give numbers of one dtype"
        )
    return array


def _from_device(value: Any) -> npt.NDArray[Any]:
    try:
        found = device_array(value)
        array = np.empty(found.shape, found.dtype)
        if array.nbytes:
            found.memory.copy_to(_bytes_of(array))
    except CudaError as error:
        raise InvalidBuffer(
            f"the {type(value).__name__} can't be copied from its device: {error}"
        ) from error
    return array


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    if not array.nbytes:
        return memoryview(bytearray())  # one that can be written to, like any other
    return array.data.cast("B")


def _python_fits(out: Any, kind: Any, shape: object, dtype: object, /) -> memoryview | None:
    """The memory of ``out`` if it is a plain NumPy array of that shape and dtype, contiguous,
    writable and not empty; else None. ``kind`` is ``numpy.ndarray``."""
    if type(out) is kind and out.shape == shape and out.dtype == dtype:
        view: memoryview = out.data
        if view.c_contiguous and not view.readonly and view.nbytes:
            return view
    return None


fits = _python_fits
if not TYPE_CHECKING and native is not None:
    fits = native.fits


def output_view(
    out: Any, shape: Shape | None = None, dtype: np.dtype[Any] | None = None
) -> memoryview:
    """The writable memory of ``out``, if an array of ``shape`` and ``dtype`` fits in exactly.

    The view is C-contiguous, of any shape and format. A NumPy array must have that
    shape and dtype; any other buffer that number of bytes.

    Raises
    ------
    InvalidBuffer
        Read-only, not C-contiguous, or of another shape, dtype or size. Nothing was written.
    """
    view = fits(out, np.ndarray, shape, dtype)
    if view is not None:
        return view
    if hasattr(out, "__dlpack__") and not isinstance(out, np.ndarray):
        try:
            out = np.from_dlpack(out)
        except (BufferError, RuntimeError, TypeError) as error:
            raise InvalidBuffer(f"out does not give its memory through DLPack: {error}") from error
    if isinstance(out, np.ndarray):
        if shape is not None and (out.shape != shape or out.dtype != dtype):
            raise InvalidBuffer(
                f"out is {out.dtype}{out.shape}, the array is {dtype}{shape}; they must be equal"
            )
        if not out.flags.writeable:
            raise InvalidBuffer("out is read-only")
        if not out.flags.c_contiguous:
            raise InvalidBuffer(
                "out is not C-contiguous; get into a contiguous array and assign from it"
            )
        return _bytes_of(out)
    try:
        view = memoryview(out)
    except TypeError as error:
        raise InvalidBuffer(f"a {type(out).__name__} can't take an array's bytes") from error
    if view.readonly:
        raise InvalidBuffer("out is read-only")
    if not view.c_contiguous:
        raise InvalidBuffer("out is not C-contiguous")
    if shape is not None and dtype is not None:
        expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if view.nbytes != expected:
            raise InvalidBuffer(f"out has {view.nbytes} bytes, the array {expected}")
    return view.cast("B") if view.nbytes else memoryview(bytearray(0))
