"""Methods of the array that say nothing of how it is kept: reductions, order, protocols, text, and
what can be awaited."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from gpuremote.client.blocking import BlockingArray
from gpuremote.ops.meta import check_dtype
from gpuremote.ops.shapes import normal_axis

__all__ = ["FUNCTIONS", "Methods", "axis_of", "integers", "wire"]

_MOST: Final = 256

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions of the namespace by name, for methods that are short for one: filled by the
package, as they build on this module."""


_wires: dict[Any, str] = {}


def wire(dtype: npt.DTypeLike) -> str:
    """What a dtype is called in an op's parameters."""
    try:
        return _wires[dtype]
    except (KeyError, TypeError):
        found = check_dtype(dtype).str.lstrip("<|=")
    if len(_wires) < _MOST and isinstance(dtype, str | type | np.dtype):
        _wires[dtype] = found
    return found


def axis_of(axis: Any, ndim: int) -> int:
    """An axis as a number from 0 on; AxisError where there is none."""
    return normal_axis(operator.index(axis), ndim)


def integers(value: Any) -> Any:
    """An axis, a length, or several of them, as Python's own numbers."""
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return tuple(map(operator.index, value))
    return operator.index(value)


class Methods(BlockingArray):
    """NumPy's and CuPy's methods; ``ndarray`` is made of it."""

    __slots__ = ()

    def _apply(self, name: str, *, out: Any = None, **params: Any) -> Any:
        """The one result of an op of this array, or ``out`` with it in."""
        raise NotImplementedError

    # -- protocols ------------------------------------------------------------------------------

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """The module ``gpuremote.cupy``; for an array of another device that device's ``xp``."""
        return FUNCTIONS["namespace_of"](self.device, api_version)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Host memory: what ``__dlpack__`` gives is a copy of the values there."""
        return (1, 0)

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """The values on the host, fetched (one round trip), as a DLPack capsule.

        Raises
        ------
        BufferError
            ``copy=False``, or another device than the host.
        """
        if copy is False:
            raise BufferError("the values of a remote array have to be copied to get here")
        if stream is not None or dl_device not in (None, (1, 0)):
            raise BufferError("a remote array can be given to host memory only, without a stream")
        return self.get().__dlpack__(max_version=max_version)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return FUNCTIONS["array_ufunc"](ufunc, method, inputs, kwargs)

    def __array_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any, kwargs: Any
    ) -> Any:
        return FUNCTIONS["array_function"](function, args, kwargs)

    @property
    def __cuda_array_interface__(self) -> Any:
        raise AttributeError(
            "the memory of a remote array is on another machine: get() its values, or copy_to() "
            "a device of this one"
        )

    def __reduce__(self) -> Any:
        """Pickled are the values, fetched; unpickled, an array of the default device."""
        return _unpickled, (self.get(),)

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> Self:
        return self.copy()

    # -- text, and what can be awaited ----------------------------------------------------------

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if not self.ndim and spec else format(str(self), spec)

    def __repr__(self) -> str:
        text: str = FUNCTIONS["array_repr"](self)
        return text

    def __str__(self) -> str:
        text: str = FUNCTIONS["array_str"](self)
        return text

    async def get_async(self, out: Any = None) -> Any:
        """:meth:`get`, to be awaited."""
        return await asyncio.to_thread(self.get, out)

    async def item_async(self, *index: Any) -> Any:
        """:meth:`item`, to be awaited: in place of ``float(x)`` and its like too."""
        return await asyncio.to_thread(self.item, *index)

    async def tolist_async(self) -> Any:
        """:meth:`tolist`, to be awaited."""
        return await asyncio.to_thread(self.tolist)

    async def wait_async(self, timeout: float | None = None) -> Self:
        """``wait``, to be awaited: until the array exists on the device."""
        return await asyncio.to_thread(self.wait, timeout)

    async def nonzero_async(self) -> tuple[Any, ...]:
        """:meth:`nonzero`, to be awaited."""
        return await asyncio.to_thread(self.nonzero)

    async def compress_async(self, condition: Any, axis: int | None = None) -> Any:
        """:meth:`compress`, to be awaited."""
        return await asyncio.to_thread(self.compress, condition, axis)

    async def getitem_async(self, index: Any) -> Self:
        """``x[mask]``, to be awaited."""
        return await asyncio.to_thread(self.__getitem__, index)

    # -- reductions -----------------------------------------------------------------------------

    def sum(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return self._reduced("sum", axis, keepdims, dtype, out)

    def prod(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return self._reduced("prod", axis, keepdims, dtype, out)

    def mean(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return self._reduced("mean", axis, keepdims, dtype, out)

    def max(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return self._reduced("max", axis, keepdims, None, out)

    def min(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return self._reduced("min", axis, keepdims, None, out)

    def all(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return self._reduced("all", axis, keepdims, None, out)

    def any(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return self._reduced("any", axis, keepdims, None, out)

    def ptp(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return self._reduced("ptp", axis, keepdims, None, out)

    def argmax(
        self, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return self._placed("argmax", axis, dtype, out, keepdims)

    def argmin(
        self, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return self._placed("argmin", axis, dtype, out, keepdims)

    def var(
        self,
        axis: Any = None,
        dtype: Any = None,
        out: Any = None,
        ddof: float = 0,
        keepdims: bool = False,
    ) -> Any:
        return self._reduced("var", axis, keepdims, dtype, out, correction=_number(ddof))

    def std(
        self,
        axis: Any = None,
        dtype: Any = None,
        out: Any = None,
        ddof: float = 0,
        keepdims: bool = False,
    ) -> Any:
        return self._reduced("std", axis, keepdims, dtype, out, correction=_number(ddof))

    def cumsum(self, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
        return self._run("cumulative_sum", axis, dtype, out)

    def cumprod(self, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
        return self._run("cumulative_prod", axis, dtype, out)

    def trace(
        self, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, out: Any = None
    ) -> Any:
        return _do("trace", self, offset, axis1, axis2, dtype, out)

    # -- order, choice --------------------------------------------------------------------------

    def sort(self, axis: int = -1, kind: Any = None) -> None:
        """Sort in place."""
        self[...] = self._apply("sort", axis=operator.index(axis))

    def argsort(self, axis: int | None = -1, kind: Any = None) -> Any:
        return _do("argsort", self, axis, kind)

    def partition(self, kth: Any, axis: int = -1) -> None:
        """Partition in place."""
        self[...] = self._apply("partition", kth=integers(kth), axis=operator.index(axis))

    def argpartition(self, kth: Any, axis: int | None = -1) -> Any:
        return _do("argpartition", self, kth, axis)

    def searchsorted(self, v: Any, side: str = "left", sorter: Any = None) -> Any:
        return _do("searchsorted", self, v, side, sorter)

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> Any:
        return _do("clip", self, min, max, out)

    def round(self, decimals: int = 0, out: Any = None) -> Any:
        return self._apply("round", decimals=decimals, out=out)

    def take(self, indices: Any, axis: int | None = None, out: Any = None) -> Any:
        return _do("take", self, indices, axis, out)

    def put(self, indices: Any, values: Any, mode: str = "raise") -> None:
        FUNCTIONS["put"](self, indices, values, mode)

    def choose(self, choices: Any, out: Any = None, mode: str = "raise") -> Any:
        return _do("choose", self, choices, out, mode)

    def compress(self, condition: Any, axis: int | None = None, out: Any = None) -> Any:
        """The slices along an axis where the condition is true; waits for their number."""
        return _do("compress", condition, self, axis, out)

    def nonzero(self) -> tuple[Any, ...]:
        """The indices of what is not zero, an array for each axis; waits for their number."""
        found: tuple[Any, ...] = FUNCTIONS["nonzero"](self)
        return found

    def dot(self, b: Any, out: Any = None) -> Any:
        return _do("dot", self, b, out)

    def _reduced(
        self, name: str, axis: Any, keepdims: bool, dtype: Any, out: Any, **params: Any
    ) -> Any:
        if dtype is not None:
            params["dtype"] = wire(dtype)
        axes = integers(axis)
        return self._apply(name, axis=axes, keepdims=True if keepdims else None, out=out, **params)

    def _placed(self, name: str, axis: int | None, dtype: Any, out: Any, keepdims: bool) -> Any:
        keep = True if keepdims else None
        if dtype is None:
            return self._apply(name, axis=integers(axis), keepdims=keep, out=out)
        found = self._apply(name, axis=integers(axis), keepdims=keep).astype(dtype)
        if out is None:
            return found
        out[...] = found
        return out

    def _run(self, name: str, axis: int | None, dtype: Any, out: Any) -> Any:
        params = {} if dtype is None else {"dtype": wire(dtype)}
        return self._apply(name, axis=integers(axis), out=out, **params)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _do(name: str, *operands: Any) -> Any:
    """What a function of the namespace gives."""
    return FUNCTIONS[name](*operands)


def _unpickled(host: npt.NDArray[Any]) -> Any:
    return FUNCTIONS["asarray"](host)
