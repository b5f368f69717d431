"""Ops that are no plain records: copies between devices, views, and what changes a tensor's layout
or gives a value to the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from gpuremote.torch._attention import ATTENTION
from gpuremote.torch._homes import current, home
from gpuremote.torch._kernels import Kernel
from gpuremote.torch._storages import ODD, handle_of
from gpuremote.torch._transfers import carry, download, upload

__all__ = ["FRONTED", "SPECIAL", "VIEWS"]

aten: Final = torch.ops.aten
_HOST: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

VIEWS: Final = (
    "aten::as_strided",
    "aten::view",
    "aten::view.dtype",
    "aten::view_as_real",
    "aten::view_as_complex",
    "aten::_reshape_alias",
    "aten::unfold",
)
"""Ops that only look at a tensor's layout: the host's kernels do that for any device."""


def _is_remote(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "remote"


_copy = Kernel(aten.copy_.default)
_to_copy = Kernel(aten._to_copy.default)


def _copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not _is_remote(self):
        return self.copy_(download(source))
    if not _is_remote(source):
        source = source.cpu()  # from whichever device of this host
        if not source.dim():
            return aten.fill_.Tensor(self, source) if self.numel() else self
        source = upload(handle_of(self).home, source, waits=not non_blocking)
    elif source.device != self.device:
        source = carry(handle_of(self).home, source)
    # With all arguments, as the part in C++ may learn of this call.
    _copy(self, source, non_blocking)
    return self


def _to(
    self: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    memory_format: torch.memory_format | None = None,
    non_blocking: bool = False,
    **_: Any,  # layout, pinning
) -> torch.Tensor:
    target = device or self.device
    if _is_remote(self) and target.type == "remote":
        named: int | None = target.index
        index = current() if named is None else named
        if index != self.device.index:
            self = carry(home(index), self)
        there: torch.Tensor = _to_copy(self, dtype=dtype, memory_format=memory_format)
        return there
    if _is_remote(self):
        local = download(self)
        return local.to(target, dtype or self.dtype, memory_format=_format(memory_format))
    if memory_format not in (None, torch.preserve_format):
        self = self.contiguous(memory_format=memory_format)
    # Converted on the side where that makes it smaller to carry.
    wanted = dtype or self.dtype
    if wanted.itemsize < self.dtype.itemsize:
        self = self.to(wanted)
    made = upload(home(target.index), self, waits=not non_blocking)
    return made if made.dtype == wanted else made.to(wanted)


def _format(memory_format: torch.memory_format | None) -> torch.memory_format:
    return torch.preserve_format if memory_format is None else memory_format


def _local_scalar_dense(self: torch.Tensor) -> Any:
    return download(self).item()


def _equal(self: torch.Tensor, other: torch.Tensor) -> bool:
    if self.shape != other.shape:
        return False
    return bool(torch.eq(self, other).all().item())


def _resize_(
    self: torch.Tensor, size: Any, *, memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    shape = tuple(size)
    like = torch.empty(shape, device="meta", dtype=self.dtype)
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        like = like.contiguous(memory_format=memory_format)
    storage, offset = self.untyped_storage(), self.storage_offset()
    needed = (offset + like.numel()) * self.element_size()
    if needed > storage.nbytes():
        place = handle_of(self).home
        wider = torch.empty(needed, dtype=torch.uint8, device=place.device)
        if storage.nbytes():
            old = torch.empty(0, dtype=torch.uint8, device=place.device)
            old.set_(storage, 0, (storage.nbytes(),), (1,))
            wider[: storage.nbytes()].copy_(old)
        storage = wider.untyped_storage()
    self.set_(storage, offset, shape, like.stride())
    return self


def _set_view(
    self: torch.Tensor, source: Any, offset: int, size: Any, stride: Any = ()
) -> torch.Tensor:
    shape = tuple(size)
    steps = tuple(stride) or torch.empty(shape, device="meta").stride()
    last = sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    needed = 0 if 0 in shape else (offset + last + 1) * self.element_size()
    if needed > source.nbytes():
        # The host's kernel would make the storage larger, and copy what is no memory.
        raise RuntimeError(
            f"set_: a view of {needed} bytes of a remote storage of {source.nbytes()}; make a "
            "larger tensor, or resize_ it"
        )
    op = aten.set_.source_Storage_storage_offset
    made: torch.Tensor = op.redispatch(_HOST, self, source, offset, shape, steps)
    return made


def _set_tensor(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return self.set_(
        source.untyped_storage(), source.storage_offset(), source.shape, source.stride()
    )


def _set_storage(self: torch.Tensor, source: Any) -> torch.Tensor:
    count = source.nbytes() // self.element_size()
    return self.set_(source, 0, (count,), (1,))


def _set_nothing(self: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=self.dtype, device=self.device)
    return _set_tensor(self, empty)


def _noted(op: Any) -> Callable[..., Any]:
    """A view that looks at its elements in another way: whoever uses that storage has to ask."""

    def view(self: torch.Tensor) -> Any:
        ODD.add(handle_of(self).name)
        return op.redispatch(_HOST, self)

    return view


def _never(*_: Any, **__: Any) -> bool:
    return False


def _may_take_data(self: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether ``self.data = other`` works: between the host and devices, as for any of torch's."""
    return self.layout == other.layout == torch.strided


FRONTED: Final = {"aten::copy_": _copy.kinds, "aten::_to_copy": _to_copy.kinds}
"""Those of the special ops that the part in C++ does itself where they are within one device; with
the kinds of their arguments."""

SPECIAL: Final[dict[str, Callable[..., Any]]] = {
    "aten::copy_": _copy_,
    "aten::_to_copy": _to,
    "aten::_local_scalar_dense": _local_scalar_dense,
    "aten::_conj": _noted(aten._conj.default),
    "aten::_neg_view": _noted(aten._neg_view.default),
    "aten::equal": _equal,
    "aten::resize_": _resize_,
    "aten::set_.source_Storage_storage_offset": _set_view,
    "aten::set_.source_Tensor": _set_tensor,
    "aten::set_.source_Storage": _set_storage,
    "aten::set_": _set_nothing,
    "aten::is_pinned": _never,
    "aten::_has_compatible_shallow_copy_type": _may_take_data,
    **ATTENTION,
}
