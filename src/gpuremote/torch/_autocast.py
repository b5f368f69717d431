"""Mixed precision: what runs in the lower one, what in float32, and what in the widest there is.

The lists are those of torch for CUDA (``ATen/autocast_mode.h``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

__all__ = ["register_autocast"]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LOWER: Final = _names(
    """
    _convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum
    mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot lstm_cell gru_cell
    rnn_tanh_cell rnn_relu_cell _thnn_fused_lstm_cell _thnn_fused_gru_cell
    scaled_dot_product_attention
    """
)
FULL: Final = _names(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm
    frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa prod prod.dim_int softmax.int log_softmax.int cumprod cumsum
    linalg_vector_norm linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList norm.Scalar
    norm.ScalarOpt_dim
    """
)
WIDEST: Final = _names(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
    """
)
_KEY: Final = "AutocastPrivateUse1"


def register_autocast(library: Any, fallback: Any) -> None:
    """Register with a library for ``aten``, and one for every op."""
    fallback.fallback(torch.library.fallthrough_kernel, _KEY)
    for names, choose in ((LOWER, _lower), (FULL, _full), (WIDEST, _widest)):
        for name in names:
            base, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, base), overload or "default")
            library.impl(name, _casting(op, choose), _KEY)


def _casting(op: Any, choose: Callable[[list[torch.Tensor]], torch.dtype]) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

    def cast(*args: Any, **keywords: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            dtype = choose(_eligible((*args, *keywords.values())))
            return op(
                *(_cast(value, dtype) for value in args),
                **{name: _cast(value, dtype) for name, value in keywords.items()},
            )

    return cast


def _lower(_: list[torch.Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype("remote")


def _full(_: list[torch.Tensor]) -> torch.dtype:
    return torch.float32


def _widest(tensors: list[torch.Tensor]) -> torch.dtype:
    full = any(tensor.dtype == torch.float32 for tensor in tensors)
    return torch.float32 if full else torch.get_autocast_dtype("remote")


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.device.type == "remote"
        and value.dtype != torch.float64
    )


def _eligible(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _eligible(value)
        elif _is_eligible(value):
            found.append(value)
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if _is_eligible(value) and value.dtype != dtype else value
