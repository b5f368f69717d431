"""Which of its kernels torch would use here for a call of scaled dot product attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["choose_attention"]

_ALLOWED: Final = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)
"""In the order in which a client says whether it allows them."""


def choose_attention(
    device: torch.device,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    gradients: Sequence[bool],
    allowed: Sequence[bool],
) -> torch.Tensor:
    """Number of the kernel, as a tensor of one byte (255: none that is allowed).

    Parameters
    ----------
    gradients : sequence of bool
        Which of the tensors want gradients at the client; some kernels can't give them.
    allowed : sequence of bool
        As ``torch.nn.attention.sdpa_kernel`` says there.
    """
    given = [tensor for tensor in (query, key, value, mask) if tensor is not None]
    kinds = [kind for kind, wanted in zip(_ALLOWED, allowed, strict=True) if wanted]
    with torch.enable_grad():
        q, k, v, *masks = (
            tensor.detach().requires_grad_(bool(wanted))
            for tensor, wanted in zip(given, gradients, strict=True)
        )
        with sdpa_kernel(kinds):
            found = torch._fused_sdp_choice(
                q,
                k,
                v,
                masks[0] if masks else None,
                dropout,
                causal,
                scale=scale,
                enable_gqa=grouped,
            )
    return torch.tensor([found & 255], dtype=torch.uint8, device=device)
