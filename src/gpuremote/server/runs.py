"""Which calls at the head of a queue can run as one.

Each call that waits is looked at before it runs, so the looking is written in C as well
(``native/runs.c``).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from gpuremote._speed import native
from gpuremote._types import Shape
from gpuremote.backend.fused import can_fail
from gpuremote.ops.meta import Meta
from gpuremote.ops.plan import Plan
from gpuremote.server.execute import Executable
from gpuremote.server.storage import Slot
from gpuremote.server.streams import Stream

__all__ = ["Call", "FusibleExecutable", "Run", "gather", "python_gather"]

PART: Final = 3
"""By one of so many the calls without a link to one before may outnumber those with one: a sum of
two products is worth it."""
LOOSE: Final = 16
"""By how many more before a look ends."""


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

    def __init__(
        self,
        plan: Plan,
        function: Callable[[Sequence[Any]], Any],
        piece: object,
        run: Callable[..., object],
    ) -> None:
        super().__init__(plan, function)
        self.run = run
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


Call: TypeAlias = tuple[FusibleExecutable, tuple[int, ...]]
"""The executable, and its operands as ``backend.fused.Chain`` has them."""


class Run:
    """The calls at the head of a queue that can run as one.

    Attributes
    ----------
    wiring : list of tuple
        For each call the executable, and its operands as ``backend.fused.Chain`` has them.
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
        self.wiring: list[Call] = []
        self.inputs: list[Any] = []
        self.numbers: list[int] = []
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
        _, function, (_, op, _, _) = stream.queue[0]
        self.looks, self._worth, self._loosest = gather(
            self, stream.queue, function, op.shape, device, reach
        )

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


def python_gather(
    run: Run,
    queue: deque[Any],
    function: Callable[..., object],
    shape: Shape,
    device: int,
    reach: int,
) -> tuple[int, int, int]:
    """Enter the calls from the head of a queue on that can run as one.

    Parameters
    ----------
    run : Run
        Takes them.
    function : callable
        That of an item which may be part of a run.
    shape : tuple of int
        What each of them computes element by element.
    reach : int
        How many to look at.

    Returns
    -------
    looks : int
        How many were looked at.
    worth : int
        How many from the first on have enough to do with each other.
    loosest : int
        Where the calls without a link first outnumber those with one by most.
    """
    wiring, known, inputs, written = run.wiring, run._known, run.inputs, run._written
    loose = most = looks = worth = loosest = 0
    length = len(queue)  # another thread may append
    while looks < reach and looks < length:
        number, item, arguments = queue[looks]
        looks += 1
        if item is not function:
            break
        _, op, operands, outs = arguments
        if op.shape != shape or op.device != device:
            break
        refs: list[int] = []
        linked = False
        for operand, expected in zip(operands, op.expected, strict=True):
            if expected is None:
                inputs.append(operand)
                refs.append(-len(inputs))
                continue
            ref = known.get(id(operand))
            if ref is None:
                ref = run._input(operand, expected)
                if ref is None:
                    return looks, worth, loosest
            elif ref >= 0:
                if wiring[ref][0].result is not expected:
                    return looks, worth, loosest
                linked = True
            elif operand.meta is not expected:
                return looks, worth, loosest
            refs.append(ref)
        if op.special and not run._admits(op, operands[0], refs[0]):
            break
        if written:
            if not written.isdisjoint(run._shared):
                break
            linked = True
        slot = outs[0] if outs else None
        if slot is not None:
            known[id(slot)] = len(wiring)
        run.numbers.append(number)
        wiring.append((op, tuple(refs)))
        run._slots.append(slot)
        loose += -1 if linked else 1
        allowed = looks // PART
        if loose <= max(1, allowed):
            worth = looks
        if loose > most:
            most, loosest = loose, looks - 1
            if loose > LOOSE + allowed:
                break
    return looks, worth, loosest


gather = python_gather
if not TYPE_CHECKING and native is not None:
    gather = native.gather
