"""Calls of plans, from the bytes of a batch into the queue of a stream.

Most records are such calls, and the handles of their results that are given back. An op that is
small costs the server less to run than to read. So ``take_calls`` is written in C as well
(``native/calls.c``) and takes what stands one behind the other; what it leaves,
:func:`wire.batch.read` reads, and :func:`enqueue` takes if it is a call.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gpuremote._speed import native
from gpuremote._types import BytesLike
from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.server.execute import Executable
from gpuremote.server.storage import Slot
from gpuremote.wire.batch import FREES, read

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["enqueue", "python_take_calls", "take_calls"]

_KIND: Final = struct.Struct("<I")


def enqueue(
    session: WorkerSession,
    number: int,
    plan: Executable,
    fields: tuple[Any, ...],
    table: dict[int, Slot],
    queue: deque[Any],
) -> None:
    """Queue one call.

    Parameters
    ----------
    number : int
        Of the record, and the handle of the first result.
    fields : tuple
        What ``plan.layout`` unpacks, the plan id first.
    """
    operands = plan.operands(fields, table, session.slot)
    if plan.n_out == 1:
        slot = table[number] = Slot()
        outs = [slot]
    else:
        outs = [Slot() for _ in range(plan.n_out)]
        table.update(zip(range(number, number + plan.n_out), outs, strict=True))
    queue.append((number, plan.run, (session, plan, operands, outs)))


def python_take_calls(
    session: WorkerSession,
    body: BytesLike,
    offset: int,
    number: int,
    plans: dict[int, Executable],
    table: dict[int, Slot],
    queue: deque[Any],
    most: int,
    arriving: Mapping[int, object],
) -> tuple[int, int]:
    """Queue the calls that stand one behind the other in a batch, and forget the handles that are
    freed among them.

    Parameters
    ----------
    session : WorkerSession
        Its ``slot`` is asked for handles that are not in ``table``.
    offset : int
        Where the first one begins.
    number : int
        Its number.
    plans : dict
        By id; those without ``form`` are left to who calls.
    most : int
        Numbers that they may use. (Little else runs in the worker while C queues them.)
    arriving : mapping
        Unless it is empty, what is freed is left to who calls: it may be what is on its way.

    Returns
    -------
    tuple of int
        Where the first record begins that was not taken (the end of ``body``, if all were), and its
        number. It may be no call, or be malformed: nothing is raised for that here.
    """
    size, end = len(body), number + most
    while size - offset >= _KIND.size:
        kind: int = _KIND.unpack_from(body, offset)[0]
        if kind in FREES and number < end and not arriving:
            try:
                _, handles, offset = read(body, offset, number, plans)
            except (ProtocolError, LimitExceeded):
                break
            for handle in handles:
                table.pop(handle, None)
            number += 1
            continue
        plan = plans.get(kind)
        if (
            plan is None
            or plan.form is None
            or offset + plan.layout.size > size
            or number + (plan.n_out or 1) > end
        ):
            break
        enqueue(session, number, plan, plan.layout.unpack_from(body, offset), table, queue)
        offset += plan.layout.size
        number += plan.n_out or 1
    return offset, number


take_calls = python_take_calls
if not TYPE_CHECKING and native is not None:
    take_calls = native.take_calls
