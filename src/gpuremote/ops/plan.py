"""Plans: an op with everything about it that does not change from call to call.

A plan travels once (:func:`encode_definition`); each call after that is the plan's number, the
handles of its arrays and the values of its scalars, packed by ``Plan.layout``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, LimitExceeded, OpError, ProtocolError, ShapeError
from gpuremote.ops.catalogue import find
from gpuremote.ops.client_kernels import CODE, MAX_CODE
from gpuremote.ops.meta import DTYPES, Meta, MetaTable
from gpuremote.ops.operands import SCALAR_FORMATS, WEAK, Operand
from gpuremote.ops.spec import OpSpec, Params

__all__ = [
    "MAX_NBYTES",
    "MAX_NDIM",
    "Operand",
    "Plan",
    "PlanCaps",
    "decode_definition",
    "define",
    "encode_definition",
    "params_key",
    "upper_bound_nbytes",
]

MAX_NDIM = 64
"""Most axes an array may have (NumPy's own limit)."""

MAX_NBYTES = 1 << 62
"""Lengths and byte counts stay below this, so that no sum of two leaves 64 bits."""


@dataclass(frozen=True, slots=True)
class PlanCaps:
    """What a definition from the wire may hold at most.

    Attributes
    ----------
    devices : int
        Devices of the session; a definition names one below this.
    operands : int
        Operands of one plan.
    params : int
        Values in the parameters, all levels counted.
    depth : int
        Levels of lists inside the parameters.
    text : int
        Characters of a string.
    code : int
        Characters of a parameter that is text of a program.
    """

    devices: int = 1024
    operands: int = 1024
    params: int = 1024
    depth: int = 3
    text: int = 64
    code: int = MAX_CODE


class Plan:
    """An op bound to the metas of its operands, its parameters and a device.

    Made by :func:`define` or :func:`decode_definition`.

    Attributes
    ----------
    id : int
        Number of the plan in its session.
    spec : OpSpec
        The op.
    operands : tuple of Meta or str
        Metas of arrays and codes of scalars.
    params : Mapping[str, Any]
        As given, lists turned into tuples.
    device : int
        Where it runs and where its results live.
    layout : struct.Struct
        Packs a call: plan id, then for each operand a handle or the scalar's field(s).
    outputs : tuple of Meta, or None
        Metas of the results; None where they differ from call to call (see ``bounds``).
    bounds : tuple of Meta
        As ``outputs`` where that is known, else metas with the results' dtypes and number of
        axes whose lengths are upper bounds.
    nbytes_out : int
        Bytes that the results of one call take at most: 0 for in-place ops, views, and plans
        with unknown outputs (see :func:`upper_bound_nbytes`).
    n_out : int
        Number of results.
    step : int
        Record numbers that a call uses: one for each result, one if there is none.
    pack : callable
        ``layout.pack``, to be called with the plan's id first.
    result : Meta or None
        The first of ``outputs``.
    plain : bool
        Every operand is an array.
    inplace : bool
        It writes to arrays that were there before.
    writes : tuple of int
        Which operands it writes to.
    """

    __slots__ = (
        "bounds",
        "device",
        "id",
        "inplace",
        "layout",
        "n_out",
        "nbytes_out",
        "operands",
        "outputs",
        "pack",
        "params",
        "plain",
        "result",
        "spec",
        "step",
        "writes",
    )

    def __init__(
        self,
        plan_id: int,
        spec: OpSpec,
        operands: tuple[Operand, ...],
        params: Params,
        device: int,
        bounds: tuple[Meta, ...],
    ) -> None:
        self.id = plan_id
        self.spec = spec
        self.operands = operands
        self.params = params
        self.device = device
        self.layout = layout_of(operands)
        changing = spec.data_dependent or (spec.indexed and not spec.inplace and "i" in operands)
        self.bounds = bounds
        self.outputs = None if changing else bounds
        self.n_out = len(bounds)
        self.nbytes_out = 0 if changing or spec.view else sum(meta.nbytes for meta in bounds)
        self.pack = self.layout.pack
        self.step = self.n_out or 1
        self.result = self.outputs[0] if self.outputs else None
        self.inplace = spec.inplace
        self.writes: tuple[int, ...] = ()
        if spec.inplace:
            self.writes = (0,) if spec.writes is None else spec.writes(operands, params)
        self.plain = not any(isinstance(o, str) for o in operands)

    def __repr__(self) -> str:
        return f"Plan({self.id}, {self.spec.name}, {self.operands}, {dict(self.params)})"

    def arguments(self, fields: Sequence[Any], arrays: Callable[[int], Any]) -> list[Any]:
        """The arguments of one call, in operand order.

        Parameters
        ----------
        fields : sequence
            What ``layout.unpack_from`` gave, the plan id first.
        arrays : callable
            Gives the array of a handle.
        """
        if self.plain:
            return list(map(arrays, fields[1:]))
        return arguments_of(self.operands, fields, arrays)


def layout_of(operands: Sequence[Operand]) -> struct.Struct:
    """How a call with these operands is packed, the plan's id first."""
    return struct.Struct(
        "<I" + "".join("Q" if isinstance(o, Meta) else SCALAR_FORMATS[o] for o in operands)
    )


def arguments_of(
    operands: Sequence[Operand], fields: Sequence[Any], arrays: Callable[[int], Any]
) -> list[Any]:
    """As ``Plan.arguments``."""
    found: list[Any] = []
    at = 1
    for operand in operands:
        field = fields[at]
        at += 1
        if isinstance(operand, Meta):
            field = arrays(field)
        elif operand == "c":
            field = complex(field, fields[at])
            at += 1
        elif operand not in WEAK:
            field = np.frombuffer(field, DTYPES[operand])[0]
        found.append(field)
    return found


class Outline(NamedTuple):
    """A definition that came over the wire, well-formed and not yet looked up: its calls can be
    told apart, whether or not there is such an op here."""

    id: int
    name: str
    device: int
    operands: tuple[Operand, ...]
    params: dict[str, Any]
    dtypes: tuple[Any, ...]


def define(
    plan_id: int,
    spec: OpSpec,
    operands: Sequence[Operand],
    params: Params,
    device: int,
    metas: MetaTable,
) -> Plan:
    """Make a plan: check operands and parameters, and infer what comes out.

    Raises
    ------
    ShapeError, DTypeError, IndexOutOfBounds, UnsupportedOp
        The op refuses these operands or parameters; ``error.op`` names it.
    """
    try:
        if not params.keys() <= spec.params:
            extra = ", ".join(sorted(params.keys() - spec.params))
            raise ShapeError(f"no parameter named {extra} here")
        frozen = {name: _frozen(value) for name, value in params.items()}
        inferred = spec.infer(operands, frozen)
        bounds = tuple(
            metas.get(_checked(shape, dtype.itemsize), dtype, device) for shape, dtype in inferred
        )
    except OpError as error:
        if error.op is None:
            error.op = spec.name
        raise
    return Plan(plan_id, spec, tuple(operands), frozen, device, bounds)


def upper_bound_nbytes(plan: Plan) -> int:
    """Bytes that the results of one call take at most, whatever the values are.

    Unlike ``Plan.nbytes_out`` this also counts results of unknown shape, and views that turn
    into copies where the operand's layout asks for it (reshape).
    """
    return sum(meta.nbytes for meta in plan.bounds)


def params_key(params: Params) -> tuple[Hashable, ...]:
    """What stands for the parameters in the key of a plan cache.

    1, 1.0 and True are equal in Python, and so are 0.0 and -0.0; as parameters they are not.
    """
    return tuple([(name, _exactly(value)) for name, value in params.items()])


def _exactly(value: Any) -> Hashable:
    kind = value.__class__
    if kind is int or kind is str or value is None:
        return value  # type: ignore[no-any-return]
    if kind is tuple or kind is list:
        return tuple, *map(_exactly, value)
    return kind, repr(value)


def encode_definition(plan: Plan) -> list[Any]:
    """The definition as plain lists for msgpack.

    ``[id, op, device, operands, params, dtypes of the results]``, where an operand is
    ``[shape, dtype]`` or a scalar's code. The dtypes let the other end notice that its NumPy
    promotes differently from ours, before a result is read as something it is not.
    """
    return [
        plan.id,
        plan.spec.name,
        plan.device,
        [o if isinstance(o, str) else [list(o.shape), o.wire_dtype] for o in plan.operands],
        dict(plan.params),
        [meta.wire_dtype for meta in plan.bounds],
    ]


def decode_definition(obj: Any, metas: MetaTable, caps: PlanCaps | None = None) -> Plan:
    """Make a plan from a definition that came over the wire: both of the steps below."""
    return plan_of(decode_outline(obj, metas, caps), metas)


def plan_of(outline: Outline, metas: MetaTable) -> Plan:
    """Make a plan from what came over the wire.

    Raises
    ------
    OpError
        A definition that the op refuses, of an op that does not exist, or whose results have
        other dtypes here than at the peer.
    """
    plan_id, name, device, operands, params, dtypes = outline
    plan = define(plan_id, find(name), operands, params, device, metas)
    here = [meta.wire_dtype for meta in plan.bounds]
    if here != list(dtypes):
        raise DTypeError(
            f"the peer expects results of dtypes {', '.join(map(repr, dtypes))} and they would "
            f"be {', '.join(here)} here (NumPy {np.__version__}); use the same version of NumPy "
            "and of gpuremote at both ends",
            op=name,
        )
    return plan


def decode_outline(obj: Any, metas: MetaTable, caps: PlanCaps | None = None) -> Outline:
    """Read a definition that came over the wire.

    Raises
    ------
    ProtocolError
        Not a definition (LimitExceeded: one that is over a cap).
    """
    caps = caps or PlanCaps()
    if not isinstance(obj, list | tuple) or len(obj) != 6:
        raise ProtocolError("a plan definition has to be a list of six")
    plan_id, name, device, operands, params, dtypes = obj
    _integer("plan id", plan_id, 1 << 32)
    if not isinstance(name, str) or len(name) > caps.text:
        raise ProtocolError("the op of a plan has to be a short string")
    _integer("device", device, caps.devices)
    if not isinstance(operands, list | tuple):
        raise ProtocolError("the operands of a plan have to be a list")
    if len(operands) > caps.operands:
        raise LimitExceeded(f"a plan of {len(operands)} operands; at most {caps.operands}")
    if not isinstance(params, dict) or not all(isinstance(key, str) for key in params):
        raise ProtocolError("the parameters of a plan have to be a map with string keys")
    if not isinstance(dtypes, list | tuple) or len(dtypes) > MAX_NDIM:
        raise ProtocolError("the result dtypes of a plan have to be a short list")
    _check_values(params, caps)
    found = tuple(_decode_operand(operand, metas, device) for operand in operands)
    return Outline(plan_id, name, device, found, params, tuple(dtypes))


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _checked(shape: Shape, itemsize: int) -> Shape:
    if len(shape) > MAX_NDIM:
        raise ShapeError(f"an array of {len(shape)} axes; at most {MAX_NDIM}")
    nbytes = itemsize
    for length in shape:
        if not 0 <= length < MAX_NBYTES:
            raise ShapeError(f"an axis of length {length}")
        # A zero elsewhere does not excuse absurd lengths: NumPy refuses them too.
        nbytes *= length or 1
    if nbytes >= MAX_NBYTES:
        raise ShapeError(f"an array of shape {shape} and {nbytes} bytes can't exist")
    return shape


def _integer(what: str, value: Any, limit: int) -> None:
    if type(value) is not int or not 0 <= value < limit:
        raise ProtocolError(f"the {what} has to be an integer from 0 to {limit - 1}")


def _decode_operand(obj: Any, metas: MetaTable, device: int) -> Operand:
    if isinstance(obj, str):
        if obj not in SCALAR_FORMATS:
            raise ProtocolError("an operand has an unknown scalar code")
        return obj
    if not isinstance(obj, list | tuple) or len(obj) != 2:
        raise ProtocolError("an operand has to be a scalar code or a shape and a dtype")
    shape, name = obj
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ProtocolError("an operand has an unknown dtype")
    if not isinstance(shape, list | tuple):
        raise ProtocolError("the shape of an operand has to be a list")
    if len(shape) > MAX_NDIM:
        raise LimitExceeded(f"an operand of {len(shape)} axes; at most {MAX_NDIM}")
    for length in shape:
        _integer("length of an axis", length, MAX_NBYTES)
    try:
        return metas.get(_checked(tuple(shape), dtype.itemsize), dtype, device)
    except ShapeError as error:
        raise LimitExceeded(error.message) from None


def _check_values(params: Mapping[str, Any], caps: PlanCaps) -> None:
    """Refuse parameters of other types, or too many or too deep."""
    left = caps.params
    code = sum(isinstance(value, str) and len(value) for value in map(params.get, CODE))
    if code > caps.code:
        raise LimitExceeded(f"a kernel of {code} characters; at most {caps.code}")
    pending: list[tuple[Any, int]] = [
        ({name: value for name, value in params.items() if name not in CODE}, 0)
    ]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, dict | list | tuple):
            left -= len(value)
            if left < 0 or depth > caps.depth:
                raise LimitExceeded("the parameters of a plan are too many or too deep")
            if isinstance(value, dict):
                if depth:
                    raise ProtocolError("a parameter of a plan can't be a map")
                if any(len(key) > caps.text for key in value):
                    raise LimitExceeded("the name of a parameter is too long")
                pending += [(item, 1) for item in value.values()]
            else:
                pending += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            if len(value) > caps.text:
                raise LimitExceeded("a parameter of a plan is too long a string")
        elif isinstance(value, int):
            if not -(1 << 63) <= value < 1 << 64:
                raise LimitExceeded("a parameter of a plan is an integer beyond 64 bits")
        elif value is not None and not isinstance(value, float):
            raise ProtocolError(f"a parameter of a plan can't be a {type(value).__name__}")
