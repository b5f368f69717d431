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

from gpuremote.torch._tier import native

if TYPE_CHECKING:
    from gpuremote.torch._homes import Home

__all__ = [
    "HELD",
    "ODD",
    "SHIFT",
    "Form",
    "Held",
    "form_of",
    "give_back",
    "handle_of",
    "make_tensor",
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


_SWAPS: Final = hasattr(torch.UntypedStorage, "_swap_data_ptr_")
"""torch 2.11 has no such thing: the storage that a tensor was made with gets another address."""


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


class _Names:
    """``HELD`` where the storages are in C++."""

    def get(self, name: int) -> Any:
        return native.held(name)

    def __getitem__(self, name: int) -> Any:
        found = native.held(name)
        if found is None:
            raise KeyError(name)
        return found

    def __len__(self) -> int:
        return int(native.held_count())


class _EveryName:
    """``ODD`` there: kernels in Python run for calls that are new, and may as well ask."""

    def add(self, name: int) -> None:
        pass

    def __contains__(self, name: int) -> bool:
        return True


HELD: Final[Any] = {} if native is None else _Names()
"""Every storage that lives (``Held``), by its name."""
ODD: Final[Any] = set() if native is None else _EveryName()
"""Names of storages of which there may be conjugated or negated views. Few, if any: the others
need not be asked."""
_arrays: dict[int, Any] = {}
"""What owns the handle of a storage that was uploaded."""
_spare: deque[int] = deque()
"""Names that are free again."""
_names = itertools.count(FIRST)


def give_back(held: Held) -> None:
    """Let go of a storage's handle."""
    if _arrays.pop(held.name, None) is None:
        held.home.core.dropped.append(held.number)


def _gone(held: Held) -> None:
    """A storage has ended; in any thread, in the middle of anything."""
    name = held.name
    HELD.pop(name, None)
    give_back(held)
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


def _make_tensor(home: Home, number: int, form: Form, array: Any = None) -> torch.Tensor:
    dtype, shape, stride, offset, nbytes, plain = form
    tensor = _empty(shape, dtype)
    name = _new_name()
    if array is not None:
        _arrays[name] = array
    address = _construct(name << SHIFT, home.device, nbytes)
    if plain and _SWAPS:
        storage: Any = tensor.untyped_storage()
        storage._swap_data_ptr_(address)
    else:
        storage = address
        _set.redispatch(_HOST, tensor, storage, offset, shape, stride)
    _hold(storage, name, home, number)
    return tensor


def _make_tensor_there(home: Home, number: int, form: Form, array: Any = None) -> torch.Tensor:
    made: torch.Tensor = native.tensor(home.index, number, form, array)
    return made


make_tensor: Final = _make_tensor if native is None else _make_tensor_there
"""``make_tensor(home, number, form, array=None)``: the tensor of a storage that a record names;
``array`` owns the handle, if anything else than the storage does."""


def form_of(
    dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, nbytes: int
) -> Form:
    """What ``make_tensor`` wants to know of a tensor."""
    like = torch.empty(shape, dtype=dtype, device="meta")
    plain = stride == like.stride() and not offset and nbytes == like.numel() * dtype.itemsize > 0
    return dtype, shape, stride, offset, nbytes, plain


def handle_of(tensor: torch.Tensor) -> Held:
    """The storage of a remote tensor."""
    found: Held = HELD[(tensor.data_ptr() or tensor.untyped_storage().data_ptr()) >> SHIFT]
    return found
