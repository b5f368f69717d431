"""What is asked of a server in turn with torch's ops and is none: generators, files of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from gpuremote.ops.torch_call import Call, Operand, Result, encode
from gpuremote.torch._homes import Home

__all__ = ["NOTHING", "UNKNOWN", "issue_own"]

NOTHING: Final = -1
UNKNOWN: Final = -2
"""Sizes of what is made: nothing, and something of which only the server knows the size."""


def issue_own(
    place: Home,
    name: str,
    operands: tuple[Operand, ...] = (),
    values: Sequence[int] = (),
    *,
    arguments: list[Any] | None = None,
    size: int = NOTHING,
) -> int:
    """Issue it; the number of its record, and so of what it makes.

    Parameters
    ----------
    operands, values
        As for ``ops.torch_call.Call``.
    arguments : list, optional
        By default the operands in their order.
    size : int
        Bytes that it makes, or ``NOTHING`` or ``UNKNOWN``.
    """
    core = place.core
    given = [["slot", k] for k in range(len(operands))] if arguments is None else arguments
    key = (name, place, operands, str(given), size)
    plan: Any = core.plans.get(key)
    if plan is None:
        sizes: tuple[int | None, ...] = ()
        results: tuple[Result, ...] = ()
        if size == UNKNOWN:
            sizes, results = (None,), (Result(0, None, ""),)
        elif size != NOTHING:
            view = place.views.get("uint8", (size,), (1,))
            sizes, results = (size,), (Result(0, view, "uint8"),)
        with core.lock:
            ident = core.next_plan()
            plan = Call(ident, name, place.number, operands, [given, {}], sizes, results)
            core.add_plan(key, plan, encode(plan))
    return core.record_call(plan, values)
