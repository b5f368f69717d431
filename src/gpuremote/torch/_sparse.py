"""Sparse tensors (COO) on remote devices: torch's own, of which indices and values are plain remote
tensors.

torch does what is the same for every device with ops on these two (``SHARED``), so its kernels for
the host serve. Arithmetic is in ``_coo``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from gpuremote.torch import _coo
from gpuremote.torch._kernels import Kernel
from gpuremote.torch._tier import native

__all__ = ["FROM_DENSE", "FRONTED_SPARSE", "SPARSE"]

aten: Final = torch.ops.aten
Tensor = torch.Tensor
_HOST: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SPARSE_HOST: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.SparseCPU)

UNARY: Final = (
    "abs sgn asinh atanh asin atan ceil erf expm1 floor frac nan_to_num log1p rad2deg deg2rad neg "
    "round sin sinh sqrt tan tanh trunc erfinv sign"
)
"""Ops on the values alone; each has a form in place and one with ``out``."""
SHARED: Final = (
    # What a tensor is made of.
    "_sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors sparse_dim _dimI "
    "dense_dim _dimV _nnz is_coalesced _coalesced_ _indices _values indices values "
    "empty.memory_format empty_like zeros.out zero_ clone copy_ copy_sparse_to_sparse_ "
    "sparse_resize_ sparse_resize_and_clear_ resize_as_sparse_ _to_sparse _to_sparse.sparse_dim "
    "_to_dense view_as_real view_as_complex "
    # Where its elements are.
    "_sparse_broadcast_to cat narrow_copy permute unsqueeze "
    # Its values.
    "pow.Tensor_Scalar pow.Tensor_Scalar_out conj_physical.out relu relu_ threshold_backward "
    "threshold_backward.grad_input signbit signbit.out isnan isinf isposinf isposinf.out isneginf "
    "isneginf.out any sum sum.dim_IntList native_norm native_norm.ScalarOpt_dim_dtype "
    "norm.ScalarOpt_dim_dtype norm.ScalarOpt_dim mm mv"
)
"""Ops whose kernel is one for the host and for CUDA: it calls ops on indices and values, and looks
at no memory. As in torch's ``native_functions.yaml``."""


def _never(*_: Any, **__: Any) -> bool:
    return False


def _on(op: Any, keys: Any) -> Callable[..., Any]:
    """The kernel that torch has for these keys, with the device of what it is given as the current
    one: that is where a sparse tensor is, whatever its parts say."""
    redispatch = op.redispatch
    change: Any = None if native is None else native.device

    def run(*args: Any, **keywords: Any) -> Any:
        index = None if change is None else _index(args, keywords)
        if index is None:
            return redispatch(keys, *args, **keywords)
        before = change(index)
        try:
            return redispatch(keys, *args, **keywords)
        finally:
            change(before)

    return run


def _index(args: Sequence[Any], keywords: dict[str, Any]) -> int | None:
    """Number of the remote device that a result is wanted on, or that an argument is on."""
    wanted = keywords.get("device")
    if wanted is not None:
        return wanted.index if wanted.type == "remote" else None
    for value in (*args, *keywords.values()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor) and one.device.type == "remote":
                return one.device.index
    return None


def _shared() -> dict[str, Callable[..., Any]]:
    names = SHARED.split()
    for name in UNARY.split():
        names += (name, f"{name}_", f"{name}.out")
    found: dict[str, Callable[..., Any]] = {}
    for name in names:
        base, _, overload = name.partition(".")
        op = getattr(getattr(aten, base, None), overload or "default", None)
        # Versions of torch differ in what they have.
        if op is not None and op.has_kernel_for_dispatch_key(torch._C.DispatchKey.SparseCPU):
            found[f"aten::{name}"] = _on(op, _SPARSE_HOST)
    return found


_bag_backward = Kernel(aten._embedding_bag_backward.default)
_sparse_bag_backward = _on(aten._embedding_bag_backward.default, _HOST)


def _embedding_bag_backward(*args: Any, **keywords: Any) -> Tensor:
    sparse = args[9] if len(args) > 9 else keywords["sparse"]
    made: Tensor = (_sparse_bag_backward if sparse else _bag_backward)(*args, **keywords)
    return made


SPARSE: Final[dict[str, Callable[..., Any]]] = {
    **_shared(),
    "aten::_coalesce": _coo.coalesce,
    "aten::add.Tensor": _coo.add,
    "aten::add_.Tensor": _coo.add_,
    "aten::add.out": _coo.add_out,
    "aten::mul.Tensor": _coo.mul,
    "aten::mul_.Tensor": _coo.mul_,
    "aten::mul.out": _coo.mul_out,
    "aten::sub.Tensor": _coo.sub,
    "aten::sub_.Tensor": _coo.sub_,
    "aten::sub.out": _coo.sub_out,
    "aten::div.Tensor": _coo.div,
    "aten::div_.Tensor": _coo.div_,
    "aten::div.out": _coo.div_out,
    "aten::div.Tensor_mode": _coo.div,
    "aten::div_.Tensor_mode": _coo.div_,
    "aten::div.out_mode": _coo.div_out,
    "aten::floor_divide": _coo.floor_divide,
    "aten::floor_divide_.Tensor": _coo.floor_divide_,
    "aten::floor_divide.out": _coo.floor_divide_out,
    "aten::sparse_mask": _coo.sparse_mask,
    "aten::_sparse_mask_projection": _coo.projected,
    "aten::addmm": _coo.addmm,
    "aten::addmm_": _coo.addmm_,
    "aten::addmm.out": _coo.addmm_out,
    "aten::_sparse_sparse_matmul": _coo.multiplied,
    "aten::bmm": _coo.bmm,
    "aten::bmm.out": _coo.bmm_out,
    "aten::index_select": _coo.index_select,
    "aten::_sparse_sum_backward": _coo.sum_backward,
    "aten::linalg_vector_norm": _coo.vector_norm,
    "aten::is_pinned": _never,
}
"""Kernels where an argument is sparse."""

FROM_DENSE: Final[dict[str, Callable[..., Any]]] = {
    "aten::_to_sparse": _on(aten._to_sparse.default, _HOST),
    "aten::_to_sparse.sparse_dim": _on(aten._to_sparse.sparse_dim, _HOST),
    "aten::_embedding_bag_backward": _embedding_bag_backward,
}
"""Kernels for dense arguments that may give a sparse result."""

FRONTED_SPARSE: Final = {"aten::_embedding_bag_backward": _bag_backward.kinds}
"""As ``FRONTED``: the part in C++ does those that give a dense one."""
