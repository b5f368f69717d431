"""One memory on the server under two names: a tensor of torch's, and an array of
``gpuremote.cupy``. Nothing is moved and nothing is waited for."""

from __future__ import annotations

import math
import weakref
from typing import Any, Final

import torch

from gpuremote._dtypes import DTYPES
from gpuremote._types import Shape
from gpuremote.client import issue
from gpuremote.client.blocking import BlockingArray, Session
from gpuremote.errors import DeviceMismatch, DTypeError
from gpuremote.ops.catalogue import find
from gpuremote.torch._homes import Home, home, opened
from gpuremote.torch._storages import form_of, handle_of, make_tensor

__all__ = ["as_array", "as_tensor", "session"]

_NUMPY: Final = {
    getattr(torch, dtype.name): dtype for dtype in DTYPES.values() if hasattr(torch, dtype.name)
}
_TORCH: Final = {dtype: kind for kind, dtype in _NUMPY.items()}
_given: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()
"""Arrays that tensors were made of, by session and handle."""


class _Lent(BlockingArray):
    """Somebody else's handle: it is not given back from here."""

    __slots__ = ()

    def __del__(self) -> None:
        pass


def session(index: int = 0) -> Session:
    """The session of ``remote:index``.

    ``gpuremote.cupy.use(gpuremote.torch.session())`` makes its arrays where the tensors are, which
    is what sharing needs.
    """
    return home(index).session


def as_array(tensor: torch.Tensor) -> Any:
    """A remote tensor as an array (``gpuremote.cupy.ndarray``) in the same memory.

    What either writes the other sees. The memory lives as long as one of them.

    Parameters
    ----------
    tensor : torch.Tensor
        Contiguous, of a server whose backend runs NumPy's ops too (torch on a host).

    Raises
    ------
    DeviceMismatch
        Not a remote tensor.
    DTypeError
        A dtype that NumPy has not (bfloat16).
    ValueError
        Not contiguous.
    """
    if tensor.device.type != "remote":
        raise DeviceMismatch(f"a tensor on {tensor.device} has no memory on a server")
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise DTypeError(f"an array can't be of {tensor.dtype}")
    source = tensor.detach()
    if not source.is_contiguous() or source.is_conj() or source.is_neg():
        raise ValueError("the tensor is not contiguous, or conjugated: take tensor.contiguous()")
    held = handle_of(source)
    place: Home = held.home
    core = place.core
    array_type: Any = place.session.devices[place.number].xp.ndarray
    _unwatched(core)

    def apply(name: str, x: Any, *numbers: int, **params: Any) -> Any:
        return issue.apply(find(name), (x, *numbers), params, array_type)[0]

    base = _given.get((id(core), held.number))
    if base is None:
        meta = core.metas.get((int(source.untyped_storage().nbytes()),), DTYPES["u1"], place.number)
        base = _Lent(core, held.number, meta)
    else:
        base = apply("view", apply("reshape", base, shape=(-1,)), dtype="u1")
    begin = int(source.storage_offset()) * dtype.itemsize
    end = begin + math.prod(source.shape) * dtype.itemsize
    part = apply("getitem", base, begin, end, index=("s110",))
    part._meta = core.metas.get((end - begin,), DTYPES["u1"], place.number)
    typed = apply("view", part, dtype=dtype.str.lstrip("<|="))
    return apply("reshape", typed, shape=tuple(source.shape))


def as_tensor(array: Any) -> torch.Tensor:
    """An array of a remote device of torch's (see :func:`session`) as a tensor in the same memory.

    What either writes the other sees, if the array is contiguous on the device: one that is not
    (a transposed view) fails with the first op.

    Raises
    ------
    DeviceMismatch
        The array is of another session.
    DTypeError
        A dtype that torch has not.
    """
    core, meta = array._core, array._meta
    place = next((p for p in opened() if p.core is core and p.number == meta.device), None)
    if place is None:
        raise DeviceMismatch(
            "the array is of another session than torch's remote devices: make it on "
            "gpuremote.torch.session().devices[0].xp, or copy_to() that device"
        )
    kind = _TORCH.get(meta.dtype)
    if kind is None:
        raise DTypeError(f"a tensor can't be of {meta.dtype}")
    _unwatched(core)
    form = form_of(kind, meta.shape, _steps(meta.shape), 0, meta.nbytes)
    _given[id(core), array._id] = array
    made: torch.Tensor = make_tensor(place, array._id, form, array)
    return made


def _steps(shape: Shape) -> Shape:
    """Strides of a contiguous tensor, in elements, as torch has them."""
    found: list[int] = []
    step = 1
    for length in reversed(shape):
        found.append(step)
        step *= max(length, 1)
    return tuple(reversed(found))


def _unwatched(core: Any) -> None:
    """From now on arrays may change without an op of theirs: nothing that was known of their
    values can be relied on. Not a number is unlike itself."""
    core.writes = math.nan
