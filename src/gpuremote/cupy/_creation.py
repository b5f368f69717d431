"""Functions that make arrays: of nothing, of host values, of other arrays."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.client.blocking import BlockingArray
from gpuremote.cupy._array import ndarray, own, several, single, wire
from gpuremote.cupy._home import device_of
from gpuremote.errors import ImplicitTransfer, ShapeError, UnsupportedOp
from gpuremote.ops.creation import arange_length
from gpuremote.ops.meta import check_dtype

__all__ = [
    "arange",
    "array",
    "array_of",
    "asanyarray",
    "asarray",
    "asarray_chkfinite",
    "ascontiguousarray",
    "asfarray",
    "asfortranarray",
    "astype",
    "copy",
    "diag",
    "diagflat",
    "empty",
    "empty_like",
    "eye",
    "from_dlpack",
    "fromfunction",
    "full",
    "full_like",
    "geomspace",
    "identity",
    "indices",
    "linspace",
    "logspace",
    "meshgrid",
    "ones",
    "ones_like",
    "operand",
    "require",
    "tri",
    "tril",
    "triu",
    "vander",
    "zeros",
    "zeros_like",
]


def _lengths(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, tuple | list):
        return tuple(map(operator.index, shape))
    return (operator.index(shape),)


def _make(name: str, params: dict[str, Any], device: Any, scalars: Sequence[Any] = ()) -> ndarray:
    place = device_of(device)
    given = {key: value for key, value in params.items() if value is not None}
    return issue.create(place._core, ndarray, name, place.index, given, scalars)


# -- of host values -----------------------------------------------------------------------------


def asarray(
    obj: Any,
    dtype: npt.DTypeLike | None = None,
    order: Any = None,
    *,
    device: Any = None,
    copy: bool | None = None,
    blocking: bool = True,
) -> ndarray:
    """An array on a device: of host values, which are uploaded, or of a remote array, which is
    given as it is if it is there and has the dtype.

    Parameters
    ----------
    obj : array_like
        NumPy arrays, numbers, nested sequences (also with remote arrays in them, which stay where
        they are), anything with DLPack or the buffer protocol.
    dtype : dtype, optional
    device : Device, optional
        By default that of a remote ``obj``, else the one in use.
    copy : bool, optional
        True: always another array. False: never one.

    Raises
    ------
    ValueError
        ``copy=False``, and a copy is needed.
    DTypeError
        Values that can't live on a device.
    """
    if isinstance(obj, RemoteArray):
        return _as_remote(obj, dtype, device, copy)
    if copy is False:
        raise ValueError("host values have to be copied to get to a device")
    if isinstance(obj, list | tuple) and _has_remote(obj):
        return _stacked(obj, dtype, device)
    wanted = None if dtype is None else check_dtype(dtype)
    place = device_of(device)
    if isinstance(obj, bool | int | float | complex):
        if isinstance(obj, int) and not isinstance(obj, bool) and wanted is None:
            np.asarray(obj).astype(np.int64 if obj < 1 << 63 else np.uint64)  # OverflowError
        if wanted is not None:
            obj = np.asarray(obj, wanted)[()] if wanted.kind != "b" else bool(obj)
        return _make("full", {"shape": ()}, place, (obj,))
    return own(place.put_copied(obj, wanted))


def _as_remote(obj: RemoteArray, dtype: Any, device: Any, copy: bool | None) -> ndarray:
    wanted = obj.dtype if dtype is None else check_dtype(dtype)
    there = device is None or device_of(device) is obj.device
    if wanted == obj.dtype and there:
        if copy:
            return single("copy", obj)
        return _named(obj)
    if copy is False:
        raise ValueError(f"{obj.dtype} on {obj.device} can't be {wanted} there without a copy")
    found = _named(obj) if wanted == obj.dtype else _named(obj).astype(wanted)
    return found if there else found.to_device(device_of(device))


def _named(array: RemoteArray) -> ndarray:
    """An array of the device's own methods under a name of this namespace: the same memory."""
    if isinstance(array, ndarray):
        return array
    if not isinstance(array, BlockingArray):
        return own(array)  # says what to do
    return several("getitem", (array,), index=("...",))[0]


def _has_remote(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, RemoteArray) or (isinstance(value, list | tuple) and _has_remote(value))
        for value in values
    )


def _stacked(values: Sequence[Any], dtype: Any, device: Any) -> ndarray:
    """A nested sequence with remote arrays in it, put together on their device."""
    parts = [
        _stacked(v, None, device)
        if isinstance(v, list | tuple) and _has_remote(v)
        else v
        if isinstance(v, RemoteArray)
        else None
        for v in values
    ]
    first = next(part for part in parts if part is not None)
    place = first.device if device is None else device_of(device)
    arrays = [
        asarray(value if part is None else part, device=place)
        for part, value in zip(parts, values, strict=True)
    ]
    found = several("stack", arrays, axis=0)[0]
    return found if dtype is None else found.astype(dtype)


def array(
    obj: Any,
    dtype: npt.DTypeLike | None = None,
    copy: bool = True,
    order: Any = "K",
    subok: bool = False,
    ndmin: int = 0,
    *,
    device: Any = None,
    blocking: bool = False,
) -> ndarray:
    """As :func:`asarray`, and another array unless ``copy`` is false; with ``ndmin`` axes at
    least."""
    found = asarray(obj, dtype, device=device, copy=True if copy else None)
    if found.ndim < ndmin:
        found = found.reshape((1,) * (ndmin - found.ndim) + found.shape)
    return found


def asanyarray(a: Any, dtype: npt.DTypeLike | None = None, order: Any = None) -> ndarray:
    return asarray(a, dtype)


def ascontiguousarray(a: Any, dtype: npt.DTypeLike | None = None) -> ndarray:
    found = asarray(a, dtype)
    return found if found.ndim else found.reshape(1)


def asfortranarray(a: Any, dtype: npt.DTypeLike | None = None) -> ndarray:
    """The array, of one axis at least: in which order its elements lie is the device's business."""
    return ascontiguousarray(a, dtype)


def asfarray(a: Any, dtype: npt.DTypeLike = np.float64) -> ndarray:
    kind = np.dtype(dtype)
    return asarray(a, kind if kind.kind in "fc" else np.float64)


def asarray_chkfinite(a: Any, dtype: npt.DTypeLike | None = None, order: Any = None) -> ndarray:
    """As :func:`asarray`; waits to see that every value is finite."""
    found = asarray(a, dtype)
    if found.dtype.kind in "fc" and not bool(single("isfinite", found).all()):
        raise ValueError("array must not contain infs or NaNs")
    return found


def require(a: Any, dtype: npt.DTypeLike | None = None, requirements: Any = None) -> ndarray:
    return asarray(a, dtype)


def array_of(value: Any, device: Any = None) -> ndarray:
    """An operand that has to be an array: a remote one as it is, numbers and lists of them
    uploaded (to ``device``).

    Raises
    ------
    ImplicitTransfer
        A host array: that it lies on the host is for the program to see.
    """
    if isinstance(value, ndarray):
        return value
    if isinstance(value, np.ndarray) and value.ndim:
        raise ImplicitTransfer(
            f"a host array of shape {value.shape} can't be mixed with remote ones: upload it with "
            "asarray(...) first"
        )
    return asarray(value, device=None if isinstance(value, RemoteArray) else device)


def operand(value: Any, device: Any = None) -> Any:
    """An operand that may be a scalar: lists become arrays (of ``device``), the rest stays."""
    return asarray(value, device=device) if isinstance(value, list | tuple) else value


def from_dlpack(x: Any, /, *, device: Any = None, copy: bool | None = None) -> ndarray:
    """An array of whatever speaks DLPack: a remote one as it is, another one uploaded."""
    if isinstance(x, RemoteArray):
        return _as_remote(x, None, device, copy)
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"a {type(x).__name__} does not speak DLPack")
    return asarray(x, device=device, copy=copy)


def astype(x: Any, dtype: npt.DTypeLike, /, *, copy: bool = True, device: Any = None) -> Any:
    found = own(x).astype(dtype, copy=copy)
    return found if device is None else found.to_device(device_of(device))


def copy(a: Any, order: Any = "K") -> ndarray:
    return asarray(a, copy=True)


def fromfunction(
    function: Callable[..., Any], shape: Any, *, dtype: npt.DTypeLike = float, **kwargs: Any
) -> Any:
    """What the function gives for the arrays of :func:`indices`."""
    return function(*indices(shape, dtype), **kwargs)


# -- of nothing ---------------------------------------------------------------------------------


def empty(
    shape: Any, dtype: npt.DTypeLike = float, order: Any = "C", *, device: Any = None
) -> ndarray:
    return _make("empty", {"shape": _lengths(shape), "dtype": wire(dtype)}, device)


def zeros(
    shape: Any, dtype: npt.DTypeLike = float, order: Any = "C", *, device: Any = None
) -> ndarray:
    return _make("zeros", {"shape": _lengths(shape), "dtype": wire(dtype)}, device)


def ones(
    shape: Any, dtype: npt.DTypeLike = float, order: Any = "C", *, device: Any = None
) -> ndarray:
    return _make("ones", {"shape": _lengths(shape), "dtype": wire(dtype)}, device)


def full(
    shape: Any,
    fill_value: Any,
    dtype: npt.DTypeLike | None = None,
    order: Any = "C",
    *,
    device: Any = None,
) -> ndarray:
    lengths = _lengths(shape)
    params = {"shape": lengths, "dtype": None if dtype is None else wire(dtype)}
    if isinstance(fill_value, RemoteArray):
        if fill_value.ndim:
            found = empty(lengths, dtype or fill_value.dtype, device=fill_value.device)
            found[...] = fill_value
            return found
        return several("full", (fill_value,), **params)[0]
    if isinstance(fill_value, list | tuple | np.ndarray) and np.ndim(fill_value):
        value = asarray(fill_value, dtype, device=device)
        return single("copy", single("broadcast_to", value, shape=lengths))
    return _make("full", params, device, (fill_value,))


def _like(a: Any, dtype: Any, shape: Any, device: Any) -> dict[str, Any]:
    remote = isinstance(a, RemoteArray)
    found = a if remote else np.asarray(a)
    return {
        "shape": found.shape if shape is None else shape,
        "dtype": found.dtype if dtype is None else dtype,
        "device": found.device if device is None and remote else device,
    }


def empty_like(
    prototype: Any,
    dtype: npt.DTypeLike | None = None,
    order: Any = "K",
    subok: Any = None,
    shape: Any = None,
    *,
    device: Any = None,
) -> ndarray:
    return empty(**_like(prototype, dtype, shape, device))


def zeros_like(
    a: Any,
    dtype: npt.DTypeLike | None = None,
    order: Any = "K",
    subok: Any = None,
    shape: Any = None,
    *,
    device: Any = None,
) -> ndarray:
    return zeros(**_like(a, dtype, shape, device))


def ones_like(
    a: Any,
    dtype: npt.DTypeLike | None = None,
    order: Any = "K",
    subok: Any = None,
    shape: Any = None,
    *,
    device: Any = None,
) -> ndarray:
    return ones(**_like(a, dtype, shape, device))


def full_like(
    a: Any,
    fill_value: Any,
    dtype: npt.DTypeLike | None = None,
    order: Any = "K",
    subok: Any = None,
    shape: Any = None,
    *,
    device: Any = None,
) -> ndarray:
    return full(fill_value=fill_value, **_like(a, dtype, shape, device))


def eye(
    n_rows: int,
    n_cols: int | None = None,
    k: int = 0,
    dtype: npt.DTypeLike = float,
    order: Any = "C",
    *,
    device: Any = None,
) -> ndarray:
    rows = operator.index(n_rows)
    params = {
        "n_rows": rows,
        "n_cols": rows if n_cols is None else operator.index(n_cols),
        "k": operator.index(k),
        "dtype": wire(dtype),
    }
    return _make("eye", params, device)


def identity(n: int, dtype: npt.DTypeLike = float) -> ndarray:
    return eye(n, dtype=dtype)


def _number(value: Any) -> Any:
    """A scalar parameter on the host: a remote one is waited for."""
    return value.item() if isinstance(value, BlockingArray) else value


def arange(
    start: Any,
    stop: Any = None,
    step: Any = 1,
    dtype: npt.DTypeLike | None = None,
    *,
    device: Any = None,
) -> Any:
    start, stop, step = map(_number, (start, stop, 1 if step is None else step))
    if stop is None:
        start, stop = 0, start
    params = {"length": arange_length(start, stop, step)}
    kind = None if dtype is None else check_dtype(dtype)
    if kind is not None and kind.kind not in "iuf":
        found = _make("arange", params, device, (start, stop, step))
        return found.astype(kind)
    return _make(
        "arange",
        {**params, "dtype": None if kind is None else wire(kind)},
        device,
        (start, stop, step),
    )


def linspace(
    start: Any,
    stop: Any,
    num: int = 50,
    endpoint: bool = True,
    retstep: bool = False,
    dtype: npt.DTypeLike | None = None,
    axis: int = 0,
    *,
    device: Any = None,
) -> Any:
    """Evenly spaced values from ``start`` to ``stop``, which may be arrays."""
    num = operator.index(num)
    if num < 0:
        raise ValueError(f"{num} values")
    between = num - 1 if endpoint else num
    step = (stop - start) / between if between else math.nan
    if isinstance(start, complex) or isinstance(stop, complex):  # CuPy makes none of these
        start = asarray(complex(start), device=device)
    if isinstance(start, RemoteArray) or isinstance(stop, RemoteArray):
        found = _between(start, stop, num, endpoint, dtype, axis)
    else:
        params: dict[str, Any] = {"num": num, "endpoint": bool(endpoint)}
        if dtype is not None:
            kind = check_dtype(dtype)
            if kind.kind != "b":
                params["dtype"] = wire(kind)
        found = _make("linspace", params, device, (start, stop))
        if dtype is not None and check_dtype(dtype).kind == "b":
            found = found.astype(bool)
    return (found, step) if retstep else found


def _between(start: Any, stop: Any, num: int, endpoint: bool, dtype: Any, axis: int) -> Any:
    place = (start if isinstance(start, RemoteArray) else stop).device
    span = stop - start
    ends = (getattr(end, "dtype", end) for end in (start, stop))
    kind = np.result_type(*ends, 1.0)
    steps = arange(num, dtype=kind if kind.kind == "f" else float, device=place)
    steps = steps.reshape((num,) + (1,) * span.ndim) / max(num - 1 if endpoint else num, 1)
    found = steps * span + start
    if endpoint and num > 1:
        found[-1] = stop
    if dtype is not None:
        if np.dtype(dtype).kind in "iu":
            found = single("floor", found)
        found = found.astype(dtype)
    elif found.dtype != kind:
        found = found.astype(kind)
    if axis not in (0, -found.ndim):
        order = list(range(1, found.ndim))
        order.insert(axis if axis >= 0 else found.ndim + axis, 0)
        found = found.transpose(order)
    return found


def logspace(
    start: Any,
    stop: Any,
    num: int = 50,
    endpoint: bool = True,
    base: Any = 10.0,
    dtype: npt.DTypeLike | None = None,
    axis: int = 0,
) -> ndarray:
    exponents = linspace(start, stop, num, endpoint, axis=axis)
    found = single("power", base, exponents)
    return found if dtype is None else found.astype(dtype)


def geomspace(
    start: Any,
    stop: Any,
    num: int = 50,
    endpoint: bool = True,
    dtype: npt.DTypeLike | None = None,
    axis: int = 0,
) -> ndarray:
    if isinstance(start, RemoteArray) or isinstance(stop, RemoteArray):
        raise UnsupportedOp("geomspace between remote arrays: use exp(linspace(log(a), log(b)))")
    return asarray(np.geomspace(start, stop, num, endpoint, dtype, axis))


def tri(N: int, M: int | None = None, k: int = 0, dtype: npt.DTypeLike = float) -> Any:
    columns = N if M is None else M
    rows = arange(N).reshape(N, 1)
    return (arange(-k, columns - k).reshape(1, columns) <= rows).astype(dtype)


def _triangle(name: str, m: Any, k: int) -> ndarray:
    x = array_of(m)
    if x.ndim == 1:  # As NumPy: rows that are all the same.
        x = single("copy", single("broadcast_to", x, shape=(x.size, x.size)))
    return single(name, x, k=operator.index(k))


def tril(m: Any, k: int = 0) -> ndarray:
    return _triangle("tril", m, k)


def triu(m: Any, k: int = 0) -> ndarray:
    return _triangle("triu", m, k)


def diag(v: Any, k: int = 0) -> Any:
    x = array_of(v)
    if x.ndim == 2:
        return x.diagonal(k).copy()
    if x.ndim != 1:
        raise ShapeError(f"shape {x.shape}: one or two axes are needed", op="diag")
    n = x.size + abs(k)
    found = zeros((n, n), x.dtype, device=x.device)
    found.reshape(-1)[max(k, 0) - n * min(k, 0) :: n + 1][: x.size] = x
    return found


def diagflat(v: Any, k: int = 0) -> Any:
    return diag(array_of(v).ravel(), k)


def vander(x: Any, N: int | None = None, increasing: bool = False) -> Any:
    points = array_of(x)
    if points.ndim != 1:
        raise ShapeError(f"shape {points.shape}: one axis is needed", op="vander")
    columns = points.size if N is None else operator.index(N)
    kind = np.promote_types(points.dtype, int)
    exponents = arange(columns, device=points.device)
    if not increasing:
        exponents = exponents[::-1]
    return single("power", points.reshape(-1, 1).astype(kind), exponents.reshape(1, -1)).astype(
        kind
    )


def meshgrid(
    *xi: Any, copy: bool = True, sparse: bool = False, indexing: str = "xy"
) -> list[ndarray]:
    """Coordinate arrays of a grid, one for each of the arguments."""
    if indexing not in ("xy", "ij"):
        raise ValueError("indexing has to be 'xy' or 'ij'")
    arrays = [array_of(x).ravel() for x in xi]
    shapes = [(1,) * i + (-1,) + (1,) * (len(arrays) - 1 - i) for i in range(len(arrays))]
    found = [x.reshape(shape) for x, shape in zip(arrays, shapes, strict=True)]
    if indexing == "xy" and len(found) > 1:
        found = [x.swapaxes(0, 1) for x in found]
    if not sparse:
        full_shape = np.broadcast_shapes(*(x.shape for x in found)) if found else ()
        found = [single("broadcast_to", x, shape=full_shape) for x in found]
    return [x.copy() for x in found] if copy else found


def indices(dimensions: Any, dtype: npt.DTypeLike = int, sparse: bool = False) -> Any:
    lengths = _lengths(dimensions)
    ranges = [arange(n, dtype=dtype) for n in lengths]
    if not ranges:
        return () if sparse else empty((0,), dtype)
    grids = meshgrid(*ranges, indexing="ij", sparse=sparse)
    return tuple(grids) if sparse else several("stack", grids, axis=0)[0]
