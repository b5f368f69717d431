"""Running a plan call: operands in, memory counted, results into their slots."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpuremote.backend.base import Backend
from gpuremote.errors import InternalError, ProtocolError, ShapeError
from gpuremote.ops.meta import Meta, MetaTable
from gpuremote.ops.plan import Plan, decode_definition, upper_bound_nbytes
from gpuremote.server.storage import STALLED, Failure, Slot, Storage

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Executable", "ready_values", "run_plan"]


class Executable:
    """A plan as the worker keeps it: how to decode its calls, and the function that runs it.

    Attributes
    ----------
    layout : struct.Struct
        The record, the leading plan id included.
    step : int
        Record numbers that a call uses.
    reserve : int
        Bytes that a call allocates at most.
    """

    __slots__ = (
        "checks",
        "function",
        "ident",
        "inplace",
        "layout",
        "n_out",
        "name",
        "outputs",
        "plan",
        "reserve",
        "step",
        "view",
    )

    def __init__(self, plan: Plan, function: Callable[[Sequence[Any]], Any]) -> None:
        self.plan = plan
        self.ident: int = plan.id
        self.layout: struct.Struct = plan.layout
        self.n_out: int = plan.n_out
        self.step = plan.n_out or 1
        self.name: str = plan.spec.name
        self.view: bool = plan.spec.view
        self.inplace: bool = plan.spec.inplace
        self.outputs: tuple[Meta, ...] | None = plan.outputs
        # A view allocates nothing; where a reshape has to copy after all it is counted then.
        self.reserve = 0 if plan.spec.view else upper_bound_nbytes(plan)
        self.function = function
        self.checks = [operand if isinstance(operand, Meta) else None for operand in plan.operands]

    @classmethod
    def from_wire(cls, blob: Any, metas: MetaTable, backend: Backend, devices: int) -> Executable:
        """Build from a DEFINE record.

        Raises
        ------
        ProtocolError, OpError
            The definition is malformed, or one that the op's own rules refuse.
        """
        plan = decode_definition(blob, metas)
        if not 0 <= plan.device < devices:
            raise ProtocolError(f"plan {plan.id} is for device {plan.device}, of {devices}")
        return cls(plan, backend.compile(plan))

    def operands(
        self, fields: tuple[Any, ...], table: dict[int, Slot], missing: Callable[[int], Slot]
    ) -> list[Any]:
        """Slots and scalars of one call, in operand order."""
        try:
            return self.plan.arguments(fields, table.__getitem__)
        except KeyError:
            return self.plan.arguments(fields, missing)


def ready_values(operands: list[Any]) -> Any:
    """The operands' values; STALLED while one is not there, a Failure if one never will be."""
    values = []
    for operand in operands:
        if operand.__class__ is Slot:
            value = operand.value
            if value is None:
                # The failure is read after the value: a slot that is being filled is no failure.
                return STALLED if operand.failure is None else operand.failure
            values.append(value)
        else:
            values.append(operand)
    return values


def run_plan(
    session: WorkerSession, op: Executable, operands: list[Any], values: list[Any], outs: list[Slot]
) -> None:
    """Execute one call whose operands are there.

    Raises
    ------
    OutOfDeviceMemory
        Checked before anything is allocated.
    Exception
        Whatever the backend raises.
    """
    for operand, expected in zip(operands, op.checks, strict=True):
        if expected is not None and operand.meta is not expected:
            _check_meta(operand.meta, expected, op)
    if op.inplace:
        op.function(values)
        return
    quota = session.quota
    reserved = op.reserve
    quota.reserve(reserved)
    try:
        results = op.function(values)
        expected_outputs = op.outputs
        if expected_outputs is not None and not op.view:
            for result, meta, slot in zip(results, expected_outputs, outs, strict=True):
                if result.shape != meta.shape or result.dtype != meta.dtype:
                    raise InternalError(
                        f"{op.name} gave {result.dtype}{result.shape}, its rule said {meta}"
                    )
                storage = Storage(quota, meta.nbytes, session.backend.storage_of(result))
                reserved -= meta.nbytes
                slot.fill(result, meta, storage)
        else:
            reserved -= _fill_views(session, op, operands, results, outs)
    finally:
        if reserved:
            quota.release(reserved)


def _fill_views(
    session: WorkerSession, op: Executable, operands: list[Any], results: Any, outs: list[Slot]
) -> int:
    """Results that may share an operand's memory, or whose shape depends on values.

    Returns the bytes that now belong to new storages.
    """
    backend, quota = session.backend, session.quota
    source = operands[0].storage if op.view else None
    device = op.plan.device
    claimed = 0
    for result, slot in zip(results, outs, strict=True):
        shape, dtype = backend.meta(result)
        meta = session.metas.get(shape, dtype, device)
        root = backend.storage_of(result)
        if source is not None and root is source.root:
            slot.fill(result, meta, source)
            continue
        # What the reservation covers is handed over; a copy that a view rule did not foresee
        # (a reshape of a transposed array) is counted now.
        covered = min(meta.nbytes, max(0, op.reserve - claimed))
        if meta.nbytes > covered:
            quota.reserve(meta.nbytes - covered)
        claimed += covered
        slot.fill(result, meta, Storage(quota, meta.nbytes, root))
    return claimed


def _check_meta(found: Meta | None, expected: Meta, op: Executable) -> None:
    """The client declared an operand's shape and dtype; memory was counted by them."""
    if (
        found is None
        or found.shape != expected.shape
        or found.dtype != expected.dtype
        or found.device != expected.device
    ):
        raise ShapeError(f"{op.name} was declared for {expected} and called with {found}")
