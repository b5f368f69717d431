"""Programs: a stretch of ops that was recorded once, as one record from then on.

Recording looks at the records that go out; nothing on the way of an op knows of it. What a program
takes from outside is found again by where it comes from: an argument, or a storage that lives on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from gpuremote.errors import LimitExceeded
from gpuremote.ops.torch_call import Call, View
from gpuremote.ops.torch_graph import MAX_NODES, Graph, Node, Ref, encode
from gpuremote.torch import _homes
from gpuremote.torch._anchors import Anchor, number_at
from gpuremote.torch._homes import Home
from gpuremote.torch._kernels import CallPlan
from gpuremote.torch._storages import Form, handle_of, make_tensor
from gpuremote.wire.batch import Op, decode

__all__ = [
    "NotRecordable",
    "Program",
    "Recorded",
    "Recording",
    "Results",
    "Source",
    "made_by",
]

Tensor = torch.Tensor


class NotRecordable(Exception):
    """What ran can't be one record; the text says why."""


class Recorded(NamedTuple):
    """A call that went out.

    Attributes
    ----------
    made : tuple of int
        Handles of its results; negative for those that only a program inside had.
    plan : CallPlan or Call
    operands : list of Ref
        A handle for each storage, a list for each scalar.
    """

    made: tuple[int, ...]
    plan: Any
    operands: list[Ref]


class Source(NamedTuple):
    """Where an input of a program comes from: the argument of a position, or a storage."""

    argument: int
    anchor: Anchor = None


class Recording:
    """A context: what is issued meanwhile, in whichever thread, is recorded too. One may be within
    another.

    Attributes
    ----------
    home : Home or None
        A device of the session whose ops they were; None: there were none.
    calls : list of Recorded
    threads : set of int
        Those that issued anything.
    """

    def __init__(self) -> None:
        self.home: Home | None = None
        self.calls: list[Recorded] = []
        self.threads: set[int] = set()
        self.spoiled = False
        self.bodies: dict[Home, list[bytes]] = {}

    def __enter__(self) -> Recording:
        _homes.home(0)
        with _lock:
            self._watch(_flushed())
            _active.append(self)
        return self

    def _watch(self, homes: Sequence[Home]) -> None:
        for home in homes:
            self.bodies[home] = []
            home.core.watch(functools.partial(_told, home), self.threads)

    def __exit__(self, *_: object) -> None:
        homes = _flushed()
        with _lock:
            if _active[-1] is not self:  # two threads record at the same time
                for one in _active:
                    one.spoiled = True
            _active.remove(self)
            outer = _active[-1] if _active else None
            if outer is not None:
                outer.threads |= self.threads
            for home in homes:
                if outer is None:
                    home.core.watch(None, None)
                else:
                    home.core.watch(functools.partial(_told, home), outer.threads)

    def read(self) -> None:
        """Find out what was recorded.

        Raises
        ------
        NotRecordable
            There is more than ops of one session.
        """
        for home, bodies in self.bodies.items():
            calls = _calls(home, bodies)
            if calls and self.home is not None:
                raise NotRecordable("it runs on more than one server")
            if calls:
                self.home, self.calls = home, calls
        if self.spoiled:
            raise NotRecordable("another thread was recorded at the same time")
        if len(self.calls) > MAX_NODES:
            raise NotRecordable(f"it is of more than {MAX_NODES} ops")


_lock = threading.RLock()
_active: list[Recording] = []


def _flushed() -> list[Home]:
    """A device of each session, of which everything is on its way."""
    found: dict[Any, Home] = {}
    for home in _homes.opened():
        if home.core not in found:
            found[home.core] = home
            if home.core.dead is None:
                home.core.flush()
    return list(found.values())


def _told(home: Home, body: bytes) -> None:
    for recording in _active:
        if home in recording.bodies:
            recording.bodies[home].append(body)


_QUIET: Final = frozenset((Op.DEFINE, Op.FREE, Op.FREE_NEAR))
_WHY: Final[Mapping[Any, str]] = {
    Op.GET: "it waits for a value",
    Op.META: "the shapes in it depend on values",
    Op.SYNC: "it waits for the device",
    Op.PUT: "it uploads a tensor: give it as an argument",
    Op.PUT_INLINE: "it uploads a tensor: give it as an argument",
    Op.OFFER: "it uploads a tensor: give it as an argument",
    Op.CONTENTS: "it uploads a tensor: give it as an argument",
    Op.CLEAR_PLANS: "there were too many plans",
}


def _calls(home: Home, bodies: Sequence[bytes]) -> list[Recorded]:
    plans: dict[int, Any] = {plan.id: plan for plan in list(home.core.plans.values())}
    found: list[Recorded] = []
    for body in bodies:
        for number, plan, fields in decode(body, plans):
            if isinstance(plan, (CallPlan, Call)):
                made = tuple(range(number, number + plan.n_out))
                found.append(Recorded(made, plan, _operands(plan, fields)))
            elif isinstance(plan, Graph):
                found += _inlined(plan, number, fields[1:], plans, -1 - (len(found) << 24))
            elif plan not in _QUIET:
                name = plan.name if isinstance(plan, Op) else str(plan)
                raise NotRecordable(_WHY.get(plan, f"there is a record of kind {name} in it"))
    return found


def _inlined(
    graph: Graph, number: int, inputs: Sequence[int], plans: Mapping[int, Any], free: int
) -> list[Recorded]:
    """The calls of a program that ran inside; handles from ``free`` downwards are for what only it
    had."""
    handles = list(inputs)
    given = {value: number + k for k, value in enumerate(graph.outputs)}
    found: list[Recorded] = []
    for node in graph.nodes:
        plan = plans[node.plan]
        operands = [handles[o] if isinstance(o, int) else o for o in node.operands]
        made = []
        for _ in range(plan.n_out):
            made.append(given.get(len(handles), free - len(handles)))
            handles.append(made[-1])
        found.append(Recorded(tuple(made), plan, operands))
    return found


def _operands(plan: Any, fields: tuple[Any, ...]) -> list[Ref]:
    found: list[Ref] = []
    at = 1
    for operand in plan.operands:
        if isinstance(operand, View):
            found.append(fields[at])
        elif operand == "c":
            found.append([fields[at], fields[at + 1]])
            at += 1
        else:
            found.append([fields[at]])
        at += 1
    return found


def made_by(calls: Sequence[Recorded]) -> dict[int, tuple[int, int]]:
    """Of each handle that they make: which call, and which of its storages."""
    return {
        handle: (position, k)
        for position, call in enumerate(calls)
        for k, handle in enumerate(call.made)
    }


class Program:
    """Calls as one record.

    Parameters
    ----------
    home : Home
    calls : list of Recorded
    source : callable
        Where a handle comes from that none of the calls makes; raises NotRecordable.
    outputs : list of int
        Handles, made by the calls, that a run gives.
    compiled : bool
        The server makes one piece of code of it where it can.

    Attributes
    ----------
    sources : list of Source
        Of its inputs.
    """

    def __init__(
        self,
        home: Home,
        calls: Sequence[Recorded],
        source: Callable[[int], Source],
        outputs: Sequence[int],
        *,
        compiled: bool = False,
    ) -> None:
        made = made_by(calls)
        given: dict[int, int] = {}
        self.sources: list[Source] = []
        for call in calls:
            if None in call.plan.sizes:
                raise NotRecordable(f"what {call.plan.name} gives depends on values")
            for operand in call.operands:
                if isinstance(operand, int) and operand not in made and operand not in given:
                    given[operand] = len(self.sources)
                    self.sources.append(source(operand))
        numbers = dict(given)
        for handle in made:
            numbers[handle] = len(numbers)
        nodes = [
            Node(c.plan.id, [numbers[o] if isinstance(o, int) else o for o in c.operands])
            for c in calls
        ]
        self.home = home
        core = home.core
        with core.lock:
            known = len(core.plans)
            ident = core.next_plan()
            if len(core.plans) < known:
                raise NotRecordable("there were too many plans")
            # The calls' plans are still there: nothing was issued since they were looked up.
            given_back = tuple(numbers[handle] for handle in outputs)
            self._graph = Graph(ident, len(given), nodes, given_back, compiled)
            try:
                core.add_plan(self, self._graph, encode(self._graph))
            except LimitExceeded as error:
                raise NotRecordable(f"it is too long: {error.message}") from None

    @property
    def valid(self) -> bool:
        """Whether the session still knows it."""
        known: Any = self.home.core.plans.get(self)
        return known is self._graph and self.home.core.dead is None

    def run(self, arguments: Sequence[int]) -> int | None:
        """Issue it; the number of its first output, or None if a storage that it needs has ended.

        Parameters
        ----------
        arguments : sequence of int
            Handles.
        """
        handles: list[int] = []
        for argument, anchor in self.sources:
            number = arguments[argument] if anchor is None else number_at(anchor)
            if number is None:
                return None
            handles.append(number)
        return self.home.core.record_call(self._graph, handles)


def _form_of(tensor: Tensor) -> Form:
    """A tensor as a view of its storage."""
    nbytes = tensor.untyped_storage().nbytes()
    shape, stride = tuple(tensor.shape), tensor.stride()
    return tensor.dtype, shape, stride, int(tensor.storage_offset()), nbytes, False


class Results:
    """Tensors that a run gives, made of what a recorded run gave.

    Parameters
    ----------
    values : sequence
        What the recorded run gave.
    arguments : mapping
        Handle of each argument to its position.
    made : mapping
        Handles that the run made.

    Attributes
    ----------
    outputs : list of int
        Handles that the program has to give.
    """

    def __init__(
        self, values: Sequence[Any], arguments: Mapping[int, int], made: Mapping[int, Any]
    ) -> None:
        self.outputs: list[int] = []
        self._recipes: list[tuple[str, Any, Form | None, Home | None]] = []
        for value in values:
            if not isinstance(value, Tensor):
                self._recipes.append(("same", value, None, None))
                continue
            if value.device.type != "remote":
                raise NotRecordable("it gives a tensor of the host")
            if value.layout != torch.strided:
                raise NotRecordable("it gives a sparse tensor: give its indices and values")
            if value.is_conj() or value.is_neg():
                raise NotRecordable("it gives a conjugated view")
            held = handle_of(value)
            number, form, home = held.number, _form_of(value), held.home
            if number in made:
                if number not in self.outputs:
                    self.outputs.append(number)
                self._recipes.append(("new", self.outputs.index(number), form, home))
            elif number in arguments:
                self._recipes.append(("argument", arguments[number], form, home))
            else:
                self._recipes.append(("same", value, None, None))

    def make(self, number: int, arguments: Sequence[Any]) -> list[Any]:
        """The values of a run of which the first output is ``number``."""
        made: dict[int, Tensor] = {}
        found: list[Any] = []
        for kind, what, form, home in self._recipes:
            if form is None or home is None:
                found.append(what)
                continue
            if kind == "argument":
                found.append(_like(arguments[what], form))
            elif what in made:
                found.append(_view(made[what], form))
            else:
                made[what] = make_tensor(home, number + what, form)
                found.append(made[what])
        return found


def _like(argument: Tensor, form: Form) -> Tensor:
    same = (form[0], form[1], form[2], form[3])
    of = argument.dtype, tuple(argument.shape), argument.stride(), argument.storage_offset()
    return argument if of == same else _view(argument, form)


def _view(base: Tensor, form: Form) -> Tensor:
    dtype, shape, stride, offset, _, _ = form
    if dtype == base.dtype:
        return base.detach().as_strided(shape, stride, offset)
    empty = torch.empty(0, dtype=dtype, device=base.device)
    return empty.set_(base.untyped_storage(), offset, shape, stride)
