"""Bytes between this host and remote storages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from gpuremote._dtypes import DTYPES
from gpuremote.torch._homes import Home
from gpuremote.torch._storages import handle_of, make_tensor
from gpuremote.torch._tier import native

__all__ = ["carry", "download", "host_bytes", "is_dense", "upload", "upload_many"]
_BYTES: Final = DTYPES["u1"]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie one after the other in some order, with nothing in between."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for step, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length == 1:
            continue
        if step != expected:
            return False
        expected *= length
    return True


def host_bytes(tensor: torch.Tensor) -> Any:
    """The memory of a dense tensor of the host as a NumPy array of bytes, in the order it has."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy()


def upload(place: Home, tensor: torch.Tensor, *, waits: bool = True) -> torch.Tensor:
    """A copy of a tensor of this host, whichever device it is on, on a remote device; laid out
    alike if that is dense.

    Without ``waits`` one in pinned memory may still be on its way at the end, and is kept until it
    has arrived. Whatever lies elsewhere may be changed as soon as this returns: a copy of it may be
    on its way then, as with CUDA.
    """
    host = tensor.detach().cpu().resolve_conj().resolve_neg()
    if not is_dense(host):
        host = host.contiguous()
    memory = host_bytes(host)
    device = place.session.devices[place.number]
    pinned = native is not None and memory.nbytes and host.is_pinned()
    if pinned:
        # Not to be given away, though it may be the transport's: the program goes on using it.
        memory.flags.writeable = False
    array = device.put_copied(memory) if waits or not pinned else device.put_lent(memory)
    form = (host.dtype, tuple(host.shape), host.stride(), 0, array.nbytes, False)
    made: torch.Tensor = make_tensor(place, array._id, form, array)
    return made


def upload_many(place: Home, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same of contiguous tensors of this host, none of them empty, in one wait."""
    arrays = place.session.devices[place.number].put_many([host_bytes(one) for one in tensors])
    made = []
    for one, array in zip(tensors, arrays, strict=True):
        form = (one.dtype, tuple(one.shape), one.stride(), 0, array.nbytes, False)
        made.append(make_tensor(place, array._id, form, array))
    return made


def _whole(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor, or a copy there, that is all of its storage; and its bytes."""
    source = tensor.detach()
    if source.is_conj() or source.is_neg():
        source = source.resolve_conj().resolve_neg()
    nbytes = source.numel() * source.element_size()
    if (
        source.storage_offset()
        or not is_dense(source)
        or source.untyped_storage().nbytes() != nbytes
    ):
        source = source.clone(memory_format=torch.contiguous_format)
    return source, nbytes


def carry(place: Home, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a remote tensor on another remote device; its bytes go from server to server."""
    source, nbytes = _whole(tensor)
    held = handle_of(source)
    core = held.home.core
    meta = core.metas.get((nbytes,), _BYTES, held.home.number)
    array = place.session.devices[place.number]._copy_of(core, held.number, meta)
    form = (source.dtype, tuple(source.shape), source.stride(), 0, nbytes, False)
    made: torch.Tensor = make_tensor(place, array._id, form, array)
    return made


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a remote tensor on the host, laid out alike if that is dense; waits for it."""
    source, nbytes = _whole(tensor)
    found = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype)
    held = handle_of(source)
    core = held.home.core
    if nbytes:
        core.wait(core.ask_bytes(held.number, host_bytes(found).data, "get"))
    # Of what nobody else will hear: a check that found something wrong, say, gives no result.
    failure = core.take_failures()
    if failure is not None:
        raise failure
    return found
