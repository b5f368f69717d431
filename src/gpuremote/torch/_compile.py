"""``torch.compile``: backends that give back plain ops work; the default one generates code for a
device that it knows."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["refuse_inductor"]


def refuse_inductor() -> None:
    """Have torch's default backend say that it can't compile for a remote device, where it would
    otherwise fail in its midst."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    plain = wrapper.__call__

    def call(self: Any, model: Any, inputs: Any) -> Any:
        if any(isinstance(v, torch.Tensor) and v.device.type == "remote" for v in inputs):
            raise RuntimeError(
                "torch.compile's default backend (inductor) makes code for devices of this host; "
                "for remote ones give torch.compile(..., backend='aot_eager')"
            )
        return plain(self, model, inputs)

    wrapper.__call__ = call
