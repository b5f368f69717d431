"""Storages that torch moves by itself, as it does where it loads what was saved."""

from __future__ import annotations

from typing import Any

import torch

from gpuremote.torch._homes import home
from gpuremote.torch._storages import ODD, handle_of
from gpuremote.torch._transfers import upload

__all__ = ["teach_storages"]


def teach_storages() -> None:
    """Let a storage of the host go to a remote device.

    torch would ask for an allocator, of which a device that is written in Python has none, without
    looking whether there is one.
    """
    plain = torch.storage._StorageBase.to

    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        target = torch.device(device)
        if target.type != "remote":
            return plain(self, device=target, non_blocking=non_blocking)
        if self.device.type == "remote":
            return self
        flat = torch.empty(0, dtype=torch.uint8).set_(self.untyped())
        return upload(home(target.index), flat).untyped_storage()

    torch.storage._StorageBase.to = to  # type: ignore[method-assign]
    _teach_metadata()


def _teach_metadata() -> None:
    """A tensor that was saved conjugated gets that by a flag, and not by an op."""
    module: Any = torch._utils
    plain = module.set_tensor_metadata

    def set_metadata(tensor: torch.Tensor, metadata: Any) -> None:
        plain(tensor, metadata)
        if tensor.device.type == "remote" and (tensor.is_conj() or tensor.is_neg()):
            ODD.add(handle_of(tensor).name)

    module.set_tensor_metadata = set_metadata
