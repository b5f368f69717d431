"""From Python calls to plan calls: finds the plan of an op for these operands (or makes it),
issues it, and wraps the results. Operators have a shorter way, see ``client.operators``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gpuremote.client.core import Core
from gpuremote.errors import DeviceMismatch, DTypeError, ImplicitTransfer, ShapeError
from gpuremote.ops.catalogue import find
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import scalar_operand
from gpuremote.ops.plan import params_key
from gpuremote.ops.spec import OpSpec

if TYPE_CHECKING:
    from gpuremote.client.array import RemoteArray

    A = TypeVar("A", bound=RemoteArray)

__all__ = ["NO_PARAMS", "apply", "create", "inplace"]

NO_PARAMS: Mapping[str, Any] = {}


def inplace(spec: OpSpec, x: A, *others: Any) -> A:
    """Issue an op that writes to ``x``; gives ``x``."""
    apply(spec, (x, *others))
    return x


def apply(
    spec: OpSpec,
    operands: Sequence[Any],
    params: Mapping[str, Any] = NO_PARAMS,
    array_type: type[RemoteArray] | None = None,
) -> list[Any]:
    """Issue any op; its results as arrays (none for an op in place).

    Parameters
    ----------
    operands : sequence
        Arrays of one session and device, and scalars.
    params : mapping
        What does not change from call to call.
    array_type : type, optional
        Of the results; by default that of the first array.
    """
    core, cls, device = _home(spec, operands)
    if array_type is not None:
        cls = array_type
    kinds: list[Meta | str] = []
    values: list[Any] = []
    for operand in operands:
        meta = getattr(operand, "_meta", None)
        if meta is not None:
            kinds.append(meta)
            values.append(operand._id)
        else:
            code, packed = _scalar(spec, operand)
            kinds.append(code)
            values.extend(packed)
    return _issue(core, cls, spec, kinds, values, params, device)


def create(
    core: Core,
    cls: type[A],
    name: str,
    device: int,
    params: Mapping[str, Any],
    scalars: Sequence[Any] = (),
) -> A:
    """Issue an op that makes an array out of nothing."""
    spec = find(name)
    kinds: list[Meta | str] = []
    values: list[Any] = []
    for scalar in scalars:
        code, packed = _scalar(spec, scalar)
        kinds.append(code)
        values.extend(packed)
    made: A = _issue(core, cls, spec, kinds, values, params, device)[0]
    return made


def _issue(
    core: Core,
    cls: type[A],
    spec: OpSpec,
    kinds: list[Meta | str],
    values: list[Any],
    params: Mapping[str, Any],
    device: int,
) -> list[A]:
    key = (spec, device, *kinds, params_key(params)) if params or not kinds else (spec, *kinds)
    plan = core.plans.get(key)
    if plan is None:
        plan = core.plan(key, spec, kinds, dict(params), device)
    number = core.call(plan, values)
    if spec.inplace:
        core.writes += 1
    # Without known outputs (an index with integers, a shape that depends on values) the caller
    # puts the right meta in; the bound has the right dtype and number of axes.
    outputs = plan.outputs if plan.outputs is not None else plan.bounds
    return [cls(core, number + k, meta) for k, meta in enumerate(outputs)]


def _home(spec: OpSpec, operands: Sequence[Any]) -> tuple[Core, Any, int]:
    """Session, class and device of the array operands; they have to agree."""
    first = None
    for operand in operands:
        if getattr(operand, "_meta", None) is None:
            continue
        if first is None:
            first = operand
        elif operand._core is not first._core:
            raise DeviceMismatch(
                "the operands belong to different sessions; bring one over with "
                "copy_to(device) first",
                op=spec.name,
                device=f"{_where(first)} and {_where(operand)}",
            )
        elif operand._meta.device != first._meta.device:
            raise DeviceMismatch(
                "the operands are on different devices; bring one over with copy_to(device) first",
                op=spec.name,
                device=f"{_where(first)} and {_where(operand)}",
            )
    if first is None:
        raise DTypeError("no operand is a remote array", op=spec.name)
    return first._core, first.__class__, first._meta.device


def _where(x: RemoteArray) -> str:
    return str(x.device)


def _scalar(spec: OpSpec, value: Any) -> tuple[str, tuple[Any, ...]]:
    if isinstance(value, np.ndarray):
        if value.ndim:
            raise ImplicitTransfer(
                f"a host array of shape {value.shape} can't be mixed with remote ones: upload it "
                "with device.put(...) first",
                op=spec.name,
            )
        value = value[()]
    elif isinstance(value, (list, tuple)):
        raise ShapeError(
            f"a {type(value).__name__} is no operand; make an array of it first", op=spec.name
        )
    try:
        return scalar_operand(value)
    except DTypeError as error:
        error.op = spec.name
        raise
