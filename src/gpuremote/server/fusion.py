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
from typing import TYPE_CHECKING, Any, Final

from gpuremote.backend.base import Backend
from gpuremote.backend.fused import Chain, Fused
from gpuremote.ops.plan import Plan
from gpuremote.server.execute import Executable, poison_op, run_plan
from gpuremote.server.runs import Call, FusibleExecutable, Run
from gpuremote.server.storage import Slot, Storage
from gpuremote.server.streams import Stream

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Fusion", "run_fusible"]

MAX_RUN: Final = 512
"""Ops of one run: what comes behind it, and whoever waits for its results, waits for all of it."""
LEAST: Final = 8
"""Calls that are looked at, however short the runs before were."""
MAX_PROGRAMS: Final = 1024
MAX_STEPS: Final = 1 << 15
"""Of all programs that are kept."""


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
            return FusibleExecutable(plan, function, piece, run_fusible)
        return Executable(plan, function)

    def program(self, wiring: list[Call], kept: list[int]) -> Fused | None:
        """The program of a run that is wired like this; None: the backend has none."""
        key = (tuple(wiring), tuple(kept))
        try:
            return self._programs[key]
        except KeyError:
            steps = [(op.piece, operands) for op, operands in wiring]
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
