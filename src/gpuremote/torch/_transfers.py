"""Bytes between this host and remote storages."""

from __future__ import annotations

from typing import Any, Final

import torch

from gpuremote.torch._homes import Home
from gpuremote.torch._storages import handle_of, new_storage

__all__ = ["download", "host_bytes", "is_dense", "upload"]

_empty: Final = torch._C._acc.create_empty_tensor
_set: Final = torch.ops.aten.set_.source_Storage_storage_offset
_HOST: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


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


def upload(place: Home, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor of the host on a remote device, laid out alike if that is dense."""
    host = tensor.detach().resolve_conj().resolve_neg()
    if not is_dense(host):
        host = host.contiguous()
    array = place.session.devices[place.number].put(host_bytes(host))
    storage = new_storage(place, array._id, array.nbytes, array)
    made = _empty(tuple(host.shape), host.dtype)
    _set.redispatch(_HOST, made, storage, 0, host.shape, host.stride())
    return made


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a remote tensor on the host, laid out alike if that is dense; waits for it."""
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
