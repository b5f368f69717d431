"""Arrays that live on a remote device: shape and dtype here, values there."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.client import issue
from gpuremote.client.core import VIEW, Core
from gpuremote.client.operators import binary, inplace, reflected, unary
from gpuremote.client.recording import Handle
from gpuremote.client.waits import Wait
from gpuremote.errors import (
    DTypeError,
    ImplicitTransfer,
    IndexOutOfBounds,
    OpError,
    ShapeError,
)
from gpuremote.memory.host import copy_bytes, output_view
from gpuremote.ops.catalogue import find
from gpuremote.ops.indexing import (
    GETITEM,
    ParsedIndex,
    check_value_shape,
    parse_index,
    setitem_shape,
)
from gpuremote.ops.meta import check_dtype
from gpuremote.wire.batch import Op

if TYPE_CHECKING:
    from gpuremote.client.device import Device

__all__ = ["RemoteArray"]

Axis = int | tuple[int, ...] | None


class RemoteArray(Handle):
    """An array on a remote device.

    Made by a device (``put``, ``zeros``, ...) or by an op on other arrays, never directly. Ops
    return at once: the result's shape and dtype are known here, its values come into being
    there. Only asking for values waits; how is up to the session (see its subclasses).

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    ndim, size, nbytes : int
    device : Device
    """

    __slots__ = ("__weakref__",)

    _core: Core

    # NumPy's operators leave the work to ours, also when the host operand comes first.
    __array_priority__ = 1000.0

    # -- what is known here ---------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        return self._meta.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._meta.dtype

    @property
    def ndim(self) -> int:
        return self._meta.ndim

    @property
    def size(self) -> int:
        return self._meta.size

    @property
    def nbytes(self) -> int:
        return self._meta.nbytes

    @property
    def itemsize(self) -> int:
        return self._meta.dtype.itemsize

    @property
    def device(self) -> Device[Any]:
        device: Device[Any] = self._core.devices[self._meta.device]
        return device

    def __len__(self) -> int:
        if not self._meta.shape:
            raise TypeError("len() of a 0-d array")
        return self._meta.shape[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} shape={self.shape} dtype={self.dtype} on {self.device}>"

    def __reduce__(self) -> NoReturn:
        raise ImplicitTransfer(
            "a remote array can't be pickled: it is a name within one session; get() its values"
        )

    # -- arithmetic -----------------------------------------------------------------------------

    __add__, __radd__, __iadd__ = binary("add"), reflected("add"), inplace("add")
    __sub__, __rsub__ = binary("subtract"), reflected("subtract")
    __isub__ = inplace("subtract")
    __mul__, __rmul__ = binary("multiply"), reflected("multiply")
    __imul__ = inplace("multiply")
    __truediv__, __rtruediv__ = binary("divide"), reflected("divide")
    __itruediv__ = inplace("divide")
    __floordiv__, __rfloordiv__ = binary("floor_divide"), reflected("floor_divide")
    __ifloordiv__ = inplace("floor_divide")
    __mod__, __rmod__ = binary("remainder"), reflected("remainder")
    __imod__ = inplace("remainder")
    __pow__, __rpow__, __ipow__ = binary("power"), reflected("power"), inplace("power")
    __and__, __rand__ = binary("bitwise_and"), reflected("bitwise_and")
    __iand__ = inplace("bitwise_and")
    __or__, __ror__, __ior__ = (
        binary("bitwise_or"),
        reflected("bitwise_or"),
        inplace("bitwise_or"),
    )
    __xor__, __rxor__ = binary("bitwise_xor"), reflected("bitwise_xor")
    __ixor__ = inplace("bitwise_xor")
    __lshift__, __rlshift__ = binary("bitwise_left_shift"), reflected("bitwise_left_shift")
    __ilshift__ = inplace("bitwise_left_shift")
    __rshift__, __rrshift__ = binary("bitwise_right_shift"), reflected("bitwise_right_shift")
    __irshift__ = inplace("bitwise_right_shift")
    __matmul__, __rmatmul__ = binary("matmul"), reflected("matmul")
    __eq__, __ne__ = binary("equal"), binary("not_equal")
    __lt__, __le__ = binary("less"), binary("less_equal")
    __gt__, __ge__ = binary("greater"), binary("greater_equal")
    __neg__, __pos__, __abs__ = unary("negative"), unary("positive"), unary("abs")
    __invert__ = unary("bitwise_invert")
    conj = unary("conj")
    __hash__ = None  # type: ignore[assignment]

    # -- shape ----------------------------------------------------------------------------------

    @property
    def T(self) -> Self:
        """The axes in reverse order; a view."""
        return self.transpose()

    @property
    def mT(self) -> Self:
        """The last two axes swapped; a view."""
        if self.ndim < 2:
            raise ShapeError(f"mT needs two axes, not {self.ndim}", op="permute_dims")
        axes = (*range(self.ndim - 2), self.ndim - 1, self.ndim - 2)
        return self._apply("permute_dims", axes=axes)

    @property
    def real(self) -> Self:
        return self._apply("real")

    @property
    def imag(self) -> Self:
        return self._apply("imag")

    def transpose(self, *axes: int | tuple[int, ...]) -> Self:
        """The axes in another order (reversed without arguments); a view."""
        order = _flat(axes) or tuple(range(self.ndim))[::-1]
        return self._apply("permute_dims", axes=order)

    def reshape(self, *shape: int | tuple[int, ...]) -> Self:
        """Another shape over the same values; a view where the layout allows it."""
        return self._apply("reshape", shape=_flat(shape))

    def ravel(self) -> Self:
        """One axis over the same values; a view where the layout allows it."""
        return self._apply("reshape", shape=(-1,))

    def flatten(self) -> Self:
        """A copy with one axis."""
        return self.copy().ravel()

    def squeeze(self, axis: Axis = None) -> Self:
        """Without axes of length 1; a view."""
        if axis is None:
            axis = tuple(k for k, length in enumerate(self.shape) if length == 1)
        return self._apply("squeeze", axis=axis)

    def astype(self, dtype: npt.DTypeLike, *, copy: bool = True) -> Self:
        """Cast; with ``copy=False`` an array that has the dtype already is returned as it is."""
        wanted = check_dtype(dtype)
        if not copy and wanted == self.dtype:
            return self
        return self._apply("astype", dtype=wanted.str.lstrip("<|="))

    def copy(self) -> Self:
        return self._apply("copy")

    # -- reductions -----------------------------------------------------------------------------

    def sum(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> Self:
        return self._apply("sum", **_reduction(axis, keepdims, dtype))

    def prod(
        self, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> Self:
        return self._apply("prod", **_reduction(axis, keepdims, dtype))

    def mean(self, axis: Axis = None, *, keepdims: bool = False) -> Self:
        return self._apply("mean", **_reduction(axis, keepdims))

    def max(self, axis: Axis = None, *, keepdims: bool = False) -> Self:
        return self._apply("max", **_reduction(axis, keepdims))

    def min(self, axis: Axis = None, *, keepdims: bool = False) -> Self:
        return self._apply("min", **_reduction(axis, keepdims))

    def all(self, axis: Axis = None, *, keepdims: bool = False) -> Self:
        return self._apply("all", **_reduction(axis, keepdims))

    def any(self, axis: Axis = None, *, keepdims: bool = False) -> Self:
        return self._apply("any", **_reduction(axis, keepdims))

    def var(self, axis: Axis = None, *, ddof: float = 0, keepdims: bool = False) -> Self:
        return self._apply("var", correction=ddof, **_reduction(axis, keepdims))

    def std(self, axis: Axis = None, *, ddof: float = 0, keepdims: bool = False) -> Self:
        return self._apply("std", correction=ddof, **_reduction(axis, keepdims))

    def argmax(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        return self._apply("argmax", **_reduction(axis, keepdims))

    def argmin(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        return self._apply("argmin", **_reduction(axis, keepdims))

    def cumsum(self, axis: int | None = None) -> Self:
        flat = self if axis is not None or self.ndim == 1 else self.ravel()
        return flat._apply("cumulative_sum", axis=0 if axis is None else axis)

    def dot(self, other: Any) -> RemoteArray:
        result: RemoteArray = self @ other
        return result

    # -- indexing -------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Self:
        """A view for ints, slices, ``...`` and None; a copy for arrays of ints.

        With a boolean mask the shape of the result depends on values, which costs a round trip:
        ``x[mask]`` waits in a blocking session; in an asyncio session use
        ``await x.compress(mask)``.
        """
        parsed = parse_index(self._meta, index)
        arrays = [self._index_array(a) for a in parsed.arrays]
        op = GETITEM[parsed.kind]
        shape = self._indexed_shape(parsed, arrays, op) if parsed.ints else None
        found: Self
        (found,) = issue.apply(find(op), (self, *parsed.ints, *arrays), {"index": parsed.template})
        if parsed.kind == "mask":
            return self._settle(found)
        if shape is not None:
            found._meta = self._core.metas.get(shape, self.dtype, self._meta.device)
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        parsed = parse_index(self._meta, index)
        if isinstance(value, (np.ndarray, list, tuple)) and np.ndim(value):
            raise ImplicitTransfer(
                "assigning host values to a part of a remote array: upload them with "
                "device.put(...) or asarray(...) first",
                op="setitem",
            )
        arrays = [self._index_array(a) for a in parsed.arrays]
        if parsed.ints:
            self._indexed_shape(parsed, arrays, "setitem", getattr(value, "shape", ()))
        issue.apply(_SETITEM, (self, value, *parsed.ints, *arrays), {"index": parsed.template})

    def __iter__(self) -> NoReturn:
        raise ImplicitTransfer(
            "iterating over a remote array would fetch it element by element; get() it first, or "
            "index it"
        )

    def __contains__(self, value: object) -> NoReturn:
        raise ImplicitTransfer("'in' would fetch the array; compare, reduce with any(), and get()")

    def _indexed_shape(
        self, parsed: ParsedIndex, arrays: Sequence[RemoteArray], op: str, value: Shape = ()
    ) -> Shape:
        """Shape of what an index names, and whether ``value`` fits in there. Before anything is
        issued: the rule of the op, which a plan keeps, does not know the integers."""
        shapes = [array.shape for array in arrays]
        try:
            shape = setitem_shape(self.shape, parsed.template, parsed.ints, shapes)
            if value and parsed.kind != "mask":
                check_value_shape(shape, value)
            return shape
        except OpError as error:
            error.op = op
            raise

    def _index_array(self, index: Any) -> RemoteArray:
        """An index array on this array's device; host ones are small and go with the batch."""
        if isinstance(index, RemoteArray):
            return index
        host = np.asarray(index)
        uploaded: RemoteArray = self.device._upload_small(host)
        return uploaded

    def _settle(self, found: Self) -> Self:
        """Replace the bounds of a shape that depends on values by what the server says."""
        raise NotImplementedError

    def _masked(self, mask: RemoteArray) -> Self:
        """Issue ``self[mask]``; the shape of the result is still only a bound."""
        parsed = parse_index(self._meta, mask)
        (found,) = issue.apply(
            find(GETITEM["mask"]), (self, *parsed.arrays), {"index": parsed.template}
        )
        masked: Self = found
        return masked

    def _ask_meta(self) -> Wait:
        return self._core.ask(Op.META, self._id, kind="shape", name="shape")

    def _set_meta(self, answer: Any) -> None:
        shape, dtype = answer
        self._meta = self._core.metas.get(tuple(shape), check_dtype(dtype), self._meta.device)

    # -- other places ---------------------------------------------------------------------------

    def copy_to(self, device: Device[Any]) -> RemoteArray:
        """A copy on another device: of this session, of another session, of another server.

        Between two servers the bytes go directly from one to the other. Nothing is waited for;
        if the copy fails, the result does.
        """
        copied: RemoteArray = device._take_copy(self)
        return copied

    # -- NumPy's protocols ----------------------------------------------------------------------

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        from gpuremote.client.numpy_protocol import array_ufunc

        return array_ufunc(self, ufunc, method, inputs, kwargs)

    def __array_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Any, kwargs: Any
    ) -> Any:
        from gpuremote.client.numpy_protocol import array_function

        return array_function(function, args, kwargs)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """Follows ``GPUREMOTE_DOWNLOAD``: an error unless it says otherwise."""
        policy = self._core.download_policy
        if policy == "error" or copy is False:
            raise ImplicitTransfer(
                "this would copy the array to the host without being asked: call get(), or set "
                "GPUREMOTE_DOWNLOAD=warn or allow"
            )
        if policy == "warn":
            warnings.warn(f"implicit download of {self.nbytes} bytes", RuntimeWarning, stacklevel=2)
        host = self._download()
        self._core.stats.implicit_downloads += 1
        return host if dtype is None else host.astype(dtype)

    def _download(self) -> npt.NDArray[Any]:
        raise NotImplementedError

    # -- for the package ------------------------------------------------------------------------

    def _apply(self, name: str, **params: Any) -> Self:
        (result,) = issue.apply(find(name), (self,), params)
        found: Self = result
        return found

    def _host_target(self, out: Any) -> tuple[Any, memoryview]:
        """Where ``get`` writes: the object to return and its bytes."""
        meta = self._meta
        host = np.empty(meta.shape, meta.dtype) if out is None else out
        return host, output_view(host, meta.shape, meta.dtype)

    def _read_near(self, view: memoryview) -> bool:
        """Fill ``view`` without asking, if the bytes are known to lie in memory of this process."""
        core = self._core
        if self._id not in core.near_arrays or (source := core.near(self._id)) is None:
            return False
        copy_bytes(view.cast("B"), source)
        return True

    def _ask_bytes(self, view: memoryview, kind: str = "get") -> Any:
        return self._core.ask_bytes(self._id, view, kind)

    def _ask_view(self) -> Wait:
        return self._core.ask(Op.GET, self._id, kind=VIEW, name="get")

    def _read_only(self, memory: memoryview) -> npt.NDArray[Any]:
        """What the answer to ``_ask_view`` brought, as an array."""
        meta = self._meta
        flat = np.frombuffer(memory, meta.dtype) if meta.nbytes else np.empty(0, meta.dtype)
        found = flat.reshape(meta.shape)
        found.flags.writeable = False
        return found

    def _scalar_view(self) -> tuple[npt.NDArray[Any], memoryview]:
        if self.size != 1:
            raise ShapeError(
                f"only an array of one element turns into a Python scalar, not one of shape "
                f"{self.shape}"
            )
        host = np.empty((), self.dtype)
        return host, output_view(host)

    def _index_value(self, value: Any) -> int:
        if self.dtype.kind not in "iub":
            raise DTypeError(f"an array of {self.dtype} is no index")
        return operator.index(value)


_SETITEM = find("setitem")


def _flat(values: tuple[Any, ...]) -> tuple[int, ...]:
    """Accept ``f(2, 3)`` and ``f((2, 3))``."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = tuple(values[0])
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise IndexOutOfBounds(f"axes and lengths are integers: {error}") from error


def _reduction(axis: Any, keepdims: bool, dtype: npt.DTypeLike | None = None) -> dict[str, Any]:
    params: dict[str, Any] = {}
    if axis is not None:
        params["axis"] = tuple(axis) if isinstance(axis, (tuple, list)) else operator.index(axis)
    if keepdims:
        params["keepdims"] = True
    if dtype is not None:
        params["dtype"] = check_dtype(dtype).str.lstrip("<|=")
    return params
