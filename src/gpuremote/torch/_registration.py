"""Making ``remote`` a device of torch: done once in a process, and for good."""

from __future__ import annotations

import threading
from typing import Any, Final

import torch
from torch.utils import backend_registration

from gpuremote.torch._autocast import register_autocast
from gpuremote.torch._cells import CELLS
from gpuremote.torch._compile import refuse_inductor
from gpuremote.torch._fast import fast
from gpuremote.torch._kernels import Kernel
from gpuremote.torch._module import RemoteModule
from gpuremote.torch._printing import print_locally
from gpuremote.torch._saved import teach_storages
from gpuremote.torch._special import SPECIAL, VIEWS

__all__ = ["register"]

LEFT_TO_TORCH: Final = frozenset(
    (
        "aten::alias",
        "aten::detach",
        "aten::detach_",
        "aten::lift",
        "aten::lift_fresh",
        "aten::_unsafe_view",
        "aten::_has_compatible_shallow_copy_type",
        "aten::_copy_from",
        "aten::_copy_from_and_resize",
        "aten::_pin_memory",
        "aten::record_stream",
        "aten::is_coalesced",
        "aten::is_same_size",
        "aten::_nested_tensor_size",
        "aten::_nested_tensor_strides",
        "aten::_nested_tensor_storage_offsets",
    )
)
"""Ops that torch does with others, or that mean nothing here."""

_lock = threading.Lock()
_libraries: list[Any] = []
"""Kept: what they registered goes with them."""


def register() -> None:
    """Make the device ``remote`` known; a second call does nothing."""
    with _lock:
        if _libraries:
            return
        backend_registration._setup_privateuseone_for_python_backend("remote", RemoteModule())
        # Modules keep the identity of their parameters, and with it what is tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        teach_storages()
        refuse_inductor()
        print_locally()
        library: Any = torch.library.Library("aten", "IMPL")
        everything: Any = torch.library.Library("_", "IMPL")
        _libraries.extend((library, everything))
        host = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        for name in VIEWS:
            library.impl(name.partition("::")[2], _redispatch(_op(name), host), "PrivateUse1")
        for name, kernel in (SPECIAL | CELLS).items():
            library.impl(name.partition("::")[2], kernel, "PrivateUse1")
        register_autocast(library, everything)
        for name in torch._C._dispatch_get_all_op_names():
            op = _op(name) if name.startswith("aten::") else None
            if op is not None and _is_ours(name, op):
                library.impl(name.partition("::")[2], fast(Kernel(op)), "PrivateUse1")


def _redispatch(op: Any, keys: Any) -> Any:
    redispatch = op.redispatch

    def view(*args: Any, **keywords: Any) -> Any:
        return redispatch(keys, *args, **keywords)

    return view


def _op(name: str) -> Any:
    """The op of a dispatcher's name; None if Python does not see it."""
    base, _, overload = name.partition("::")[2].partition(".")
    try:
        return getattr(getattr(torch.ops.aten, base), overload or "default")
    except AttributeError:
        return None


def _is_ours(name: str, op: Any) -> bool:
    """Whether an op becomes a record."""
    if name in LEFT_TO_TORCH or name in SPECIAL or name in CELLS or name in VIEWS:
        return False
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if has(name, "CompositeImplicitAutograd") or torch.Tag.inplace_view in op.tags:
        return False
    schema = op._schema
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return False  # a view
    if any("Storage" in str(a.type) or "Stream" in str(a.type) for a in schema.arguments):
        return False
    return all(
        str(r.type) in ("Tensor", "List[Tensor]", "Optional[Tensor]") for r in schema.returns
    )
