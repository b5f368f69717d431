"""The array of the namespace: NumPy's and CuPy's methods, on a remote device."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, cast

import numpy as np
import numpy.typing as npt

from gpuremote._dtypes import DTYPES
from gpuremote._types import Shape
from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.client.blocking import BlockingArray, BlockingDevice
from gpuremote.client.origin import caller
from gpuremote.cupy._methods import FUNCTIONS, Methods, axis_of, integers, wire
from gpuremote.errors import DTypeError, ImplicitTransfer, ShapeError, UnsupportedOp
from gpuremote.ops.catalogue import find
from gpuremote.ops.plan import params_key

__all__ = [
    "FUNCTIONS",
    "axis_of",
    "integers",
    "ndarray",
    "own",
    "several",
    "single",
    "store",
    "wire",
]

_MOST: Final = 1 << 14
_INT64: Final = 1 << 63
_frame = sys._getframe


def several(name: str, operands: Sequence[Any], /, **params: Any) -> list[ndarray]:
    """The results of an op; parameters that are None are left out."""
    given = {key: value for key, value in params.items() if value is not None}
    found: list[ndarray] = issue.apply(find(name), operands, given, ndarray)
    return found


def single(name: str, *operands: Any, out: Any = None, **params: Any) -> ndarray:
    """The one result of an op, or ``out`` with it in."""
    key, values = _key(name, operands, params)
    if key is None:
        found = several(name, operands, **params)[0]
        return found if out is None else store(found, out)
    core = operands[0]._core
    plan = core.short.get(key)
    if plan is None:
        found = several(name, operands, **params)[0]
        _remember(core, key, operands, name, params)
    else:
        number = core.issue(plan, plan.pack(plan.id, *values), caller(_frame(1)))
        found = ndarray(core, number, plan.result)
    return found if out is None else store(found, out)


def _key(name: str, operands: Sequence[Any], params: dict[str, Any]) -> tuple[Any, list[Any]]:
    """What a call is known by, and what travels with it; None where it has to be looked at more
    closely."""
    first = operands[0]
    if first.__class__ is not ndarray:
        return None, []
    core = first._core
    kinds: list[Any] = [name]
    values: list[Any] = []
    for operand in operands:
        kind = operand.__class__
        if kind is ndarray:
            if operand._core is not core:
                return None, []
            kinds.append(operand._meta)
            values.append(operand._id)
        elif kind is float or (kind is int and -_INT64 <= operand < _INT64):
            kinds.append("f" if kind is float else "i")
            values.append(operand)
        else:
            return None, []
    return (*kinds, *params_key(params)), values


def _remember(
    core: Any, key: Any, operands: Sequence[Any], name: str, params: dict[str, Any]
) -> None:
    """Note the plan that a call was issued by, if it has one result of a known shape."""
    spec, device = find(name), operands[0]._meta.device
    kinds = [
        o._meta if o.__class__ is ndarray else "f" if o.__class__ is float else "i"
        for o in operands
    ]
    given = {key: value for key, value in params.items() if value is not None}
    plan = core.plans.get((spec, device, *kinds, *params_key(given)) if given else (spec, *kinds))
    if plan is not None and plan.result is not None and plan.n_out == 1:
        if len(core.short) >= _MOST:
            core.short.clear()
        core.short[key] = plan


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


_GETITEM: Final = find("getitem")
_ELEMENT: Final[Any] = params_key({"index": ("i",)})
_RANGE: Final[Any] = params_key({"index": ("s110",)})


class ndarray(Methods):
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
        return own(device.put_copied(host))

    def __iter__(self) -> Iterator[Self]:  # type: ignore[override]
        """Over the first axis: views, no values."""
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(self.shape[0]))

    def __contains__(self, value: object) -> bool:  # type: ignore[override]
        return bool((self == value).any())

    def item(self, *index: Any, timeout: float | None = None) -> Any:
        """The only element, or the one at an index, as a Python scalar."""
        if not index:
            return super().item(timeout)
        place = index[0] if len(index) == 1 else index
        found = self[place] if isinstance(place, tuple) else self.reshape(-1)[place]
        return BlockingArray.item(found, timeout)

    def _apply(self, name: str, *, out: Any = None, **params: Any) -> Any:
        return single(name, self, out=out, **params)

    def __getitem__(self, index: Any) -> Any:
        kind = index.__class__
        if kind is int or (kind is slice and index.step is None):
            found = self._first(index, kind)
            if found is not None:
                return found
        return super().__getitem__(index)

    def _first(self, index: Any, kind: type) -> ndarray | None:
        """An element or a range of the first axis, if a plan is known for it: what loops are full
        of."""
        core, meta = self._core, self._meta
        if not meta.shape:
            return None
        length = meta.shape[0]
        if kind is int:
            template, ints, rest = _ELEMENT, [index], meta.shape[1:]
            if not -length <= index < length:
                return None
        else:
            start, stop = index.start, index.stop
            if start.__class__ is not int or stop.__class__ is not int:
                return None
            if not (-_INT64 < start < _INT64 and -_INT64 < stop < _INT64):
                return None
            template, ints = _RANGE, [start, stop]
            rest = (len(range(*index.indices(length))), *meta.shape[1:])
        plan = core.plans.get((_GETITEM, meta.device, meta, *("i",) * len(ints), *template))
        if plan is None:
            return None
        number = core.issue(plan, plan.pack(plan.id, self._id, *ints), caller(_frame(1)))
        return ndarray(core, number, core.metas.get(rest, meta.dtype, meta.device))

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
    def real(self) -> Any:
        return self._apply("real")

    @real.setter
    def real(self, value: Any) -> None:
        self._apply("real")[...] = value

    @property
    def imag(self) -> Any:
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

    def __imatmul__(self, other: Any) -> Any:
        self[...] = self @ other
        return self

    def conjugate(self) -> Any:
        return self._apply("conj")

    # -- shape ----------------------------------------------------------------------------------

    def reshape(self, *shape: Any, order: str = "C", copy: bool | None = None) -> Any:
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

    def transpose(self, *axes: Any) -> Any:
        return super().transpose(*(() if axes in ((None,), ((),)) else axes))

    def ravel(self, order: str = "C") -> Any:
        return self.reshape(-1, order="F" if order == "F" else "C")

    def flatten(self, order: str = "C") -> Any:
        return self.copy().ravel(order)

    def swapaxes(self, axis1: int, axis2: int) -> Any:
        axes = list(range(self.ndim))
        first, second = (axis_of(axis, self.ndim) for axis in (axis1, axis2))
        axes[first], axes[second] = axes[second], axes[first]
        return self._apply("permute_dims", axes=tuple(axes))

    def diagonal(self, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
        return single("diagonal", self, offset=offset, axis1=axis1, axis2=axis2)

    def squeeze(self, axis: Any = None) -> Any:
        return super().squeeze(integers(axis))

    def repeat(self, repeats: Any, axis: int | None = None) -> Any:
        return FUNCTIONS["repeat"](self, repeats, axis)

    def view(self, dtype: Any = None) -> Any:
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
    ) -> Any:
        """Cast to another dtype."""
        wanted = DTYPES[wire(dtype)]
        if casting != "unsafe" and not np.can_cast(self.dtype, wanted, casting):  # type: ignore[arg-type]
            raise DTypeError(f"{self.dtype} is not cast to {wanted} by the rule {casting}")
        if wanted.kind not in "cb" and self.dtype.kind == "c":
            return self._apply("real").astype(wanted)
        if not copy and wanted == self.dtype:
            return self
        return self._apply("astype", dtype=wire(wanted))

    def copy(self, order: str = "C") -> Any:
        return self._apply("copy")

    def to_device(self, device: Any, /, *, stream: Any = None) -> ndarray:
        """The array on another device (itself, if it is there): of this session, of another
        server's."""
        if device == self.device:
            return self
        return own(self.copy_to(device))


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
