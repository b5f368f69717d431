"""A whole training step as one record: it runs as it is until two runs in a row said the same, and
from then on is replayed."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.utils import _pytree

from gpuremote.errors import UnsupportedOp
from gpuremote.torch._anchors import Anchor, anchors, number_at, rebind
from gpuremote.torch._homes import Home
from gpuremote.torch._programs import (
    NotRecordable,
    Program,
    Recorded,
    Recording,
    Results,
    Source,
    made_by,
)
from gpuremote.torch._storages import handle_of

__all__ = ["Captured", "capture"]

TRIES: Final = 5
"""Runs in which two in a row have to agree."""
MOST: Final = 16
"""Kinds of arguments for which there is a program."""


class _Run(NamedTuple):
    """What a recorded run said."""

    home: Home
    calls: list[Recorded]
    made: dict[int, tuple[int, int]]
    given: dict[int, int]


class _Replay(NamedTuple):
    """A program, and what its outputs become: results of the function, or the values of storages
    that live on. ``fixed`` are arguments that had the same storage in both runs that agreed:
    whether the function knows it from elsewhere too can't be told."""

    program: Program
    results: Results
    left: list[Anchor]
    shape: Any
    fixed: dict[int, int]


class Captured:
    """A function whose ops on a remote device are one record; made by :func:`capture`.

    Attributes
    ----------
    replays : int
        Calls that were one record.
    """

    def __init__(self, function: Callable[..., Any], *, strict: bool) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._strict = strict
        self._runs: dict[Any, _Run] = {}
        self._tries: dict[Any, int] = {}
        self._replays: dict[Any, _Replay] = {}
        self._reason = "not called yet"
        self._lost = 0
        self.replays = 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        values, shape = _pytree.tree_flatten((args, keywords))
        handles, key = _look(values, shape)
        known = self._replays.get(key)
        if known is not None and all(handles[k] == h for k, h in known.fixed.items()):
            number = self._start(key, known, handles)
            if number is not None:
                self.replays += 1
                return self._finish(known, number, values)
        if self._tries.get(key, 0) >= TRIES or len(self._tries) > MOST:
            return _pytree.tree_map(_detached, self._function(*args, **keywords))
        recording = Recording()
        with recording:
            found = _pytree.tree_map(_detached, self._function(*args, **keywords))
        self._learn(key, recording, handles, found)
        return found

    def explain(self) -> str:
        """Whether calls are replayed, and else why not."""
        return f"{self.replays} calls were one record; {self._reason}"

    def _start(self, key: Any, known: _Replay, handles: list[int]) -> int | None:
        """Issue the program; None: it has to be made anew."""
        # Gradients that were set to None, say: what they are now would have no place.
        if known.program.valid and all(number_at(anchor) is not None for anchor in known.left):
            number = known.program.run(handles)
            if number is not None:
                return number
        self._replays.pop(key, None)
        self._runs.pop(key, None)
        self._lost += known.program.valid
        if self._lost >= TRIES:
            self._tries[key] = TRIES
            self._reason = (
                "tensors that it leaves behind or needs are dropped between calls: do that in it, "
                "or keep them (zero_grad(set_to_none=False))"
            )
            self._give_up()
        return None

    def _finish(self, known: _Replay, number: int, values: Sequence[Any]) -> Any:
        home = known.program.home
        first = number + len(known.results.outputs)
        for k, anchor in enumerate(known.left):
            if not rebind(anchor, first + k):
                home.core.dropped.append(first + k)
        return _pytree.tree_unflatten(known.results.make(number, values), known.shape)

    def _learn(self, key: Any, recording: Recording, handles: list[int], found: Any) -> None:
        self._tries[key] = self._tries.get(key, 0) + 1
        try:
            recording.read()
            home = recording.home
            if home is None:
                raise NotRecordable("there are no ops in it")
            given = {number: k for k, number in reversed(list(enumerate(handles))) if number >= 0}
            run = _Run(home, recording.calls, made_by(recording.calls), given)
            before = self._runs.get(key)
            self._runs[key] = run
            if before is None:
                self._reason = "the first run is done"
                return
            _compare(before, run)
            self._replays[key] = _replay(before, run, found)
            self._tries[key] = 0
            self._reason = f"{len(run.calls)} ops are one record"
        except NotRecordable as error:
            self._reason = str(error)
            if self._tries[key] >= TRIES:
                self._give_up()

    def _give_up(self) -> None:
        text = f"{self._function.__name__} can't be one record: {self._reason}"
        if self._strict:
            raise UnsupportedOp(text, op="capture")
        warnings.warn(f"{text}; it goes on op by op", RuntimeWarning, stacklevel=4)


def capture(function: Callable[..., Any], *, strict: bool = True) -> Captured:
    """Make all that a function does on a remote device one record, such as a training step with
    forward, backward and optimiser.

    The first calls run as they are, and are compared; no other thread may use the device meanwhile.
    When two in a row issued the same ops with the same numbers, later calls only send that record,
    with the storages of their arguments in place of those before. What is not on the device is not
    done again then: no Python of the function runs.

    Parameters
    ----------
    function : callable
        Its tensor arguments are on remote devices of one server. What it returns are new tensors
        with each call, without a graph for gradients. Other tensors that it leaves behind, such as
        gradients, stay the same objects and get new values.
    strict : bool
        Whether it is an error if the calls never agree; else a warning, and every call runs as it
        is.

    Raises
    ------
    UnsupportedOp
        At a call: the function waits for a value, uploads tensors, or issues something else each
        time; the text says what. An optimiser that counts its steps on the host is one such case:
        it takes ``capturable=True``.
    """
    return Captured(function, strict=strict)


def _look(values: Sequence[Any], shape: Any) -> tuple[list[int], Any]:
    """Handles of the arguments (-1: no remote tensor), and what a program depends on."""
    handles: list[int] = []
    key: list[Any] = [shape]
    seen: dict[int, int] = {}
    for value in values:
        number = -1
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            raise UnsupportedOp(
                "a captured function takes no sparse tensors; give it their indices and values",
                op="capture",
            )
        if isinstance(value, torch.Tensor) and value.device.type == "remote":
            number = handle_of(value).number
            first = seen.setdefault(number, len(handles))
            flags = value.is_conj(), value.is_neg(), value.device.index
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, first, flags)
        elif isinstance(value, torch.Tensor):
            raise UnsupportedOp(
                "a captured function takes remote tensors; bring the others over before",
                op="capture",
            )
        else:
            key += (value.__class__, value)
        handles.append(number)
    return handles, tuple(key)


def _compare(before: _Run, run: _Run) -> None:
    """
    Raises
    ------
    NotRecordable
        The two runs differ; the text says where.
    """
    if run.home is not before.home:
        raise NotRecordable("it runs on another device each time")
    if len(run.calls) != len(before.calls):
        raise NotRecordable(
            f"one run is of {len(before.calls)} ops and the next one of {len(run.calls)}"
        )
    for position, (old, new) in enumerate(zip(before.calls, run.calls, strict=True)):
        if old.plan is not new.plan:
            raise NotRecordable(
                f"op {position} is {old.plan.name} in one run and {new.plan.name} in the next one, "
                "or of other shapes"
            )
        for a, b in zip(old.operands, new.operands, strict=True):
            if isinstance(a, list) or isinstance(b, list):
                if repr(a) != repr(b):
                    raise NotRecordable(
                        f"a number of {new.plan.name} is {_number(a)} in one run and {_number(b)} "
                        "in the next one (an optimiser that counts its steps on the host needs "
                        "capturable=True)"
                    )
            elif _place(before, a) != _place(run, b) and not (
                a not in before.made and b in before.made and b not in run.made
            ):
                raise NotRecordable(
                    f"{new.plan.name} (op {position}) takes another tensor in each run"
                )


def _number(operand: Any) -> str:
    return " and ".join(map(str, operand)) if isinstance(operand, list) else "a tensor"


def _place(run: _Run, handle: int) -> Any:
    """Where a handle comes from, in terms that are the same in each run."""
    if handle in run.made:
        return run.made[handle]
    return ("argument", run.given[handle]) if handle in run.given else handle


def _replay(before: _Run, run: _Run, found: Any) -> _Replay:
    gc.collect()  # what only a cycle keeps is not left behind
    values, shape = _pytree.tree_flatten(found)
    results = Results(values, run.given, run.made)
    living = anchors(run.home.core)
    _check_results(before, run, values)

    def source(handle: int) -> Source:
        if handle in run.given:
            return Source(run.given[handle])
        if handle in before.made:
            # Left behind by the run before, as this one has left another in its place.
            position, k = before.made[handle]
            handle = run.calls[position].made[k]
        if handle in living:
            return Source(-1, living[handle])
        raise NotRecordable("it uses a tensor that lives no longer than the run")

    left = [h for h in run.made if h in living and h not in results.outputs]
    program = Program(run.home, run.calls, source, [*results.outputs, *left])
    fixed = {k: h for h, k in run.given.items() if before.given.get(h) == k}
    return _Replay(program, results, [living[h] for h in left], shape, fixed)


def _check_results(before: _Run, run: _Run, values: Sequence[Any]) -> None:
    """
    Raises
    ------
    NotRecordable
        A result is a tensor that lives elsewhere too: each call gives new ones.
    """
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.device.type == "remote"]
    held = [handle_of(v).number for v in tensors]
    for tensor, number in zip(tensors, held, strict=True):
        storage = tensor.untyped_storage()
        # One of the Python object, one of each tensor.
        kept = torch._C._storage_Use_Count(storage._cdata) > 1 + held.count(number)
        if number in before.made or (number in run.made and kept):
            raise NotRecordable("it returns a tensor that it also keeps: return a clone of it")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
