"""Graphs made into one piece of code by torch's compiler, where the server has what it needs.

A graph is traced into one function of typed tensors, with shapes only, and given to inductor: it
fuses ops into kernels (Triton on GPUs, C++ on processors). The first call of a graph takes as long
as that does. What a kernel computes in one go is rounded less often: results are those of
``torch.compile`` on the server's device, and differ from those op by op in the last bits.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpuremote.backend.torch_calls import (
    Arguments,
    Block,
    Permits,
    dtype_of,
    find_op,
    tensors_in,
    written_by,
)
from gpuremote.errors import ShapeError, UnsupportedOp
from gpuremote.ops.torch_call import Call, View
from gpuremote.ops.torch_graph import Graph

__all__ = ["compile_graph", "compiler", "remove_cache"]


_compiling = threading.Lock()


class _Traced:
    """A storage while a graph is traced."""

    def __init__(self, tensor: torch.Tensor, view: View) -> None:
        self._base = tensor
        self._dtype = view.dtype
        self.views = {view: tensor}

    def at(self, view: View) -> torch.Tensor:
        found = self.views.get(view)
        if found is None:
            if view.dtype != self._dtype or view.flags:
                raise UnsupportedOp(f"{view} of a tensor of {self._dtype}")
            found = self._base.as_strided(view.shape, view.stride, view.offset)
            self.views[view] = found
        return found


def compiler(device: torch.device) -> str:
    """What inductor would make code with for a device; "" where it can't."""
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return "triton" if found else ""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "g++")) or ""
    return ""


def compile_graph(
    graph: Graph, calls: Sequence[Call], device: torch.device, permits: Permits
) -> Callable[[Sequence[Any]], list[Block]]:
    """A function that runs a graph: takes the blocks of its inputs, writes to those that the graph
    writes to, and gives the blocks of its outputs.

    Raises
    ------
    UnsupportedOp
        Some of it can't be part of such a function, or inductor fails; the message says what.
    """
    if not compiler(device):
        raise UnsupportedOp(f"there is nothing here to make code with for {device.type}")
    inputs, lengths = _inputs(graph, calls)
    ops = [_op(call, permits) for call in calls]
    _check_written(graph, calls, ops)
    arguments = [Arguments(call, device).build for call in calls]
    made_by = _results(graph, calls)

    def whole(*given: torch.Tensor) -> list[torch.Tensor]:
        values: list[Any] = [None] * graph.inputs
        for (position, view), tensor in zip(inputs, given, strict=True):
            values[position] = _Traced(tensor, view)
        for node, call, op, build in zip(graph.nodes, calls, ops, arguments, strict=True):
            operands = [
                values[ref].at(kind)
                if isinstance(ref, int) and isinstance(kind, View)
                else _scalar(ref)
                for ref, kind in zip(node.operands, call.operands, strict=True)
            ]
            positional, keywords = build(operands)
            values += _storages(call, op(*positional, **keywords))
        return [
            values[value].at(view) for value, (view, _) in zip(graph.outputs, made_by, strict=True)
        ]

    function = _compile(whole, [(view, lengths[position]) for position, view in inputs], device)

    def run(values: Sequence[Any]) -> list[Block]:
        for position, _ in inputs:
            # The code looks at no length.
            if values[position].nbytes < lengths[position]:
                raise ShapeError(
                    f"input {position} has {values[position].nbytes} bytes of the "
                    f"{lengths[position]} that the graph uses"
                )
        found = function(*[values[position].view(view) for position, view in inputs])
        taken = {values[position].tensor.untyped_storage().data_ptr() for position, _ in inputs}
        return [
            _block(tensor, view, size, taken)
            for tensor, (view, size) in zip(found, made_by, strict=True)
        ]

    return run


def _compile(whole: Any, like: list[tuple[View, int]], device: torch.device) -> Any:
    # Takes seconds to import, so only where it is asked for.
    from torch._inductor import compile_fx, config
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache()
    # In this process alone; and what torch draws by itself it draws as op by op.
    settings = {"compile_threads": 1, "fallback_random": True, "force_disable_caches": True}
    try:
        # The settings are the process's.
        with _compiling, torch.no_grad(), config.patch(settings):
            with FakeTensorMode():
                examples = [_example(view, end, device) for view, end in like]
                traced = make_fx(whole)(*examples)  # within, as it may make tensors by itself
            return compile_fx.compile_fx(traced, examples)
    except UnsupportedOp:
        raise
    except Exception as error:
        text = str(error).split("\n", 1)[0]
        raise UnsupportedOp(f"{type(error).__name__}: {text}") from error


@functools.cache
def _cache() -> str:
    """A folder of this process alone, whose code nobody else gets to write."""
    return tempfile.mkdtemp(prefix=f"gpuremote-inductor-{os.getpid()}-")


def remove_cache() -> None:
    """Delete what was compiled, as the process ends."""
    if _cache.cache_info().currsize:
        shutil.rmtree(_cache(), ignore_errors=True)


def _inputs(graph: Graph, calls: Sequence[Call]) -> tuple[list[tuple[int, View]], dict[int, int]]:
    """The inputs that are used with the first view of each, and the bytes that are used of each."""
    found: dict[int, View] = {}
    ends: dict[int, int] = {}
    for node, call in zip(graph.nodes, calls, strict=True):
        for ref, kind in zip(node.operands, call.operands, strict=True):
            if isinstance(kind, View) and isinstance(ref, int) and ref < graph.inputs:
                if kind.flags:
                    raise UnsupportedOp("it takes a conjugated view")
                found.setdefault(ref, kind)
                ends[ref] = max(ends.get(ref, 0), kind.end)
    return list(found.items()), ends


def _check_written(graph: Graph, calls: Sequence[Call], ops: Sequence[Any]) -> None:
    """What is written to is seen in one way only: to write through a view of it inductor makes a
    copy, laid out anew, and takes the strides of the original."""
    views: list[set[View]] = [set() for _ in range(graph.inputs)]
    written: set[int] = set()
    for node, call, op in zip(graph.nodes, calls, ops, strict=True):
        for ref, kind in zip(node.operands, call.operands, strict=True):
            if isinstance(ref, int) and isinstance(kind, View):
                views[ref].add(kind)
        for position in written_by(op, call):
            ref = node.operands[position]
            if isinstance(ref, int):
                written.add(ref)
        first = len(views)
        views += [set() for _ in call.sizes]
        for result in call.results:
            if result.storage >= 0 and result.view is not None:
                views[first + result.storage].add(result.view)
    if any(len(views[ref]) > 1 for ref in written):
        raise UnsupportedOp("it writes to a tensor that it also sees as another view")


def _results(graph: Graph, calls: Sequence[Call]) -> list[tuple[View, int]]:
    """What each output is, and the bytes of its storage."""
    natural: list[tuple[View, int]] = []
    for call in calls:
        views: list[Any] = [None] * len(call.sizes)
        for result in call.results:
            if result.storage >= 0 and views[result.storage] is None:
                views[result.storage] = result.view
        for view, size in zip(views, call.sizes, strict=True):
            if view is None or size is None:
                raise UnsupportedOp(f"what {call.name} gives depends on values")
            natural.append((view, size))
    return [natural[value - graph.inputs] for value in graph.outputs]


def _op(call: Call, permits: Permits) -> Any:
    if call.name in permits.own:
        raise UnsupportedOp(f"{call.name} is no op of torch's")
    if call.default != "float32":
        raise UnsupportedOp("numbers are not float32 by default")
    return find_op(call.name, permits.namespaces)


def _scalar(ref: Any) -> Any:
    return complex(*ref) if len(ref) == 2 else ref[0]


def _storages(call: Call, made: Any) -> list[_Traced]:
    if not call.sizes:
        return []  # what it gave are its arguments
    found: list[Any] = [None] * len(call.sizes)
    for tensor, result in zip(tensors_in(made), call.results, strict=True):
        if result.storage < 0:
            continue
        view = result.view
        if view is None or tensor is None:
            raise UnsupportedOp(f"what {call.name} gives depends on values")
        if found[result.storage] is not None:
            found[result.storage].views[view] = tensor
            continue
        if tensor.stride() != view.stride or tensor.storage_offset() != view.offset:
            raise UnsupportedOp(f"{call.name} gives another layout here")
        found[result.storage] = _Traced(tensor, view)
    return found


def _example(view: View, end: int, device: torch.device) -> torch.Tensor:
    """A tensor that is laid out so, in a storage of so many bytes."""
    dtype = dtype_of(view.dtype)
    base = torch.empty(-(-end // dtype.itemsize), dtype=dtype, device=device)
    return base.as_strided(view.shape, view.stride, view.offset)


def _block(tensor: torch.Tensor, view: View, size: int, taken: set[int]) -> Block:
    """A storage of an output's own; ``taken`` are the addresses of others."""
    where = tensor.untyped_storage().data_ptr()
    if (
        (not size or where not in taken)
        and tensor.untyped_storage().nbytes() == size
        and tensor.stride() == view.stride
        and tensor.storage_offset() == view.offset
    ):
        taken.add(where)
        return Block(tensor, size, view)
    # Another layout, or part of something larger: the client counts on its own.
    block = Block(torch.empty(size, dtype=torch.uint8, device=tensor.device), size)
    block.view(view).copy_(tensor)
    return block
