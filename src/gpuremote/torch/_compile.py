"""``torch.compile``: the backend ``gpuremote`` sends a graph once; each call of it is one record.

Backends that give back plain ops work too; the default one makes code for devices that it knows.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from gpuremote.torch._anchors import anchors
from gpuremote.torch._programs import (
    NotRecordable,
    Program,
    Recording,
    Results,
    Source,
    made_by,
)
from gpuremote.torch._storages import handle_of

__all__ = ["compile_graph", "refuse_inductor"]

MOST: Final = 64
"""Shapes for which a graph is kept; with others its ops go one by one."""


def refuse_inductor() -> None:
    """Have torch's default backend say that it can't compile for a remote device, where it would
    otherwise fail in its midst."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    plain = wrapper.__call__

    def call(self: Any, model: Any, inputs: Any) -> Any:
        if any(isinstance(v, torch.Tensor) and v.device.type == "remote" for v in inputs):
            raise RuntimeError(
                "torch.compile's default backend (inductor) makes code for devices of this host; "
                "for remote ones give torch.compile(..., backend='gpuremote'), and "
                "options={'inductor': True} to have their server use it"
            )
        return plain(self, model, inputs)

    wrapper.__call__ = call


def compile_graph(
    model: Any, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Backend of ``torch.compile``, by the name ``gpuremote``.

    Forward and backward are a graph each. A graph runs op by op with the first arguments of their
    shapes; what went out then is one record for all later ones.

    Parameters
    ----------
    options : mapping, optional
        As given to ``torch.compile``. ``inductor`` (bool): the server makes one piece of code of
        each graph, with torch's default compiler, when it is called for the second time. That call
        takes seconds to minutes; results differ from those op by op in the last bits, as they do
        with the same compiler here. What can't be compiled there runs op by op, and the log
        ``gpuremote.client`` says why.

    Raises
    ------
    ValueError
        There is no such option.
    """
    from torch._dynamo.backends.common import aot_autograd

    given = dict(options or {})
    inductor = bool(given.pop("inductor", False))
    if given:
        raise ValueError(f"the backend gpuremote has no option {next(iter(given))!r}: inductor")
    if not (torch.is_grad_enabled() and any(_learns(v) for v in inputs)):
        # As it is. Without ops in place an optimiser would write all of its state anew, and copy.
        return _Compiled(model, inductor)
    boxed = functools.partial(_boxed, inductor)
    backend: Any = aot_autograd(
        fw_compiler=boxed, bw_compiler=boxed, keep_inference_input_mutations=True
    )
    compiled: Callable[..., Any] = backend(model, inputs)
    return compiled


def _learns(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _boxed(inductor: bool, graph: Any, _: Sequence[Any]) -> Callable[..., Any]:
    compiled = _Compiled(graph, inductor)

    def boxed(arguments: list[Any]) -> Any:
        given = tuple(arguments)
        arguments.clear()  # so that what is no longer needed ends
        return compiled(*given)

    marked: Any = boxed
    marked._boxed_call = True
    return boxed


class _Known(NamedTuple):
    program: Program
    results: Results


class _Compiled:
    """A graph of plain ops, as a function of its arguments."""

    def __init__(self, graph: Any, inductor: bool = False) -> None:
        self._graph = graph
        self._inductor = inductor
        self._known: dict[Any, _Known | None] = {}

    def __call__(self, *arguments: Any) -> Any:
        handles, key = _look(arguments)
        known = self._known.get(key) if key is not None else None
        if known is not None and known.program.valid:
            number = known.program.run(handles)
            if number is not None:
                return known.results.make(number, arguments)
        if key is None or (known is None and key in self._known) or len(self._known) >= MOST:
            return self._graph(*arguments)
        return self._record(key, handles, arguments)

    def _record(self, key: Any, handles: list[int], arguments: Sequence[Any]) -> Any:
        recording = Recording()
        with recording:
            found = self._graph(*arguments)
        if recording.threads <= {threading.get_ident()}:  # else what others did is in it too
            try:
                self._known[key] = _program(recording, handles, found, self._inductor)
            except NotRecordable:
                self._known[key] = None
        return found


def _look(arguments: Sequence[Any]) -> tuple[list[int], Any]:
    """Handles of the arguments (-1: no remote tensor), and what a program depends on; None: on
    something that is not known."""
    handles: list[int] = []
    key: list[Any] = []
    seen: dict[int, int] = {}
    for value in arguments:
        number = -1
        if isinstance(value, torch.Tensor):
            if value.device.type != "remote" or value.layout != torch.strided:
                return handles, None
            if value.is_conj() or value.is_neg():
                return handles, None
            number = handle_of(value).number
            first = seen.setdefault(number, len(handles))
            key.append((value.shape, value.stride(), value.storage_offset(), value.dtype, first))
        elif isinstance(value, (int, float, bool, torch.SymInt)) or value is None:
            key.append((value.__class__, int(value) if isinstance(value, torch.SymInt) else value))
        else:
            return handles, None
        handles.append(number)
    return handles, tuple(key)


def _program(recording: Recording, handles: list[int], found: Any, inductor: bool) -> _Known:
    recording.read()
    home = recording.home
    if home is None:
        raise NotRecordable("there are no ops in it")
    given = {number: k for k, number in reversed(list(enumerate(handles))) if number >= 0}
    constants = anchors(home.core)

    def source(handle: int) -> Source:
        if handle in given:
            return Source(given[handle])
        if handle in constants:
            return Source(-1, constants[handle])
        raise NotRecordable("it uses a tensor that is gone")

    results = Results(list(found), given, made_by(recording.calls))
    # A server that says nothing of it is of an older version, and would not know what is asked.
    can = inductor and home.inductor is not None
    program = Program(home, recording.calls, source, results.outputs, compiled=can)
    return _Known(program, results)
