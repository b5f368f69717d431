"""The array of the namespace: NumPy's and CuPy's methods, on a remote device."""

from __future__ import annotations

import asyncio
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.client.blocking import BlockingArray, BlockingDevice
from gpuremote.errors import DTypeError, ImplicitTransfer, ShapeError, UnsupportedOp
from gpuremote.ops.catalogue import find
from gpuremote.ops.meta import check_dtype

__all__ = ["FUNCTIONS", "integers", "ndarray", "own", "several", "single", "store", "wire"]

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions of the namespace by name, for methods that are short for one: filled by the
package, as they build on this module."""


def wire(dtype: npt.DTypeLike) -> str:
    """What a dtype is called in an op's parameters."""
    return check_dtype(dtype).str.lstrip("<|=")


def integers(value: Any) -> Any:
    """An axis, a length, or several of them, as Python's own numbers."""
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return tuple(map(operator.index, value))
    return operator.index(value)


def several(name: str, operands: Sequence[Any], **params: Any) -> list[ndarray]:
    """The results of an op; parameters that are None are left out."""
    given = {key: value for key, value in params.items() if value is not None}
    found: list[ndarray] = issue.apply(find(name), operands, given, ndarray)
    return found


def single(name: str, *operands: Any, out: Any = None, **params: Any) -> ndarray:
    """The one result of an op, or ``out`` with it in."""
    found = several(name, operands, **params)[0]
    return found if out is None else store(found, out)


def store(result: ndarray, out: Any, casting: str = "same_kind") -> ndarray:
    """``out``, with the result written to it.

    Raises
    ------
    DTypeError
        The result's dtype does not go into that of ``out``.
    ShapeError
        Their shapes differ.
    """
    if isinstance(out, tuple):
        (out,) = out
    if not isinstance(out, ndarray):
        raise ImplicitTransfer(
            f"out is a {type(out).__name__}: give a remote array, or get(out=...) the result"
        )
    if not np.can_cast(result.dtype, out.dtype, casting):  # type: ignore[arg-type]
        raise DTypeError(
            f"a result of {result.dtype} does not go into an array of {out.dtype} by the rule "
            f"{casting}"
        )
    if result.shape != out.shape:
        raise ShapeError(f"a result of shape {result.shape} for an out of shape {out.shape}")
    out[...] = result
    return out


class ndarray(BlockingArray):
    """An array on a remote device, for code that was written for NumPy or CuPy.

    Made by the functions of ``gpuremote.cupy``. Ops return at once; shape and dtype of their
    results are known here, values come into being on the device. What waits: ``get``, ``item``,
    ``tolist``, ``bool()``, ``int()``, ``float()``, ``complex()``, printing, pickling, DLPack, and
    functions whose result's shape depends on values, which wait for that shape. Each method that
    waits has one with ``_async`` at the end that can be awaited.

    A host array (of one axis or more) is no operand: ``asarray`` uploads it. Implicit conversion
    to a host array is an error, unless ``GPUREMOTE_DOWNLOAD`` says otherwise.

    Attributes
    ----------
    shape : tuple of int
        Assigning another one of the same size gives this name to a reshaped array.
    dtype : numpy.dtype
    ndim, size, nbytes, itemsize : int
    device : Device
    T, mT : ndarray
        Views: the axes reversed; the last two swapped.
    real, imag : ndarray
        Views; may be assigned to.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # the base class gives an array of whatever class it is

        def __add__(self, other: Any) -> ndarray: ...
        def __radd__(self, other: Any) -> ndarray: ...
        def __sub__(self, other: Any) -> ndarray: ...
        def __rsub__(self, other: Any) -> ndarray: ...
        def __mul__(self, other: Any) -> ndarray: ...
        def __rmul__(self, other: Any) -> ndarray: ...
        def __truediv__(self, other: Any) -> ndarray: ...
        def __rtruediv__(self, other: Any) -> ndarray: ...
        def __floordiv__(self, other: Any) -> ndarray: ...
        def __rfloordiv__(self, other: Any) -> ndarray: ...
        def __mod__(self, other: Any) -> ndarray: ...
        def __rmod__(self, other: Any) -> ndarray: ...
        def __pow__(self, other: Any) -> ndarray: ...
        def __rpow__(self, other: Any) -> ndarray: ...
        def __and__(self, other: Any) -> ndarray: ...
        def __rand__(self, other: Any) -> ndarray: ...
        def __or__(self, other: Any) -> ndarray: ...
        def __ror__(self, other: Any) -> ndarray: ...
        def __xor__(self, other: Any) -> ndarray: ...
        def __rxor__(self, other: Any) -> ndarray: ...
        def __lshift__(self, other: Any) -> ndarray: ...
        def __rlshift__(self, other: Any) -> ndarray: ...
        def __rshift__(self, other: Any) -> ndarray: ...
        def __rrshift__(self, other: Any) -> ndarray: ...
        def __matmul__(self, other: Any) -> ndarray: ...
        def __rmatmul__(self, other: Any) -> ndarray: ...
        def __lt__(self, other: Any) -> ndarray: ...
        def __le__(self, other: Any) -> ndarray: ...
        def __gt__(self, other: Any) -> ndarray: ...
        def __ge__(self, other: Any) -> ndarray: ...
        def __neg__(self) -> ndarray: ...
        def __pos__(self) -> ndarray: ...
        def __abs__(self) -> ndarray: ...
        def __invert__(self) -> ndarray: ...
        def __eq__(self, other: object) -> ndarray: ...  # type: ignore[override]
        def __ne__(self, other: object) -> ndarray: ...  # type: ignore[override]

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

    # -- values ---------------------------------------------------------------------------------

    def get(
        self,
        out: Any = None,
        *,
        stream: Any = None,
        order: str = "C",
        blocking: bool = True,
        copy: bool = True,
        timeout: float | None = None,
    ) -> Any:
        """As ``BlockingArray.get``; ``stream`` and ``blocking`` are CuPy's and change nothing:
        values are there when it returns."""
        found = super().get(out, copy=copy, timeout=timeout)
        return np.asfortranarray(found) if order == "F" and out is None else found

    def set(self, arr: Any, stream: Any = None) -> None:
        """Upload values of the same shape into this array."""
        host = np.asarray(arr)
        if host.shape != self.shape:
            raise ShapeError(f"values of shape {host.shape} for an array of shape {self.shape}")
        self[...] = self._beside(host)

    def tobytes(self, order: str = "C") -> bytes:
        host: npt.NDArray[Any] = self.get()
        return host.tobytes(order)  # type: ignore[arg-type]

    def _beside(self, host: Any) -> ndarray:
        """An upload to this array's device."""
        device: BlockingDevice = self.device  # type: ignore[assignment]
        return own(device.put(host))

    def __iter__(self) -> Iterator[Self]:  # type: ignore[override]
        """Over the first axis: views, no values."""
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def __contains__(self, value: object) -> bool:  # type: ignore[override]
        return bool((self == value).any())

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

    async def nonzero_async(self) -> tuple[ndarray, ...]:
        """:meth:`nonzero`, to be awaited."""
        return await asyncio.to_thread(self.nonzero)

    async def compress_async(self, condition: Any, axis: int | None = None) -> ndarray:
        """:meth:`compress`, to be awaited."""
        return await asyncio.to_thread(self.compress, condition, axis)

    async def getitem_async(self, index: Any) -> Self:
        """``x[mask]``, to be awaited."""
        return await asyncio.to_thread(self.__getitem__, index)

    def item(self, *index: Any, timeout: float | None = None) -> Any:
        """The only element, or the one at an index, as a Python scalar."""
        if not index:
            return super().item(timeout)
        place = index[0] if len(index) == 1 else index
        found = self[place] if isinstance(place, tuple) else self.reshape(-1)[place]
        return BlockingArray.item(found, timeout)

    # -- assignment -----------------------------------------------------------------------------

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, list | tuple):
            value = FUNCTIONS["asarray"](value, dtype=self.dtype, device=self.device)
        super().__setitem__(index, value)

    def fill(self, value: Any) -> None:
        issue.apply(find("fill_"), (self, value))

    @property
    def shape(self) -> Shape:
        return self._meta.shape

    @shape.setter
    def shape(self, shape: Any) -> None:
        # The reshaped array's handle takes the place of this one's, which its finaliser drops.
        found = self.reshape(shape)
        self._id, found._id = found._id, self._id
        self._meta, found._meta = found._meta, self._meta

    @property
    def real(self) -> Self:
        return self._apply("real")

    @real.setter
    def real(self, value: Any) -> None:
        self._apply("real")[...] = value

    @property
    def imag(self) -> Self:
        return self._apply("imag")

    @imag.setter
    def imag(self, value: Any) -> None:
        if self.dtype.kind != "c":
            raise DTypeError(f"an array of {self.dtype} has no imaginary part to assign to")
        self._apply("imag")[...] = value

    # -- arithmetic that has no operator in the base class --------------------------------------

    def __divmod__(self, other: Any) -> tuple[ndarray, ...]:
        return tuple(several("divmod", (self, other)))

    def __rdivmod__(self, other: Any) -> tuple[ndarray, ...]:
        return tuple(several("divmod", (other, self)))

    def __imatmul__(self, other: Any) -> Self:
        self[...] = self @ other
        return self

    def conjugate(self) -> Self:
        return self._apply("conj")

    # -- shape ----------------------------------------------------------------------------------

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> Self:
        """Another shape over the same values.

        A view where the layout allows it; which it is, is known on the device alone.
        """
        wanted = shape[0] if len(shape) == 1 else shape
        wanted = wanted if isinstance(wanted, tuple | list) else (wanted,)
        lengths = tuple(map(operator.index, wanted))
        source = self.copy() if copy else self
        if order == "F":
            known = math.prod(n for n in lengths if n != -1)
            full = tuple(source.size // max(known, 1) if n == -1 else n for n in lengths)
            return source.transpose()._apply("reshape", shape=full[::-1]).transpose()
        if order not in ("C", "A"):
            raise ShapeError(f"order {order!r} is not C, F or A")
        return source._apply("reshape", shape=lengths)

    def transpose(self, *axes: Any) -> Self:
        return super().transpose(*(() if axes in ((None,), ((),)) else axes))

    def ravel(self, order: str = "C") -> Self:
        return self.reshape(-1, order="F" if order == "F" else "C")

    def flatten(self, order: str = "C") -> Self:
        return self.copy().ravel(order)

    def swapaxes(self, axis1: int, axis2: int) -> Self:
        axes = list(range(self.ndim))
        first, second = (_axis(axis, self.ndim) for axis in (axis1, axis2))
        axes[first], axes[second] = axes[second], axes[first]
        return self._apply("permute_dims", axes=tuple(axes))

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
        return single("diagonal", self, offset=offset, axis1=axis1, axis2=axis2)

    def squeeze(self, axis: Any = None) -> Self:
        return super().squeeze(integers(axis))

    def repeat(self, repeats: Any, axis: int | None = None) -> ndarray:
        return _do("repeat", self, repeats, axis)

    def view(self, dtype: Any = None) -> ndarray:
        """The same memory, read as another dtype of the same size."""
        if dtype is None:
            return self._apply("getitem", index=("...",))
        return single("view", self, dtype=wire(dtype))

    def astype(
        self,
        dtype: npt.DTypeLike,
        order: str = "K",
        casting: str = "unsafe",
        subok: Any = None,
        copy: bool = True,
    ) -> Self:
        """Cast to another dtype."""
        wanted = check_dtype(dtype)
        if not np.can_cast(self.dtype, wanted, casting):  # type: ignore[arg-type]
            raise DTypeError(f"{self.dtype} is not cast to {wanted} by the rule {casting}")
        if wanted.kind not in "cb" and self.dtype.kind == "c":
            return self._apply("real").astype(wanted)
        return super().astype(wanted, copy=copy)

    def copy(self, order: str = "C") -> Self:
        return self._apply("copy")

    def to_device(self, device: Any, /, *, stream: Any = None) -> ndarray:
        """The array on another device (itself, if it is there): of this session, of another
        server's."""
        if device == self.device:
            return self
        return own(self.copy_to(device))

    # -- reductions -----------------------------------------------------------------------------

    def sum(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return _reduce(self, "sum", axis, keepdims, dtype, out)

    def prod(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return _reduce(self, "prod", axis, keepdims, dtype, out)

    def mean(
        self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return _reduce(self, "mean", axis, keepdims, dtype, out)

    def max(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return _reduce(self, "max", axis, keepdims, None, out)

    def min(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return _reduce(self, "min", axis, keepdims, None, out)

    def all(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return _reduce(self, "all", axis, keepdims, None, out)

    def any(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return _reduce(self, "any", axis, keepdims, None, out)

    def ptp(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        return _reduce(self, "ptp", axis, keepdims, None, out)

    def argmax(
        self, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return _position(self, "argmax", axis, dtype, out, keepdims)

    def argmin(
        self, axis: int | None = None, dtype: Any = None, out: Any = None, keepdims: bool = False
    ) -> Any:
        return _position(self, "argmin", axis, dtype, out, keepdims)

    def var(
        self,
        axis: Any = None,
        dtype: Any = None,
        out: Any = None,
        ddof: float = 0,
        keepdims: bool = False,
    ) -> Any:
        return _reduce(self, "var", axis, keepdims, dtype, out, correction=ddof)

    def std(
        self,
        axis: Any = None,
        dtype: Any = None,
        out: Any = None,
        ddof: float = 0,
        keepdims: bool = False,
    ) -> Any:
        return _reduce(self, "std", axis, keepdims, dtype, out, correction=ddof)

    def cumsum(self, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
        return _running(self, "cumulative_sum", axis, dtype, out)

    def cumprod(self, axis: int | None = None, dtype: Any = None, out: Any = None) -> Any:
        return _running(self, "cumulative_prod", axis, dtype, out)

    def trace(
        self, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, out: Any = None
    ) -> ndarray:
        return _do("trace", self, offset, axis1, axis2, dtype, out)

    # -- order, choice --------------------------------------------------------------------------

    def sort(self, axis: int = -1, kind: Any = None) -> None:
        """Sort in place."""
        self[...] = single("sort", self, axis=operator.index(axis))

    def argsort(self, axis: int | None = -1, kind: Any = None) -> ndarray:
        return _do("argsort", self, axis, kind)

    def partition(self, kth: Any, axis: int = -1) -> None:
        """Partition in place."""
        self[...] = single("partition", self, kth=integers(kth), axis=operator.index(axis))

    def argpartition(self, kth: Any, axis: int | None = -1) -> ndarray:
        return _do("argpartition", self, kth, axis)

    def searchsorted(self, v: Any, side: str = "left", sorter: Any = None) -> ndarray:
        return _do("searchsorted", self, v, side, sorter)

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> ndarray:
        return _do("clip", self, min, max, out)

    def round(self, decimals: int = 0, out: Any = None) -> ndarray:
        return single("round", self, decimals=decimals, out=out)

    def take(self, indices: Any, axis: int | None = None, out: Any = None) -> ndarray:
        return _do("take", self, indices, axis, out)

    def put(self, indices: Any, values: Any, mode: str = "raise") -> None:
        FUNCTIONS["put"](self, indices, values, mode)

    def choose(self, choices: Any, out: Any = None, mode: str = "raise") -> ndarray:
        return _do("choose", self, choices, out, mode)

    def compress(self, condition: Any, axis: int | None = None, out: Any = None) -> ndarray:
        """The slices along an axis where the condition is true; waits for their number."""
        return _do("compress", condition, self, axis, out)

    def nonzero(self) -> tuple[ndarray, ...]:
        """The indices of what is not zero, an array for each axis; waits for their number."""
        found: tuple[ndarray, ...] = FUNCTIONS["nonzero"](self)
        return found

    def dot(self, b: Any, out: Any = None) -> ndarray:
        return _do("dot", self, b, out)


def own(array: RemoteArray) -> ndarray:
    """An array of a blocking session, made just now, as one of this namespace."""
    if type(array) is not ndarray:
        if not isinstance(array, BlockingArray):
            raise UnsupportedOp(
                "gpuremote.cupy works on blocking sessions (connect_sync); asyncio programs await "
                "get_async() and its like"
            )
        # It has the same slots, and no name yet: a second array would drop the handle twice.
        array.__class__ = ndarray
    return cast(ndarray, array)


def _do(name: str, *operands: Any) -> ndarray:
    """What a function of the namespace gives."""
    found: ndarray = FUNCTIONS[name](*operands)
    return found


def _unpickled(host: npt.NDArray[Any]) -> ndarray:
    array: ndarray = FUNCTIONS["asarray"](host)
    return array


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise np.exceptions.AxisError(axis, ndim)
    return axis % ndim


def _reduce(
    x: ndarray, name: str, axis: Any, keepdims: bool, dtype: Any, out: Any, **params: Any
) -> ndarray:
    if dtype is not None:
        params["dtype"] = wire(dtype)
    axes = integers(axis)
    return single(name, x, axis=axes, keepdims=True if keepdims else None, out=out, **params)


def _position(
    x: ndarray, name: str, axis: int | None, dtype: Any, out: Any, keepdims: bool
) -> ndarray:
    found = single(name, x, axis=integers(axis), keepdims=True if keepdims else None)
    if dtype is not None:
        found = found.astype(dtype)
    return found if out is None else store(found, out)


def _running(x: ndarray, name: str, axis: int | None, dtype: Any, out: Any) -> ndarray:
    params = {} if dtype is None else {"dtype": wire(dtype)}
    return single(name, x, axis=integers(axis), out=out, **params)
