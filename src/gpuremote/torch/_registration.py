"""Making ``remote`` a device of torch: done once in a process, and for good."""

from __future__ import annotations

import functools
import threading
from typing import Any, Final

import torch
from torch.utils import backend_registration

from gpuremote.torch import _homes
from gpuremote.torch._attention import attend
from gpuremote.torch._autocast import register_autocast
from gpuremote.torch._cells import CELLS
from gpuremote.torch._compile import refuse_inductor
from gpuremote.torch._events import serve_event
from gpuremote.torch._fast import fast
from gpuremote.torch._homes import on_new_plans
from gpuremote.torch._kernels import Kernel
from gpuremote.torch._module import RemoteModule, counted
from gpuremote.torch._printing import print_locally
from gpuremote.torch._random import serve_generator
from gpuremote.torch._saved import teach_storages
from gpuremote.torch._sparse import FROM_DENSE, FRONTED_SPARSE, SPARSE
from gpuremote.torch._special import FRONTED, SPECIAL, VIEWS
from gpuremote.torch._storages import handle_of
from gpuremote.torch._tier import native

__all__ = ["allow_ops", "register"]

LEFT_TO_TORCH: Final = frozenset(
    (
        "aten::alias",
        "aten::detach",
        "aten::detach_",
        "aten::lift",
        "aten::lift_fresh",
        "aten::_unsafe_view",
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

_OWN: Final = SPECIAL | CELLS | FROM_DENSE
_IN_FRONT: Final = FRONTED | FRONTED_SPARSE

_lock = threading.Lock()
_allowed: set[str] = set()
_libraries: list[Any] = []
"""Kept: what they registered goes with them."""


def register() -> None:
    """Make the device ``remote`` known; a second call does nothing."""
    with _lock:
        if _libraries:
            return
        if not _accelerated():
            # As for a processor: a thread for each device would only issue the same ops, two
            # switches later, and knows nothing of the line that asked for them.
            torch.autograd.set_multithreading_enabled(False)
        _name_device()
        # Modules keep the identity of their parameters, and with it what is tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        teach_storages()
        refuse_inductor()
        print_locally()
        library: Any = torch.library.Library("aten", "IMPL")
        everything: Any = torch.library.Library("_", "IMPL")
        _libraries.extend((library, everything))
        for name, kernel in _OWN.items():
            if native is None or name not in _IN_FRONT:
                library.impl(name.partition("::")[2], kernel, "PrivateUse1")
        for name, kernel in SPARSE.items():
            library.impl(name.partition("::")[2], kernel, "SparsePrivateUse1")
        register_autocast(library, everything)
        ours = {
            name: op
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("aten::") and (op := _op(name)) is not None and _is_ours(name, op)
        }
        if native is None:
            _register_in_python(library, ours)
        else:
            _register_in_front(library, ours)


def _accelerated() -> bool:
    """Whether this host has an accelerator of torch's own; without waking its driver."""
    return bool(
        torch.cuda.device_count() or torch.backends.mps.is_available() or torch.xpu._is_compiled()
    )


def allow_ops(namespace: str) -> None:
    """Let the custom ops of a namespace run on remote devices; the server has to allow them too
    (``serve --allow-ops``).

    Their Python or C++ has to be loaded on both sides, as what they give is found out here by the
    rules that were registered for them (``torch.library.register_fake``).

    Raises
    ------
    ValueError
        There is no op of that namespace, or none that could travel.
    """
    with _lock:
        if namespace in _allowed:
            return
        library: Any = torch.library.Library(namespace, "IMPL")
        count = 0
        for name in torch._C._dispatch_get_all_op_names():
            op = _op(name) if name.startswith(f"{namespace}::") else None
            if op is not None and _is_ours(name, op):
                library.impl(name.partition("::")[2], Kernel(op), "PrivateUse1")
                count += 1
        if not count:
            raise ValueError(f"there are no ops of the namespace {namespace!r} that could travel")
        _libraries.append(library)
        _allowed.add(namespace)


def _name_device() -> None:
    module = RemoteModule()
    if native is None:
        backend_registration._setup_privateuseone_for_python_backend("remote", module)
        return
    native.use(_homes.home, _allocate, _memory, _host_memory, serve_generator, serve_event)
    backend_registration.rename_privateuse1_backend("remote")
    backend_registration.generate_methods_for_privateuse1_backend()
    torch._register_device_module("remote", module)


def _register_in_python(library: Any, ours: dict[str, Any]) -> None:
    host = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in VIEWS:
        library.impl(name.partition("::")[2], _redispatch(_op(name), host), "PrivateUse1")
    for name, op in ours.items():
        library.impl(name.partition("::")[2], fast(Kernel(op)), "PrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", attend, key)


def _register_in_front(library: Any, ours: dict[str, Any]) -> None:
    """With kernels in C++, which know where those in Python are: at a key that no tensor has."""
    kinds: dict[str, list[int]] = {}
    for name, op in ours.items():
        kernel = Kernel(op)
        kinds[name.partition("::")[2]] = kernel.kinds
        library.impl(name.partition("::")[2], kernel, "QuantizedPrivateUse1")
    for name, known in _IN_FRONT.items():
        kinds[name.partition("::")[2]] = known
        library.impl(name.partition("::")[2], _OWN[name], "QuantizedPrivateUse1")
    native.register_kernels(kinds, [name.partition("::")[2] for name in VIEWS])
    on_new_plans.append(native.forget_plans)


def _allocate(index: int, nbytes: int) -> int:
    """Memory of a device for a storage that is made without a tensor; its handle."""
    made = torch.empty(nbytes, dtype=torch.uint8, device=_homes.home(index).device)
    return int(native.disown(handle_of(made).name))


def _memory(index: int) -> tuple[int, int, int]:
    """Bytes that the session of a device holds, held at most, and may hold."""
    found = counted(_homes.home(index))
    return found["memory_used"], found["memory_peak"], found["memory_limit"]


def _host_memory(nbytes: int) -> Any:
    """Host memory that a session sends from."""
    return _homes.home().session.empty(nbytes, "uint8")


def _redispatch(op: Any, keys: Any) -> Any:
    # What ``op.redispatch`` calls, without a frame of Python's for either.
    return functools.partial(op._handle.redispatch_boxed, keys)


def _op(name: str) -> Any:
    """The op of a dispatcher's name; None if Python does not see it."""
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, space), base), overload or "default")
    except AttributeError:
        return None


def _is_ours(name: str, op: Any) -> bool:
    """Whether an op becomes a record."""
    if name in LEFT_TO_TORCH or name in _OWN or name in VIEWS:
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
