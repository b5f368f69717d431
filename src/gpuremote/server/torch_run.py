"""Running a call of a torch op: storages in, memory counted, new storages into their slots."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gpuremote._dtypes import DTYPES
from gpuremote.backend.base import Backend
from gpuremote.errors import OpError, ProtocolError
from gpuremote.ops.meta import MetaTable
from gpuremote.ops.torch_call import Call, Views, decode
from gpuremote.server.execute import Executable, Writes, form_of, poison_op
from gpuremote.server.storage import STALLED, Slot, Storage

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["TorchExecutable", "blocks_of"]

_BYTES = DTYPES["u1"]


class TorchExecutable(Executable):
    """A call as the worker keeps it.

    Attributes
    ----------
    call : Call
    metas : tuple of (Meta or None)
        Of the storages that it makes, as flat bytes.
    """

    __slots__ = ("call", "metas")

    def __init__(self, call: Call, backend: Backend, metas: MetaTable) -> None:
        self.call = call
        self.ident = call.id
        self.layout: struct.Struct = call.layout
        self.form = form_of(call.operands)
        self.n_out = len(call.sizes)
        self.name = call.name
        self.metas = tuple(
            None if size is None else metas.get((size,), _BYTES, call.device) for size in call.sizes
        )
        self.reserve = sum(size or 0 for size in call.sizes)
        self.function, self.writes = _compiled(call, backend)
        self.run = run_call

    @staticmethod
    def from_definition(
        blob: Any, views: Views, metas: MetaTable, backend: Backend, devices: int
    ) -> TorchExecutable:
        """Build from a DEFINE record.

        Raises
        ------
        ProtocolError
            The definition is malformed.
        """
        call = decode(blob, views)
        if call.device >= devices:
            raise ProtocolError(f"plan {call.id} is for device {call.device}, of {devices}")
        return TorchExecutable(call, backend, metas)

    def operands(
        self, fields: tuple[Any, ...], table: dict[int, Slot], missing: Callable[[int], Slot]
    ) -> list[Any]:
        found: list[Any] = []
        at = 1
        for operand in self.call.operands:
            field = fields[at]
            at += 1
            if operand.__class__ is not str:
                field = table.get(field) or missing(field)
            elif operand == "c":
                field = complex(field, fields[at])
                at += 1
            found.append(field)
        return found


def _compiled(
    call: Call, backend: Backend
) -> tuple[Callable[[Sequence[Any]], Sequence[Any]], tuple[int, ...]]:
    """The function, and what it writes to; one that fails where the op may not run here."""
    try:
        return backend.compile_call(call)
    except OpError as error:
        # Not the error itself: with its traceback it would hold on to what it passed.
        kind, message = type(error), error.message

        def refuse(_: Sequence[Any]) -> Any:
            raise kind(message, op=call.name)

        return refuse, ()


def run_call(
    number: int, session: WorkerSession, op: TorchExecutable, operands: list[Any], outs: list[Slot]
) -> object:
    """Item of a stream: one call, if its operands are there (else the one that is not).

    As ``server.execute.run_plan``.
    """
    values = blocks_of(number, session, op, operands, outs)
    if values.__class__ is not list:
        return values
    for position in op.writes:
        if operands[position].storage.outgoing:
            return STALLED
    try:
        if outs:
            _make(session, op, values, outs)
        else:
            op.function(values)
    except Exception as error:
        poison_op(op, operands, outs, session.failed(number, op.name, error))
    session.ops_executed += 1
    return None


def blocks_of(
    number: int,
    session: WorkerSession,
    op: Writes,
    operands: Sequence[Any],
    outs: list[Slot],
) -> Any:
    """The values of operands, as a list; else an operand that is not there yet, or None where one
    failed, which has been seen to then."""
    block = session.backend.block
    values = []
    for operand in operands:
        if operand.__class__ is Slot:
            value = operand.value
            if value is None:
                if operand.failure is None:
                    return operand
                poison_op(op, operands, outs, operand.failure)
                return None
            try:
                storage = block(value)
            except OpError as error:  # an array that can't be shared
                poison_op(op, operands, outs, session.failed(number, op.name, error))
                return None
            if storage is not value:
                operand.value = storage
            values.append(storage)
        else:
            values.append(operand)
    return values


def _make(session: WorkerSession, op: TorchExecutable, values: list[Any], outs: list[Slot]) -> None:
    # Counted before it is allocated; given back by the storage's end, also if the op fails.
    reserved = Storage(session.quota, op.reserve)
    made = op.function(values)
    if len(outs) == 1 and op.metas[0] is not None:
        outs[0].fill(made[0], op.metas[0], reserved)
        return
    sizes = [0 if meta is None else meta.nbytes for meta in op.metas]
    for block, meta, storage, slot in zip(made, op.metas, reserved.split(sizes), outs, strict=True):
        if meta is None:
            # Its size was not known; counted as soon as it is.
            known = session.metas.get((block.nbytes,), _BYTES, op.call.device)
            slot.fill(block, known, Storage(session.quota, block.nbytes))
        else:
            slot.fill(block, meta, storage)
