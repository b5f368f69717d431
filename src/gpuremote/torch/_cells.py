"""Cells of recurrent networks where the server's device has no ops of its own for them.

torch takes the fused ops of CUDA for every device that it does not know; other devices than CUDA's
get the same in plain ops. The equations are those of ``torch.nn.LSTM`` and ``torch.nn.GRU``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from gpuremote.torch._kernels import Kernel
from gpuremote.torch._storages import handle_of

__all__ = ["CELLS"]

aten: Final = torch.ops.aten
Tensor = torch.Tensor


def _lstm(
    inputs: Tensor, hidden: Tensor, cx: Tensor, bias: Tensor | None = None, other: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    gates = inputs + hidden if bias is None else inputs + hidden + bias + other
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def _lstm_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, work: Tensor, bias: bool
) -> tuple[Any, Any, Any]:
    if grad_hy is None and grad_cy is None:
        return None, None, None
    i, f, g, o = work.chunk(4, 1)
    tanh = cy.tanh()
    hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad_c = hy * o * (1 - tanh * tanh)
    if grad_cy is not None:
        grad_c = grad_c + grad_cy
    gates = torch.cat(
        [
            grad_c * g * i * (1 - i),
            grad_c * cx * f * (1 - f),
            grad_c * i * (1 - g * g),
            hy * tanh * o * (1 - o),
        ],
        1,
    )
    return gates, grad_c * f, gates.sum(0) if bias else None


def _gru(
    inputs: Tensor, hidden: Tensor, hx: Tensor, bias: Tensor | None = None, other: Any = None
) -> tuple[Tensor, Tensor]:
    if bias is not None:
        inputs, hidden = inputs + bias, hidden + other
    ir, iz, new = inputs.chunk(3, 1)
    hr, hz, hn = hidden.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (new + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


def _gru_backward(
    grad_hy: Tensor, work: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
    r, z, n, hx, hn = work.chunk(5, 1)
    grad_n = grad_hy * (1 - z) * (1 - n * n)
    grad_r = grad_n * hn * r * (1 - r)
    grad_z = grad_hy * (hx - n) * z * (1 - z)
    inputs = torch.cat([grad_r, grad_z, grad_n], 1)
    hidden = torch.cat([grad_r, grad_z, grad_n * r], 1)
    sums = (inputs.sum(0), hidden.sum(0)) if bias else (None, None)
    return inputs, hidden, grad_hy * z, *sums


def _unless_cuda(op: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    fused = Kernel(op)

    def cell(*args: Any, **keywords: Any) -> Any:
        known = next(value for value in args if isinstance(value, Tensor))
        chosen = fused if handle_of(known).home.kind == "cuda" else plain
        return chosen(*args, **keywords)

    return cell


CELLS: Final[dict[str, Callable[..., Any]]] = {
    "aten::_thnn_fused_lstm_cell": _unless_cuda(aten._thnn_fused_lstm_cell.default, _lstm),
    "aten::_thnn_fused_lstm_cell_backward_impl": _unless_cuda(
        aten._thnn_fused_lstm_cell_backward_impl.default, _lstm_backward
    ),
    "aten::_thnn_fused_gru_cell": _unless_cuda(aten._thnn_fused_gru_cell.default, _gru),
    "aten::_thnn_fused_gru_cell_backward": _unless_cuda(
        aten._thnn_fused_gru_cell_backward.default, _gru_backward
    ),
}
