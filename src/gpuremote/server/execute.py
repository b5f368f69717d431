"""Running a plan call: operands in, memory counted, results into their slots."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from gpuremote._speed import native
from gpuremote._types import Shape
from gpuremote.backend.base import Backend
from gpuremote.errors import InternalError, OpError, OpFailed, ProtocolError, ShapeError
from gpuremote.ops.client_kernels import CodeBook
from gpuremote.ops.meta import Meta, MetaTable
from gpuremote.ops.plan import (
    Outline,
    Plan,
    arguments_of,
    decode_outline,
    layout_of,
    plan_of,
    upper_bound_nbytes,
)
from gpuremote.ops.scratch import Scratch, scratch_of, written
from gpuremote.server.storage import STALLED, Failure, Slot, Storage

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Executable", "Writes", "form_of", "poison_op", "run_plan"]


class Writes(Protocol):
    """An op that runs, and the operands that it writes to."""

    name: str
    writes: tuple[int, ...]


_FORMS: Final = {"b": "?", "i": "q", "I": "U", "f": "d", "c": "c"}


def form_of(operands: Sequence[Any]) -> bytes | None:
    """The fields of a call's operands, one letter each: ``Q`` a handle; a bool ``?``, an int ``q``
    (``U``: unsigned), a float ``d``, a complex ``c``. None: there are others (NumPy's scalars)."""
    codes = [_FORMS.get(o) if isinstance(o, str) else "Q" for o in operands]
    return None if None in codes else "".join(map(str, codes)).encode()


class Executable:
    """A plan as the worker keeps it: how to decode its calls, and the function that runs it.

    Attributes
    ----------
    layout : struct.Struct
        The record, the leading plan id included.
    form : bytes or None
        Its operands, as ``server.calls.take_calls`` reads them, see :func:`form_of`.
    reserve : int
        Bytes that a call allocates at most.
    checks : list of (int, Meta)
        What each array operand was declared to be.
    scratch : Scratch or None
        What a call takes while it runs, if that has to be counted.
    simple : Meta or None
        The result of an op that makes one new array of a known shape: most ops.
    writes : tuple of int
        Operands that it writes to.
    """

    __slots__ = (
        "checks",
        "form",
        "function",
        "ident",
        "layout",
        "n_out",
        "name",
        "outputs",
        "plan",
        "reserve",
        "run",
        "scratch",
        "simple",
        "view",
        "writes",
    )

    def __init__(self, plan: Plan, function: Callable[[Sequence[Any]], Any]) -> None:
        self.plan = plan
        self.run: Callable[..., object] = run_plan
        self.ident: int = plan.id
        self.layout: struct.Struct = plan.layout
        self.form = form_of(plan.operands)
        self.n_out: int = plan.n_out
        self.name: str = plan.spec.name
        self.view: bool = plan.spec.view
        self.writes = plan.writes
        self.outputs: tuple[Meta, ...] | None = plan.outputs
        # A view allocates nothing; where a reshape has to copy after all it is counted then.
        self.reserve = 0 if plan.spec.view else upper_bound_nbytes(plan)
        scratch = scratch_of(plan)
        self.scratch: Scratch | None = scratch if scratch.any else None
        self.function = function
        self.checks = [
            (position, operand)
            for position, operand in enumerate(plan.operands)
            if isinstance(operand, Meta)
        ]
        self.simple: Meta | None = None
        if self.outputs is not None and len(self.outputs) == 1 and not self.view:
            self.simple = self.outputs[0]

    @staticmethod
    def from_wire(
        blob: Any,
        metas: MetaTable,
        backend: Backend,
        devices: int,
        code: CodeBook,
        make: Callable[[Plan, Callable[[Sequence[Any]], Any]], Executable],
    ) -> Executable:
        """Build from a DEFINE record; ``make`` gives the executable of a plan and its function.

        Raises
        ------
        ProtocolError
            The definition is malformed.
        """
        outline = decode_outline(blob, metas)
        if not 0 <= outline.device < devices:
            raise ProtocolError(f"plan {outline.id} is for device {outline.device}, of {devices}")
        writes = None
        try:
            code.enter(outline.params)
            plan = plan_of(outline, metas)
            writes = plan.writes
            return make(plan, backend.compile(plan))
        except OpError as error:
            return RefusedPlan(outline, error, writes)
        except Exception as error:
            # What the backend's library says to a kernel that the program brings, for one.
            found = backend.translate_error(error)
            refused = found if isinstance(found, OpError) else OpFailed(found.message)
            return RefusedPlan(outline, refused, writes)

    def operands(
        self, fields: tuple[Any, ...], table: dict[int, Slot], missing: Callable[[int], Slot]
    ) -> list[Any]:
        """Slots and scalars of one call, in operand order."""
        try:
            return self.plan.arguments(fields, table.__getitem__)
        except KeyError:
            return self.plan.arguments(fields, missing)

    def run_otherwise(
        self, number: int, session: WorkerSession, operands: list[Any], outs: list[Slot]
    ) -> object:
        """What is too rare for the part in C, which runs most calls."""
        return python_run_plan(number, session, self, operands, outs)

    def check_result(self, result: Any, meta: Meta) -> None:
        """Raise if a result is not what the op's rule said."""
        if result.shape != meta.shape or result.dtype != meta.dtype:
            raise InternalError(
                f"{self.name} gave {result.dtype}{result.shape}, its rule said {meta}"
            )

    def failed(
        self,
        number: int,
        session: WorkerSession,
        operands: list[Any],
        outs: list[Slot],
        error: Exception,
    ) -> None:
        """Tell of a call that failed, and poison what it should have written."""
        poison_op(self, operands, outs, session.failed(number, self.name, error))


class RefusedPlan(Executable):
    """A plan that can't run here: an op of a newer client's, or one that promotes differently.

    Its calls fail, one by one, and the session goes on.

    Parameters
    ----------
    outline : Outline
    error : OpError
        Why.
    writes : tuple of int, optional
        Operands that it would have written to. Where that is not known, an op without results is
        taken for one that writes to its first.
    """

    __slots__ = ("_kinds",)

    def __init__(
        self, outline: Outline, error: OpError, writes: tuple[int, ...] | None = None
    ) -> None:
        self._kinds = outline.operands
        self.run = run_plan
        self.ident = outline.id
        self.layout = layout_of(outline.operands)
        self.form = form_of(outline.operands)
        self.n_out = len(outline.dtypes)
        self.name = outline.name[:64]
        self.view = False
        if writes is None:
            first = not outline.dtypes and isinstance(next(iter(self._kinds), None), Meta)
            writes = (0,) if first else ()
        self.writes = writes
        self.outputs = None
        self.reserve = 0
        self.scratch = None
        self.checks = []
        self.simple = None
        # Not the error itself: with its traceback it would hold on to what it passed.
        kind, message = type(error), error.message

        def refuse(_: Sequence[Any]) -> Any:
            raise kind(message, op=self.name)

        self.function = refuse

    def operands(
        self, fields: tuple[Any, ...], table: dict[int, Slot], missing: Callable[[int], Slot]
    ) -> list[Any]:
        return arguments_of(
            self._kinds, fields, lambda handle: table.get(handle) or missing(handle)
        )


def python_run_plan(
    number: int, session: WorkerSession, op: Executable, operands: list[Any], outs: list[Slot], /
) -> object:
    """Item of a stream: one call, if its operands are there (else the one that is not).

    A failure, of this op or of one that it depends on, poisons the results (and what an op in
    place should have written to) and never leaves this function.
    """
    values = []
    for operand in operands:
        if operand.__class__ is Slot:
            value = operand.value
            if value is None:
                # Read after the value: a slot that is being filled has no failure.
                if operand.failure is None:
                    return operand
                poison_op(op, operands, outs, operand.failure)
                return None
            values.append(value)
        else:
            values.append(operand)
    try:
        for position, expected in op.checks:
            if operands[position].meta is not expected:
                _check_meta(operands[position].meta, expected, op)
        # Given back when this function is done.
        room = None if op.scratch is None else _room(session, op.scratch, operands)
        if op.simple is not None:
            _run_simple(session, op, values, outs[0])
        elif not op.n_out:
            for position in op.writes:
                if operands[position].storage.outgoing:
                    return STALLED
            op.function(values)
        else:
            _run_general(session, op, operands, values, outs)
        del room
    except Exception as error:
        op.failed(number, session, operands, outs, error)
    session.ops_executed += 1
    return None


run_plan = python_run_plan
if not TYPE_CHECKING and native is not None:
    run_plan = native.run_plan


def poison_op(op: Writes, operands: Sequence[Any], outs: list[Slot], failure: Failure) -> None:
    for slot in outs:
        slot.poison(failure)
    for position in op.writes:
        # It may have been written to in part; what it holds can't be relied on.
        operands[position].poison(failure)


def _room(session: WorkerSession, scratch: Scratch, operands: list[Any]) -> Storage | None:
    """Memory counted for what an op takes while it runs."""
    spread = 0
    for position, meta in scratch.spread:
        if meta.nbytes > operands[position].storage.nbytes:
            spread += written(meta)
    nbytes = scratch.nbytes + max(0, spread - scratch.free)
    return Storage(session.quota, nbytes) if nbytes else None


def _run_simple(session: WorkerSession, op: Executable, values: list[Any], out: Slot) -> None:
    """One new array of a known shape."""
    meta = op.simple
    assert meta is not None
    # Counted before it is allocated; given back by the storage's end, also if the op fails.
    storage = Storage(session.quota, meta.nbytes)
    (result,) = op.function(values)
    if result.shape != meta.shape or result.dtype is not meta.dtype:
        op.check_result(result, meta)
    out.fill(result, meta, storage)


def _run_general(
    session: WorkerSession, op: Executable, operands: list[Any], values: list[Any], outs: list[Slot]
) -> None:
    """Several results, views, and results whose shape depends on values."""
    backend, quota = session.backend, session.quota
    reserve = op.reserve
    if op.view and op.name == "reshape" and not _stays(values[0], op.plan.bounds[0].shape):
        reserve = op.plan.bounds[0].nbytes
    reservation = Storage(quota, reserve)
    results = op.function(values)
    if op.outputs is not None and not op.view:
        storages = reservation.split([meta.nbytes for meta in op.outputs])
        for result, meta, storage, slot in zip(results, op.outputs, storages, outs, strict=True):
            if result.shape != meta.shape or result.dtype is not meta.dtype:
                op.check_result(result, meta)
            slot.fill(result, meta, storage)
        return
    root = backend.storage_of(values[0]) if op.view else None
    for result, slot in zip(results, outs, strict=True):
        shape, dtype = backend.meta(result)
        meta = session.metas.get(shape, dtype, op.plan.device)
        if root is not None and backend.storage_of(result) is root:
            slot.fill(result, meta, operands[0].storage)
        else:
            # A copy (a reshape of a transposed array), or the part of the upper bound that was
            # needed.
            del reservation
            reservation = Storage(quota, meta.nbytes)
            slot.fill(result, meta, reservation)


def _stays(array: Any, wanted: Shape) -> bool:
    """Whether a reshape gives a view, as NumPy tells and CuPy after it."""
    flags = getattr(array, "flags", None)  # one of a tensor's memory is in C order always
    if flags is None or flags.c_contiguous or not array.size:
        return True
    axes = [axis for axis in zip(array.shape, array.strides, strict=True) if axis[0] != 1]
    lengths = [length for length in wanted if length != 1]
    while axes and lengths:
        # The shortest runs of axes with as many elements as one another.
        old, stride = axes.pop()
        new = lengths.pop()
        while old != new:
            if old > new:
                new *= lengths.pop()
            else:
                length, step = axes.pop()
                if step != old * stride:
                    return False
                old *= length
    return True


def _check_meta(found: Meta | None, expected: Meta, op: Executable) -> None:
    """The client declared an operand's shape and dtype; memory was counted by them."""
    if (
        found is None
        or found.shape != expected.shape
        or found.dtype != expected.dtype
        or found.device != expected.device
    ):
        raise ShapeError(f"{op.name} was declared for {expected} and called with {found}")
