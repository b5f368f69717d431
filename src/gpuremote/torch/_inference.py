"""What an op gives, found out without running it: torch's own rules on tensors without memory.

Done once for each op and kind of arguments, with the type of the *server's* device: what an op
gives depends on it in places (the statistics of a layer norm in bfloat16, say).
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from gpuremote.ops.torch_call import CONJ, NEG, Result, View, Views
from gpuremote.torch._homes import before_open

__all__ = ["Unpredictable", "fake_of", "infer", "mode", "results_of"]

STATISTICS: Final = (
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten._native_batch_norm_legit.default,
)
"""Ops that give them beside what they normalise."""
BAGS: Final = (
    torch.ops.aten._embedding_bag.default,
    torch.ops.aten._embedding_bag_forward_only.default,
)
_modes: list[FakeTensorMode] = []
_making = threading.Lock()
_inferring = threading.RLock()


class Unpredictable(Exception):
    """Only who runs the op knows the shapes of its results."""


def mode() -> FakeTensorMode:
    """In which tensors without memory are made; the first time torch loads its compiler for it."""
    with _making:
        if not _modes:
            # The modules of torch's compiler import each other in a circle. ``torch.compile``
            # enters it here, maybe at the same time in another thread; which then waits.
            importlib.import_module("torch._inductor.compiler_bisector")
            _modes.append(FakeTensorMode(allow_non_fake_inputs=False))
            # What runs below an op is none of its business, also where it looks at every frame.
            torch._dynamo.trace_rules.add("gpuremote")
    return _modes[0]


def _prepare() -> None:
    """Make the mode while a server starts: torch loads its compiler for it, some two seconds."""
    if not _modes:
        threading.Thread(target=mode, name="gpuremote-torch-rules", daemon=True).start()


before_open.append(_prepare)


@contextlib.contextmanager
def _undisturbed() -> Iterator[FakeTensorMode]:
    """The rules by themselves, whatever state torch is in where the op was called. One thread at a
    time, as the mode keeps what it is doing in itself."""
    found = mode()
    with (
        _inferring,
        torch._C._DisableAutocast(),
        torch._C._AutoDispatchBelowAutograd(),
        torch.no_grad(),
        found,
    ):
        yield found


def fake_of(
    tensor: torch.Tensor, kind: str, bases: dict[int, torch.Tensor], name: int
) -> torch.Tensor:
    """A tensor without memory that looks as ``tensor`` does on the server.

    Parameters
    ----------
    kind : str
        Type of the server's device.
    bases : dict
        Storages of this call so far; views of one share it.
    name : int
        The storage of ``tensor``.
    """
    base = bases.get(name)
    if base is None:
        nbytes = tensor.untyped_storage().nbytes()
        base = bases[name] = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    found = torch.empty(0, dtype=tensor.dtype, device="meta")
    storage, offset = base.untyped_storage(), tensor.storage_offset()
    found.set_(storage, offset, tensor.shape, tensor.stride())
    # Whether it is conjugated or negated changes values, and nothing that is asked for here.
    return FakeTensor(mode(), found, torch.device(kind))


def host_fake(dtype: torch.dtype) -> torch.Tensor:
    """A number of the host as a tensor without axes."""
    with _undisturbed():
        return torch.empty((), dtype=dtype)


def infer(op: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
    """What ``op`` gives for arguments that are fake already.

    Raises
    ------
    Unpredictable
    Exception
        What torch itself says of such arguments.
    """
    try:
        with _undisturbed():
            made = op(*arguments, **keywords)
            made = _as_hosts_do(arguments, made) if op in STATISTICS else made
        return _bags_of_hosts(op, arguments, keywords, made) if op in BAGS else made
    except (
        DynamicOutputShapeException,
        DataDependentOutputException,
        UnsupportedOperatorException,
        NotImplementedError,
    ) as error:
        raise Unpredictable(str(error)) from error


def _as_hosts_do(arguments: Any, made: Any) -> Any:
    """On a host the statistics have the dtype of the parameters where these are wider than the
    input (autocast); torch's rules say that they have the input's."""
    source, *parameters = (one for one in arguments[:5] if isinstance(one, torch.Tensor))
    wide = next((one.dtype for one in parameters if one.dtype != source.dtype), None)
    if source.device.type != "cpu" or wide is None:
        return made
    return (made[0], *(one.to(wide) for one in made[1:]))


def _bags_of_hosts(op: Any, arguments: Any, keywords: dict[str, Any], made: Any) -> Any:
    """What a host gives beside the bags, for the backward. torch's rules are those of other kernels
    (for bfloat16, say, or where the last offset is the end), so this host's are asked for sizes."""
    taken = dict(zip((one.name for one in op._schema.arguments), arguments, strict=False))
    taken |= keywords
    weight, scale, mode = taken["weight"], taken.get("per_sample_weights"), taken.get("mode", 0)
    count, step = len(taken["indices"]), 1 if scale is None else scale.stride(0)
    if weight.device.type != "cpu" or not len(taken["offsets"]):
        return made
    taken["weight"] = _zeros((1, 1), (1, weight.stride(1)), weight.dtype)
    taken["indices"] = torch.zeros(count, dtype=taken["indices"].dtype)
    taken["offsets"] = torch.zeros(len(taken["offsets"]), dtype=taken["offsets"].dtype)
    taken["padding_idx"] = min(taken.get("padding_idx", -1), 0)  # of a table of one
    taken["offsets"][-1:] = count if taken.get("include_last_offset", False) else 0
    if scale is not None:
        taken["per_sample_weights"] = _zeros((count,), (step,), scale.dtype)
    _, *others = op(**taken)
    if mode == 2:
        others[2] = made[3]  # as wide as the table
    return made[0], *(torch.empty_like(one, device="meta") for one in others)


def _zeros(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    last = sum(max(0, n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.zeros(last + 1, dtype=dtype).as_strided(shape, stride)


def results_of(made: Sequence[Any], views: Views) -> tuple[list[int], list[Result]]:
    """Bytes of each storage that was made, and the results as views of them."""
    sizes: list[int] = []
    storages: dict[int, int] = {}
    results: list[Result] = []
    for tensor in made:
        if tensor is None:
            results.append(Result(-1, None, "uint8"))
            continue
        # A result that is conjugated only by name is not when it is here: the server sees to it.
        view = view_of(tensor, views, plain=True)
        key = tensor.untyped_storage()._cdata
        number = storages.get(key)
        if number is None:
            number = storages[key] = len(sizes)
            sizes.append(0)
        sizes[number] = max(sizes[number], view.end)
        results.append(Result(number, view, view.dtype))
    return sizes, results


def view_of(tensor: torch.Tensor, views: Views, *, plain: bool = False) -> View:
    """A tensor as a view; ``plain``: as a result, neither conjugated nor negated."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    if plain:
        flags = 0
        if 0 in stride and any(n > 1 and not step for n, step in zip(shape, stride, strict=True)):
            # Some of torch's rules copy the layout of an operand that repeats itself; ops do not.
            stride = tuple(torch.empty(shape, device="meta").stride())
    else:
        flags = (CONJ if tensor.is_conj() else 0) | (NEG if tensor.is_neg() else 0)
    return views.get(str(tensor.dtype)[6:], shape, stride, int(tensor.storage_offset()), flags)
