"""Remote storages on this side: a name instead of memory.

A storage of the device ``remote`` has an address that no memory has, made from a number that
names it here; a table leads from there to the handle in its session. Tensors are views of
storages as everywhere in torch, so views, sharing and the end of the last reference are torch's
own business.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

if TYPE_CHECKING:
    from gpuremote.torch._homes import Home

__all__ = [
    "HELD",
    "ODD",
    "SHIFT",
    "Form",
    "Held",
    "form_of",
    "handle_of",
    "make_tensor",
    "new_storage",
]

SHIFT: Final = 36
"""Bits of an address within a storage: two storages of up to 64 GiB never seem to overlap."""
FIRST: Final = 1 << 11
"""Times 2**36 is the first address that no process can have: whoever follows it by mistake faults,
and does not read or write something else."""

Form: TypeAlias = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int, int, bool]
"""dtype, shape, stride, offset in elements, bytes of the storage; and whether it is contiguous and
all of its storage."""
_construct: Final = torch._C._construct_storage_from_data_pointer
_empty: Final = torch._C._acc.create_empty_tensor
_set: Final = torch.ops.aten.set_.source_Storage_storage_offset
_HOST: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""The host's kernels: those that look at a tensor's layout only work for any device."""


class Held(weakref.ref[Any]):
    """A storage, as long as it lives.

    Attributes
    ----------
    name : int
        Its number here; its address is ``name << SHIFT``.
    home : Home
    number : int
        Its handle in the session.
    """

    __slots__ = ("home", "name", "number")

    home: Home
    name: int
    number: int


HELD: Final[dict[int, Held]] = {}
"""Every storage that lives, by its name."""
ODD: Final[set[int]] = set()
"""Names of storages of which there may be conjugated or negated views. Few, if any: the others
need not be asked."""
_arrays: dict[int, Any] = {}
"""What owns the handle of a storage that was uploaded."""
_spare: deque[int] = deque()
"""Names that are free again."""
_names = itertools.count(FIRST)


def _gone(held: Held) -> None:
    """A storage has ended; in any thread, in the middle of anything."""
    name = held.name
    HELD.pop(name, None)
    if _arrays.pop(name, None) is None:
        held.home.core.dropped.append(held.number)
    ODD.discard(name)
    _spare.append(name)


def _new_name() -> int:
    # Each of the two is one step, so that threads need no lock.
    try:
        return _spare.popleft()
    except IndexError:
        return next(_names)


def _hold(storage: Any, name: int, home: Home, number: int) -> None:
    held = Held(storage, _gone)
    held.name = name
    held.home = home
    held.number = number
    HELD[name] = held


def new_storage(home: Home, number: int, nbytes: int, array: Any = None) -> Any:
    """The storage that a handle names; ``array`` owns the handle, if anything else does."""
    name = _new_name()
    storage = _construct(name << SHIFT, home.device, nbytes)
    if array is not None:
        _arrays[name] = array
    _hold(storage, name, home, number)
    return storage


def make_tensor(home: Home, number: int, form: Form) -> torch.Tensor:
    """The tensor of a storage that a record names."""
    dtype, shape, stride, offset, nbytes, plain = form
    tensor = _empty(shape, dtype)
    if not plain:
        _set.redispatch(_HOST, tensor, new_storage(home, number, nbytes), offset, shape, stride)
        return tensor
    name = _new_name()
    storage: Any = tensor.untyped_storage()
    storage._swap_data_ptr_(_construct(name << SHIFT, home.device, nbytes))
    _hold(storage, name, home, number)
    return tensor


def form_of(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, nbytes: int
) -> Form:
    """What ``make_tensor`` wants to know of a tensor."""
    like = torch.empty(shape, dtype=dtype, device="meta")
    plain = stride == like.stride() and not offset and nbytes == like.numel() * dtype.itemsize > 0
    return dtype, shape, stride, offset, nbytes, plain


def handle_of(tensor: torch.Tensor) -> Held:
    """The storage of a remote tensor."""
    return HELD[(tensor.data_ptr() or tensor.untyped_storage().data_ptr()) >> SHIFT]
