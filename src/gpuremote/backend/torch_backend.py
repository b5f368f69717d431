"""The backend ``torch``: on the accelerator that torch has here, else on the host's processors."""

from __future__ import annotations

from gpuremote.backend.base import Backend
from gpuremote.backend.torch_accelerator import AcceleratorTorchBackend, accelerator
from gpuremote.backend.torch_host import HostTorchBackend

__all__ = ["TorchBackend"]

TorchBackend: type[Backend] = AcceleratorTorchBackend if accelerator() else HostTorchBackend
