"""Attention: by the kernel that torch would choose at the server.

For processors that depends on shapes, dtypes and what the program allows
(``torch.nn.attention.sdpa_kernel``), so this host's torch chooses. For CUDA it depends on the card
as well, so the server is asked, once for each kind of call. Elsewhere attention is made of plain
ops, of which each has a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from gpuremote.ops.torch_call import Operand
from gpuremote.torch._homes import Home, home
from gpuremote.torch._inference import view_of
from gpuremote.torch._kernels import Kernel
from gpuremote.torch._own import issue_own
from gpuremote.torch._storages import form_of, handle_of, make_tensor
from gpuremote.torch._transfers import download

__all__ = ["ATTENTION", "attend"]

aten: Final = torch.ops.aten
Tensor = torch.Tensor
MATH, FLASH, OVERRIDEABLE = 0, 1, 4
"""Of torch's ``SDPBackend``. For a device that it does not know torch takes FLASH for the CPU's
kernel, so CUDA's goes by the op that is there for devices of others."""
DOUBLES_DIFFER: Final = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""This torch has a wrong rule for what its kernel for processors gives beside the result."""
MOST: Final = 4096
"""Kinds of calls that are remembered."""
NONE: Final = 255
"""There is no kernel that is allowed; torch says so."""

_flash: Final = Kernel(aten._scaled_dot_product_flash_attention.default)
_flash_backward: Final = Kernel(aten._scaled_dot_product_flash_attention_backward.default)
_cudnn: Final = Kernel(aten._scaled_dot_product_cudnn_attention.default)
_efficient: Final = Kernel(aten._efficient_attention_forward.default)
_cudnn_backward: Final = Kernel(aten._scaled_dot_product_cudnn_attention_backward.default)


def _allowed() -> tuple[bool, ...]:
    """Flash, efficient, math, cuDNN: what the program allows."""
    get: Any = torch._C
    return (
        get._get_flash_sdp_enabled(),
        get._get_mem_efficient_sdp_enabled(),
        get._get_math_sdp_enabled(),
        get._get_cudnn_sdp_enabled(),
    )


def _choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    """Kernel of ``aten::_fused_sdp_choice``. For processors ``torch_native/attention.cpp`` is the
    same."""
    place = home(query.device.index)
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if place.kind == "cpu" and not (DOUBLES_DIFFER and query.dtype is torch.float64):
        q, k, v, *masks = map(_same_here, tensors)
        mask = masks[0] if masks else None
        if mask is not None and attn_mask is not None and attn_mask.requires_grad:
            mask.requires_grad_()  # the only one of which it asks that
        return torch._fused_sdp_choice(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if place.kind != "cuda":
        return MATH
    grad = torch.is_grad_enabled()
    wanted = tuple(grad and tensor.requires_grad for tensor in tensors)
    options = (dropout_p, is_causal, scale, enable_gqa, wanted, _allowed())
    kind = (_kind(query, key, value, attn_mask), options)
    found = place.choices.get(kind)
    if found is None:
        handles = [handle_of(tensor) for tensor in tensors]
        if any(handle.home is not place for handle in handles):
            return MATH  # whose ops say what is wrong with that
        views = tuple(view_of(tensor, place.views) for tensor in tensors)
        found = _ask(place, views, [handle.number for handle in handles], options)
        if found == FLASH:
            # Its kernel takes multiples of eight only; elsewhere torch pads what it is given.
            found = OVERRIDEABLE if query.shape[-1] % 8 == 0 else MATH
        if len(place.choices) >= MOST:
            place.choices.clear()
        place.choices[kind] = found
    return -1 if found == NONE else found


def _kind(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """What torch's rules for CUDA look at (its ``sdp_utils.cpp``). Not at the lengths themselves:
    in generation each word has one of its own, and would have to ask."""
    asked, there = query.shape[-2:-1], key.shape[-2:-1]
    kinds: list[Any] = []
    for tensor in (query, key, value):
        length = tensor.shape[-2] if tensor.dim() > 1 else 0
        small = length if length < 2 else -1
        aligned = [length % step == 0 for step in (8, 64, 128)]
        same = (tensor.shape[-2:-1] == asked, tensor.shape[-2:-1] == there, length >= 64)
        kinds += [tensor.shape[:-2], tensor.shape[-1:], small, *aligned, *same, *_memory(tensor)]
    if mask is not None:
        ends = [(n == 1, (n,) == asked, (n,) == there) for n in mask.shape[-2:]]
        kinds += [mask.shape[:-2], *ends, mask.shape[-1] % 8, *_memory(mask)]
    return tuple(kinds)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """How it lies there, as far as kernels ask."""
    stride = tensor.stride()[-1:]
    begin = tensor.storage_offset() * tensor.element_size() % 128
    turned = tensor.dim() > 2 and tensor.transpose(1, 2).is_contiguous()
    last = min(2, *stride, 2)
    return tensor.dtype, last, tensor.is_contiguous(), turned, begin


def _same_here(tensor: Tensor) -> Tensor:
    """A tensor of this host in which torch sees the same when it chooses a kernel for processors:
    shape, dtype and whether the last dimension lies together. Of one row."""
    stride = [0] * tensor.dim()
    if stride:
        stride[-1] = min(2, tensor.stride(-1))
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="cpu")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``aten::scaled_dot_product_attention`` where torch does not ask, as the part in C++ is not
    there to make it."""
    options: dict[str, Any] = {"scale": scale}
    own = query.dtype
    if all(_plain(tensor, query, own) for tensor in (query, key, value)) and (
        attn_mask is None or _plain(attn_mask, query, own, torch.bool)
    ):
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = zeros.masked_fill_(attn_mask.logical_not(), -torch.inf)
        given = (query, key, value)
        choice = _choose(
            *given, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if choice == FLASH:
            options["attn_mask"] = attn_mask
            return aten._scaled_dot_product_flash_attention_for_cpu(
                *given, dropout_p, is_causal, **options
            )[0]
        if choice == OVERRIDEABLE:
            return aten._scaled_dot_product_fused_attention_overrideable(
                *given, None, dropout_p, is_causal, **options
            )[0]
    options["enable_gqa"] = enable_gqa
    plain = aten.scaled_dot_product_attention.default.decompose
    return plain(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _plain(tensor: Tensor, query: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether it is on the same device, of such a dtype, and what it seems: not part of a graph
    that is traced, nor of a transform of ``torch.func``."""
    return (
        tensor.device == query.device
        and tensor.dtype in dtypes
        and not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _ask(
    place: Home, views: tuple[Operand, ...], handles: list[int], options: tuple[Any, ...]
) -> int:
    dropout, causal, scale, gqa, wanted, allowed = options
    slots: list[Any] = [["slot", k] for k in range(len(views))]
    if len(slots) == 3:
        slots.append(None)
    fixed = [dropout, causal, scale, gqa, ["list", *wanted], ["list", *allowed]]
    name = "gpuremote::choose_attention"
    number = issue_own(place, name, views, handles, arguments=[*slots, *fixed], size=1)
    answer = make_tensor(place, number, form_of(torch.uint8, (1,), (1,), 0, 1))
    return int(download(answer).item())


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    _debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    # Chosen only where there is no bias.
    arguments = (query, key, value, dropout_p, is_causal, False)
    return _flash.run(arguments, {"scale": scale})[1]


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _bias: Tensor | None,
    _wanted: Any,
    *rest: Any,
    scale: float | None = None,
) -> Any:
    arguments = (grad_out, query, key, value, *rest)
    return (*_flash_backward.run(arguments, {"scale": scale})[1], None)


def _cudnn_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    _sums: bool,
    *rest: Any,
    scale: float | None = None,
) -> Any:
    # Always with the sums: without, torch gives nothing where its rules say that there is a tensor.
    arguments = (query, key, value, attn_bias, True, *rest)
    return _cudnn.run(arguments, {"scale": scale})[1]


def _as_it_is(kernel: Kernel) -> Callable[..., Any]:
    return lambda *args, **keywords: kernel.run(args, keywords)[1]


ATTENTION: Final[dict[str, Callable[..., Any]]] = {
    "aten::_fused_sdp_choice": _choose,
    "aten::_scaled_dot_product_fused_attention_overrideable": _forward,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _backward,
    "aten::_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "aten::_efficient_attention_forward": _as_it_is(_efficient),
    "aten::_scaled_dot_product_cudnn_attention_backward": _as_it_is(_cudnn_backward),
}
