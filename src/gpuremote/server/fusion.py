"""Runs of elementwise ops that wait in a queue one behind the other: executed as one program.

Of what such a run computes, only what somebody can still name is made as a whole and counted as
memory. Who can name a result is told by the references to its slot: the table of handles holds one
until the client's FREE has been read, and everything that waits in a queue holds one.

A run has no outcome that its ops would not have one after the other. What could spoil that ends
it: an operand that is not there yet or has failed, an array that is still being sent and would be
written to, two views of memory that the run writes to. A run that fails has changed nothing, and
its ops are run one by one, so that the one to blame is found. Where an op in place has written
already, nothing that can fail is in the same run.

Looking for runs costs every program the same few looks at each of its calls, however long its
queue is. Calls that have nothing to do with each other end a look soon, and those that were found
to be no part of a run are not looked at again. Where runs turn out shorter than what was looked at
(results that another stream may wait for, no room for all, too many blocks), the next look of this
stream goes only twice as far as the run went, and further again as they grow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gpuremote.backend.base import Backend
from gpuremote.backend.fused import Chain, Fused, Step, can_fail
from gpuremote.ops.meta import Meta
from gpuremote.ops.plan import Plan
from gpuremote.server.execute import Executable, poison_op, run_plan
from gpuremote.server.storage import Slot, Storage
from gpuremote.server.streams import Stream

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Fusion", "run_fusible"]

MAX_RUN: Final = 512
"""Ops of one run: what comes behind it, and whoever waits for its results, waits for all of it."""
LEAST: Final = 8
"""Calls that are looked at, however short the runs before were."""
PART: Final = 3
"""By one of so many the calls without a link to one before may outnumber those with one: a sum of
two products is worth it."""
LOOSE: Final = 16
"""By how many more before a look ends."""
MAX_PROGRAMS: Final = 1024
MAX_STEPS: Final = 1 << 15
"""Of all programs that are kept."""


class FusibleExecutable(Executable):
    """A plan whose calls may be part of a run.

    Attributes
    ----------
    shape : tuple of int
        What it computes element by element.
    piece : object
        What the backend made of the plan.
    device : int
    can_fail : bool
        Values decide whether it raises.
    inplace : bool
        It writes to its first operand.
    special : bool
        It can fail, or it writes in place.
    expected : tuple of (Meta or None)
        What each operand was declared to be; None for a scalar.
    result : Meta or None
        None for an op in place.
    """

    __slots__ = (
        "can_fail",
        "device",
        "expected",
        "inplace",
        "piece",
        "result",
        "shape",
        "special",
    )

    def __init__(self, plan: Plan, function: Callable[[Sequence[Any]], Any], piece: object) -> None:
        super().__init__(plan, function)
        self.run = run_fusible
        self.piece = piece
        self.device = plan.device
        self.can_fail = can_fail(plan)
        self.inplace = plan.inplace
        self.special = self.can_fail or self.inplace
        self.expected = tuple(o if isinstance(o, Meta) else None for o in plan.operands)
        self.result = plan.result
        target = plan.operands[0] if plan.inplace else plan.result
        assert isinstance(target, Meta)
        self.shape = target.shape


_Call: TypeAlias = tuple[FusibleExecutable, tuple[int, ...]]


class Fusion:
    """What a session knows of runs: the programs of those it has seen.

    Attributes
    ----------
    ops : int
        How many have been executed as part of a run.
    looks : int
        How often a call in a queue has been looked at.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._programs: dict[Any, Fused | None] = {}
        self._steps = 0
        self._reach: dict[int, int] = {}
        """How far the next look goes, for streams where that is not MAX_RUN."""
        self.ops = 0
        self.looks = 0
        # Without the interpreter's lock a count of references says nothing.
        locked = getattr(sys, "_is_gil_enabled", lambda: True)()
        self._on = locked and os.environ.get("GPUREMOTE_FUSION", "1") != "0"

    def executable(self, plan: Plan, function: Callable[[Sequence[Any]], Any]) -> Executable:
        """How the worker keeps a plan."""
        piece = self._backend.piece(plan) if self._on else None
        if piece is not None:
            return FusibleExecutable(plan, function, piece)
        return Executable(plan, function)

    def program(self, wiring: list[_Call], kept: list[int]) -> Fused | None:
        """The program of a run that is wired like this; None: the backend has none."""
        key = (tuple(wiring), tuple(kept))
        try:
            return self._programs[key]
        except KeyError:
            steps = [Step(op.piece, operands) for op, operands in wiring]
            program = self._backend.fuse(Chain(steps, kept))
            self._steps += len(steps)
            if len(self._programs) >= MAX_PROGRAMS or self._steps > MAX_STEPS:
                self._programs.clear()
                self._steps = len(steps)
            self._programs[key] = program
            return program

    def reach(self, stream: Stream) -> int:
        """How many calls of its queue to look at."""
        return self._reach.get(stream.ident, MAX_RUN)

    def learn(self, stream: Stream, run: Run) -> None:
        """Set how far to look the next time, by how many of the calls that were looked at need not
        be looked at again.

        The reach grows by no more than a part of those, and falls by what else was looked at: so
        all looks together are a small multiple of all calls.
        """
        self.looks += run.looks
        reach, settled = self.reach(stream), run.settled
        if 2 * settled < len(run.numbers):
            if len(self._reach) > MAX_PROGRAMS:
                self._reach.clear()  # most of these streams are gone
            self._reach[stream.ident] = max(LEAST, 2 * settled)
        elif reach < MAX_RUN and 4 * settled >= 3 * reach:
            if 2 * reach < MAX_RUN:
                self._reach[stream.ident] = 2 * reach
            else:
                self._reach.pop(stream.ident, None)


class Run:
    """The calls at the head of a queue that can run as one.

    Attributes
    ----------
    wiring : list of tuple
        For each call the executable, and its operands as ``backend.fused.Step`` has them.
    inputs : list
        Arrays and scalars.
    numbers : list of int
        Of the calls that were looked at, and could be in it.
    looks : int
        How many calls were looked at.
    settled : int
        How many of them need not be looked at again.
    """

    def __init__(self, stream: Stream, device: int, reach: int) -> None:
        self.wiring: list[_Call] = []
        self.inputs: list[Any] = []
        self.numbers: list[int] = []
        self.looks = 0
        self.settled = 0
        self._slots: list[Slot | None] = []
        self._known: dict[int, int] = {}
        """How operands refer to what a slot (by its identity) holds."""
        self._owners: dict[int, int] = {}
        self._shared: set[int] = set()
        """Storages that several operands lie in."""
        self._written: set[int] = set()
        """Storages that were there before the run, which it writes to."""
        self._can_fail = False
        self._worth = 0
        """How many from the first on have enough to do with each other."""
        self._loosest = 0
        """Where the calls without a link first outnumber those with one by most."""
        self._gather(stream, device, reach)

    def _gather(self, stream: Stream, device: int, reach: int) -> None:
        queue, wiring, known, inputs = stream.queue, self.wiring, self._known, self.inputs
        shape = queue[0][2][1].shape
        loose = most = 0
        for count in range(reach):
            try:
                number, function, arguments = queue[count]
            except IndexError:
                return
            self.looks += 1
            if function is not run_fusible:
                return
            _, op, operands, outs = arguments
            if op.shape != shape or op.device != device:
                return
            refs: list[int] = []
            linked = False
            for operand, expected in zip(operands, op.expected, strict=True):
                if expected is None:
                    inputs.append(operand)
                    refs.append(-len(inputs))
                    continue
                ref = known.get(id(operand))
                if ref is None:
                    ref = self._input(operand, expected)
                    if ref is None:
                        return
                elif ref >= 0:
                    if wiring[ref][0].result is not expected:
                        return
                    linked = True
                elif operand.meta is not expected:
                    return
                refs.append(ref)
            if op.special and not self._admits(op, operands[0], refs[0]):
                return
            if self._written:
                if not self._written.isdisjoint(self._shared):
                    return
                linked = True
            self.numbers.append(number)
            wiring.append((op, tuple(refs)))
            if outs:
                slot = outs[0]
                known[id(slot)] = count
                self._slots.append(slot)
            else:
                self._slots.append(None)
            loose += -1 if linked else 1
            allowed = (count + 1) // PART
            if loose <= max(1, allowed):
                self._worth = count + 1
            if loose > most:
                most, self._loosest = loose, count
                if loose > LOOSE + allowed:
                    return

    def _admits(self, op: FusibleExecutable, target: Any, ref: int) -> bool:
        """Whether an op that writes in place or can fail may be in this run; it is entered then."""
        if op.can_fail:
            if self._written:
                return False
            self._can_fail = True
        if op.inplace:
            if self._can_fail:
                return False
            if ref < 0:
                storage = target.storage
                if storage is None or storage.outgoing:
                    return False
                self._written.add(id(storage))
        return True

    def _input(self, slot: Slot, expected: Meta) -> int | None:
        value, storage = slot.value, slot.storage
        if (
            value is None
            or storage is None
            or slot.meta is not expected
            or not value.flags.c_contiguous
        ):
            return None
        if self._owners.setdefault(id(storage), id(slot)) != id(slot):
            self._shared.add(id(storage))
        self.inputs.append(value)
        ref = self._known[id(slot)] = -len(self.inputs)
        return ref

    @property
    def worthwhile(self) -> int:
        """How many of its calls, from the first on, are worth running as one."""
        return self._worth

    @property
    def loose(self) -> int:
        """How many of its calls, from the first on, have nothing to do with what follows, if none
        are worth running as one."""
        return min(len(self.numbers), max(1, self._loosest))

    def cut(self, length: int) -> None:
        """Leave away all but the first ``length`` calls."""
        del self.wiring[length:], self._slots[length:]

    def refuse(self, stream: Stream, count: int) -> None:
        """Have the first ``count`` calls run one by one."""
        if count:
            stream.unfused = self.numbers[count - 1]
        self.settled = count

    @property
    def writes(self) -> bool:
        """Whether it writes to what was there before."""
        return any(op.inplace and refs[0] < 0 for op, refs in self.wiring)

    def kept(self) -> list[int]:
        """Those of its calls with a result that something else can name."""
        uses = [1] * len(self.wiring)  # that of the call itself
        for _, refs in self.wiring:
            for ref in refs:
                if ref >= 0:
                    uses[ref] += 1
        references = _references(self._slots)
        return [
            number
            for number, (slot, count, own) in enumerate(
                zip(self._slots, references, uses, strict=True)
            )
            if slot is not None and count > own
        ]


def _references(slots: list[Slot | None]) -> list[int]:
    """How many references there are to each slot beside that of the list."""
    return [count - _OWN for count in map(sys.getrefcount, slots)]


_OWN: int = 0
# What the list and the call cost depends on the interpreter's version.
_OWN = _references([Slot()])[0]


def run_fusible(
    number: int,
    session: WorkerSession,
    op: FusibleExecutable,
    operands: list[Any],
    outs: list[Slot],
) -> object:
    """Item of a stream: one call as ``server.execute.run_plan``, and with it those behind it that
    can run as one with it. They are taken from the queue then, up to the last one."""
    stream = _stream_of(number, session)
    queue = stream.queue
    if (
        number > stream.unfused
        and len(queue) > 1
        and queue[1][1] is run_fusible
        and _run_ahead(session, stream, op.device)
    ):
        return None
    return run_plan(number, session, op, operands, outs)


def _stream_of(number: int, session: WorkerSession) -> Stream:
    """The stream that has come to record ``number``."""
    for stream in list(session.streams.values()):
        try:
            if stream.queue[0][0] == number:
                return stream
        except IndexError:
            continue  # empty
    return session.default


def _run_ahead(session: WorkerSession, stream: Stream, device: int) -> bool:
    """Run the head of the queue and what follows as one; False if nothing was done."""
    fusion = session.fusion
    run = Run(stream, device, fusion.reach(stream))
    done = _run_as_one(session, stream, run)
    fusion.learn(stream, run)
    return done


def _run_as_one(session: WorkerSession, stream: Stream, run: Run) -> bool:
    """Run as much of it as can be; False if nothing was done."""
    if run.worthwhile < 2:
        run.refuse(stream, run.loose)
        return False
    run.cut(run.worthwhile)
    kept = run.kept()
    if session.streams and kept and kept[0] + 1 < len(run.wiring):
        # Another stream may wait for this one: it gets it as early as it would one by one.
        if kept[0] == 0:
            run.refuse(stream, _leading(kept))
            return False
        run.cut(kept[0] + 1)
        kept = run.kept()
    program = session.fusion.program(run.wiring, kept)
    while program is None and len(run.wiring) >= 4:
        run.cut(len(run.wiring) // 2)
        kept = run.kept()
        program = session.fusion.program(run.wiring, kept)
    if program is None:
        run.refuse(stream, len(run.numbers))
        return False
    made = _made(session, run, kept)
    if len(made) < len(kept):
        # No room for this one: its turn comes when what is before it has run.
        length = kept[len(made)]
        del made  # it takes the room
        run.cut(length)
        kept = run.kept()
        made = _made(session, run, kept)
        program = session.fusion.program(run.wiring, kept) if length > 1 else None
        if program is None or len(made) < len(kept):
            # The next few are no better off: memory comes back as one after the other has run.
            run.refuse(stream, min(len(run.numbers), max(length + 1, LEAST // 2)))
            return False
    return _execute(session, stream, run, program, list(zip(kept, made, strict=True)))


def _leading(kept: list[int]) -> int:
    """How many calls from the first on are all kept."""
    return next((k for k, number in enumerate(kept) if number != k), len(kept))


def _made(session: WorkerSession, run: Run, kept: list[int]) -> list[tuple[Any, Storage]]:
    """Memory for results, up to the first for which there is none."""
    made: list[tuple[Any, Storage]] = []
    for number in kept:
        meta = run.wiring[number][0].result
        assert meta is not None
        try:
            storage = Storage(session.quota, meta.nbytes)
            made.append((session.backend.empty(meta.shape, meta.dtype, meta.device), storage))
        except Exception:
            break
    return made


def _execute(
    session: WorkerSession,
    stream: Stream,
    run: Run,
    program: Fused,
    results: list[tuple[int, tuple[Any, Storage]]],
) -> bool:
    queue, length = stream.queue, len(run.wiring)
    try:
        program(run.inputs, [array for _, (array, _) in results])
    except Exception as error:
        run.refuse(stream, length)
        if not run.writes:
            return False
        _spoil(session, stream, length, error)
    else:
        for number, (array, storage) in results:
            _, op, _, outs = queue[number][2]
            outs[0].fill(array, op.result, storage)
    run.settled = length
    session.ops_executed += length
    session.fusion.ops += length
    for _ in range(length - 1):
        queue.popleft()
    return True


def _spoil(session: WorkerSession, stream: Stream, length: int, error: Exception) -> None:
    """Something was written to by halves, and nobody knows how far the ops came."""
    number, _, (_, op, _, _) = stream.queue[0]
    failure = session.failed(number, op.name, error)
    for position in range(length):
        _, op, operands, outs = stream.queue[position][2]
        poison_op(op, operands, outs, failure)
