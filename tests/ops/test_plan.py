"""Plans: layout of a call, the way over the wire, and definitions that mean harm."""

from __future__ import annotations

import math
import random
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest

from gpuremote.errors import (
    DTypeError,
    GpuRemoteError,
    LimitExceeded,
    OpError,
    ProtocolError,
    UnsupportedOp,
)
from gpuremote.ops.catalogue import CATALOGUE, find
from gpuremote.ops.client_kernels import SPECS as BROUGHT
from gpuremote.ops.meta import Meta, MetaTable
from gpuremote.ops.operands import SCALAR_FORMATS, scalar_operand
from gpuremote.ops.plan import (
    Plan,
    PlanCaps,
    decode_definition,
    define,
    encode_definition,
    params_key,
    upper_bound_nbytes,
)
from tests.ops.case import METAS
from tests.ops.cases import CASES


def meta(shape: tuple[int, ...], dtype: str = "f4", device: int = 0) -> Meta:
    return METAS.get(shape, np.dtype(dtype), device)


def plan_of(name: str, *operands: Meta | str, **params: Any) -> Plan:
    return define(7, find(name), operands, params, 0, METAS)


def test_attributes() -> None:
    plan = plan_of("add", meta((2, 3)), "f")
    assert (plan.id, plan.device, plan.n_out, plan.nbytes_out) == (7, 0, 1, 24)
    assert plan.outputs == plan.bounds == (meta((2, 3)),)
    assert plan.outputs[0] is meta((2, 3))
    assert plan.layout.format == "<IQd"
    assert not plan.plain
    assert plan_of("svd", meta((2, 3))).n_out == 3
    assert plan_of("add_", meta((2, 3)), meta((3,))).outputs == ()


def test_memory_that_a_call_takes() -> None:
    x = meta((10, 10))
    assert plan_of("reshape", x, shape=(100,)).nbytes_out == 0
    assert upper_bound_nbytes(plan_of("reshape", x, shape=(100,))) == 400
    assert plan_of("nonzero", x).nbytes_out == 0
    assert plan_of("nonzero", x).n_out == 2
    assert upper_bound_nbytes(plan_of("nonzero", x)) == 2 * 100 * 8
    masked = plan_of("getitem_mask", x, meta((10,), "b1"), index=("m",))
    assert masked.outputs is None
    assert upper_bound_nbytes(masked) == 400
    picked = plan_of("getitem_advanced", x, "i", meta((3,), "i8"), index=("s010", "a"))
    assert picked.outputs is None
    assert picked.bounds == (meta((10, 3)),)
    assert upper_bound_nbytes(picked) == 120
    assert plan_of("getitem", x, "i", index=("i",)).outputs is None
    assert plan_of("getitem", x, index=("n", "...")).outputs == (meta((1, 10, 10)),)
    written = plan_of("setitem", x, "f", "i", index=("i",))
    assert (written.outputs, written.n_out, upper_bound_nbytes(written)) == ((), 0, 0)


@pytest.mark.parametrize(
    "scalar",
    [
        True,
        5,
        -5,
        (1 << 64) - 1,
        2.5,
        math.inf,
        1 - 2j,
        np.float32(0.1),
        np.float16(2),
        np.int8(-3),
        np.bool_(True),
        np.complex64(1j),
        np.uint64(1 << 63),
        np.float64(0.1),
        np.complex128(3j),
    ],
)
def test_scalars_arrive_as_what_they_are(scalar: Any) -> None:
    code, fields = scalar_operand(scalar)
    plan = plan_of("add", meta((2,), "c16"), code)
    packed = plan.layout.pack(plan.id, 41, *fields)
    found = plan.arguments(plan.layout.unpack(packed), {41: "the array"}.__getitem__)
    assert found == ["the array", scalar]
    assert type(found[1]) is type(scalar)


def test_no_scalars() -> None:
    for value in (1 << 64, -(1 << 64), "x", None, np.datetime64(0, "s"), np.longdouble(1), [1]):
        with pytest.raises(DTypeError):
            scalar_operand(value)


def test_subclasses_of_scalars() -> None:
    class Number(int):
        pass

    assert scalar_operand(Number(3)) == ("i", (3,))


def test_keys_of_parameters() -> None:
    assert params_key({"axis": [0, [1]]}) == params_key({"axis": (0, (1,))})
    assert params_key({"axis": 0}) != params_key({"axis": 1})
    assert hash(params_key({"axis": (0, 1), "keepdims": True}))


def over_the_wire(plan: Plan) -> Any:
    return msgpack.unpackb(msgpack.packb(encode_definition(plan)))


def test_definitions_survive_the_wire() -> None:
    """Every op, with each of its parameter sets once."""
    tried = set()
    for name, cases in CASES.items():
        for case in cases():
            key = (name, params_key(case.params))
            if key in tried:
                continue
            try:
                plan = define(3, find(name), case.kinds(), case.params, 0, METAS)
            except OpError:
                continue
            tried.add(key)
            again = decode_definition(over_the_wire(plan), METAS)
            assert again.spec is plan.spec
            assert again.operands == plan.operands
            assert again.bounds == plan.bounds
            assert (again.outputs is None) == (plan.outputs is None)
            assert again.layout.format == plan.layout.format
            assert params_key(again.params) == params_key(plan.params)
    assert {name for name, _ in tried} == {
        name for name, spec in CATALOGUE.items() if not spec.path and spec not in BROUGHT
    }


def test_another_numpy_at_the_peer() -> None:
    obj = over_the_wire(plan_of("sum", meta((3,), "i4")))
    obj[5] = ["i4"]
    with pytest.raises(DTypeError, match="'i4' and they would be i8 here") as caught:
        decode_definition(obj, METAS)
    assert caught.value.op == "sum"


GOOD = [1, "add", 0, [[[2], "f4"], "f"], {}, ["f4"]]


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (None, None, ProtocolError),
        (None, [], ProtocolError),
        (None, {}, ProtocolError),
        (None, [1] * 7, ProtocolError),
        (0, -1, ProtocolError),
        (0, 1 << 32, ProtocolError),
        (0, True, ProtocolError),
        (0, "1", ProtocolError),
        (1, 5, ProtocolError),
        (1, "x" * 65, ProtocolError),
        (1, "__import__", UnsupportedOp),
        (1, b"add", ProtocolError),
        (2, -1, ProtocolError),
        (2, 1 << 20, ProtocolError),
        (2, 0.0, ProtocolError),
        (3, "ff", ProtocolError),
        (3, {}, ProtocolError),
        (3, [1, 2], ProtocolError),
        (3, ["O", "f"], ProtocolError),
        (3, ["f"] * 1025, LimitExceeded),
        (3, [[[2], "f4", 0], "f"], ProtocolError),
        (3, [[[2], "O"], "f"], ProtocolError),
        (3, [[[2], ["f4"]], "f"], ProtocolError),
        (3, [[2, "f4"], "f"], ProtocolError),
        (3, [["22", "f4"], "f"], ProtocolError),
        (3, [[[-2], "f4"], "f"], ProtocolError),
        (3, [[[2.0], "f4"], "f"], ProtocolError),
        (3, [[[True], "f4"], "f"], ProtocolError),
        (3, [[[1 << 62], "f4"], "f"], ProtocolError),
        (3, [[[1 << 61], "f4"], "f"], LimitExceeded),
        (3, [[[1] * 65, "f4"], "f"], LimitExceeded),
        (3, [[[1 << 40, 1 << 40, 0], "f4"], "f"], LimitExceeded),
        (4, None, ProtocolError),
        (4, [], ProtocolError),
        (4, {1: 2}, ProtocolError),
        (4, {"a": {}}, ProtocolError),
        (4, {"a": b""}, ProtocolError),
        (4, {"a": object()}, ProtocolError),
        (4, {"a": "x" * 65}, LimitExceeded),
        (4, {"x" * 65: 1}, LimitExceeded),
        (4, {"a": 1 << 64}, LimitExceeded),
        (4, {"a": [0] * 2000}, LimitExceeded),
        (4, {"a": [[[[[0]]]]]}, LimitExceeded),
        (4, {"axis": 0}, OpError),
        (5, None, ProtocolError),
        (5, ["f4"] * 65, ProtocolError),
        (5, ["f8"], DTypeError),
        (5, [], DTypeError),
        (5, [{}], DTypeError),
    ],
)
def test_hostile_definitions(place: int | None, value: Any, error: type[Exception]) -> None:
    obj = value
    if place is not None:
        obj = list(GOOD)
        obj[place] = value
    with pytest.raises(error):
        decode_definition(obj, METAS)
    decode_definition(GOOD, METAS)


def test_caps_can_be_lowered() -> None:
    with pytest.raises(ProtocolError, match="device"):
        decode_definition([1, "zeros", 2, [], {"shape": []}, ["f8"]], METAS, PlanCaps(devices=2))
    with pytest.raises(LimitExceeded, match="2 operands"):
        decode_definition(GOOD, METAS, PlanCaps(operands=1))


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind == 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice("abc"): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    choices: list[Any] = [
        None,
        True,
        rng.choice([0, 1, -1, 2, 63, 1 << 31, 1 << 62, (1 << 64) - 1, -(1 << 63)]),
        rng.choice([0.0, math.nan, math.inf, -1.5]),
        rng.choice([*SCALAR_FORMATS, ":", "a", "L", ""]),
        b"",
        rng.randrange(-5, 5),
    ]
    return choices[kind]


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one place in it replaced by something random."""
    if rng.random() < 0.3 or not isinstance(value, list | dict) or not value:
        return random_value(rng)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        return {**value, key: mutated(rng, value[key])}
    at = rng.randrange(len(value))
    return [*value[:at], mutated(rng, value[at]), *value[at + 1 :]]


def test_mutated_definitions_give_typed_errors() -> None:
    rng = random.Random(11)
    plans = []
    for name, cases in CASES.items():
        for case in cases():
            try:
                plan = define(3, find(name), case.kinds(), case.params, 0, METAS)
            except OpError:
                continue
            plans.append(over_the_wire(plan))
            if rng.random() < 0.5:
                break
    accepted = refused = 0
    table = MetaTable(limit=1000)
    tracemalloc.start()
    for _ in range(20_000):
        obj = mutated(rng, rng.choice(plans))
        if rng.random() < 0.3:
            obj = mutated(rng, obj)
        try:
            plan = decode_definition(obj, table)
        except GpuRemoteError:
            refused += 1
        else:
            accepted += 1
            assert all(m.ndim <= 64 and m.nbytes < 1 << 62 for m in plan.bounds)
            assert plan.layout.size < 1 << 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 10_000
    assert accepted > 200
    assert peak < 64 << 20
