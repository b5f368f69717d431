"""From Python calls to plan calls: finds the plan of an op for these operands (or makes it),
issues it, and wraps the results. Operators have a shorter way, see ``client.operators``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

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
    first: Any = None
    core: Any = None
    device = 0
    kinds: list[Meta | str] = []
    values: list[Any] = []
    for operand in operands:
        meta = getattr(operand, "_meta", None)
        if meta is not None:
            if first is None:
                first, core, device = operand, operand._core, meta.device
            elif operand._core is not core or meta.device != device:
                _refuse_mix(spec, first, operand)
            kinds.append(meta)
            values.append(operand._id)
        else:
            code, packed = _scalar(spec, operand)
            kinds.append(code)
            values += packed
    if first is None:
        raise DTypeError("no operand is a remote array", op=spec.name)
    cls = first.__class__ if array_type is None else array_type
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
    key = (spec, device, *kinds, *params_key(params)) if params or not kinds else (spec, *kinds)
    plan = core.plans.get(key)
    if plan is None:
        plan = core.plan(key, spec, kinds, dict(params), device)
    number = core.call(plan, values)
    if plan.result is not None and plan.n_out == 1:
        return [cls(core, number, plan.result)]
    # Without known outputs (an index with integers, a shape that depends on values) the caller
    # puts the right meta in; the bound has the right dtype and number of axes.
    outputs = plan.outputs if plan.outputs is not None else plan.bounds
    return [cls(core, number + k, meta) for k, meta in enumerate(outputs)]


def _refuse_mix(spec: OpSpec, x: RemoteArray, y: RemoteArray) -> NoReturn:
    what = "belong to different sessions" if x._core is not y._core else "are on different devices"
    raise DeviceMismatch(
        f"the operands {what}; bring one over with copy_to(device) first",
        op=spec.name,
        device=f"{_where(x)} and {_where(y)}",
    )


def _where(x: RemoteArray) -> str:
    return str(x.device)


def _scalar(spec: OpSpec, value: Any) -> tuple[str, tuple[Any, ...]]:
    if isinstance(value, np.ndarray):
        if value.ndim:
            raise ImplicitTransfer(
                f"a host array of shape {value.shape} can't be mixed with remote ones: upload it "
                "with device.put(...) or asarray(...) first",
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
