"""Reading calls: the part in C and its twin in Python queue the same; both stop at one place."""

from __future__ import annotations

import random
import struct
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuremote._speed import NATIVE, native
from gpuremote.ops.meta import MetaTable
from gpuremote.server.calls import python_take_calls, take_calls
from gpuremote.server.execute import form_of
from gpuremote.server.storage import Slot
from gpuremote.wire import caps
from gpuremote.wire.batch import FIRST_PLAN, Op, fixed_record, free_record

META = MetaTable().get((2, 3), np.dtype("f4"), 0)
VALUES: dict[str, tuple[Any, ...]] = {
    "b": (True, False),
    "i": (-1, 0, (1 << 63) - 1, -(1 << 63)),
    "I": ((1 << 63), (1 << 64) - 1),
    "f": (0.5, -0.0, float("inf")),
    "c": (1 - 2j, 0j),
}
FIELDS = {"b": "?", "i": "q", "I": "Q", "f": "d", "c": "dd", "f4": "4s"}

Take = Callable[..., tuple[int, int]]
takers = pytest.mark.parametrize(
    "take",
    [
        pytest.param(python_take_calls, id="Python"),
        pytest.param(
            take_calls,
            id="C",
            marks=pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}"),
        ),
    ],
)


class Plan:
    """As much of an executable as reading needs."""

    def __init__(self, kinds: list[Any], n_out: int) -> None:
        self.kinds = kinds
        self.form = form_of(kinds)
        self.n_out = n_out
        self.layout = struct.Struct("<I" + "".join(FIELDS.get(kind, "Q") for kind in kinds))
        self.run = object()

    def operands(self, fields: tuple[Any, ...], table: dict[int, Any], missing: Any) -> list[Any]:
        found: list[Any] = []
        rest = iter(fields[1:])
        for kind in self.kinds:
            field = next(rest)
            if kind is META:
                field = table.get(field) or missing(field)
            found.append(complex(field, next(rest)) if kind == "c" else field)
        return found


class Batch:
    """Bytes, and what is to come out of them."""

    def __init__(self, plans: dict[int, Plan]) -> None:
        self.plans = plans
        self.body = bytearray(b"\xaa" * 8)
        self.table: dict[int, Any] = {7: Slot(), 8: Slot(), (1 << 63) + 1: Slot()}
        self.queue: deque[Any] = deque()
        self.asked: list[int] = []
        self.arriving: dict[int, Any] = {}
        self.session = types.SimpleNamespace(slot=self.missing)

    def missing(self, handle: int) -> str:
        self.asked.append(handle)
        return f"missing {handle}"

    def call(self, ident: int, *operands: Any) -> None:
        fields: list[Any] = []
        for operand in operands:
            fields += [operand.real, operand.imag] if isinstance(operand, complex) else [operand]
        self.body += self.plans[ident].layout.pack(ident, *fields)

    def take(
        self, take: Take, offset: int = 8, number: int = 100, most: int = 1 << 20
    ) -> tuple[int, int]:
        body, table = memoryview(bytes(self.body)), self.table
        what = self.session, body, offset, number, self.plans, table, self.queue, most
        return take(*what, self.arriving)


@takers
def test_calls_of_every_kind(take: Take) -> None:
    rng = random.Random(5)
    plans: dict[int, Plan] = {}
    for ident in range(FIRST_PLAN, FIRST_PLAN + 40):
        kinds = [rng.choice([META, META, *VALUES]) for _ in range(rng.randrange(5))]
        plans[ident] = Plan(kinds, rng.randrange(4))
    batch = Batch(plans)
    wanted: list[tuple[int, Plan, list[Any]]] = []
    number = 100
    for _ in range(200):
        ident = rng.choice(list(plans))
        plan = plans[ident]
        given = [
            rng.choice([7, 8, (1 << 63) + 1, 9]) if kind is META else rng.choice(VALUES[kind])
            for kind in plan.kinds
        ]
        wanted.append((number, plan, given))
        batch.call(ident, *given)
        number += plan.n_out or 1
    table = dict(batch.table)
    assert batch.take(take) == (len(batch.body), number)
    assert len(batch.queue) == 200
    for (first, plan, given), (at, run, (session, op, operands, outs)) in zip(
        wanted, batch.queue, strict=True
    ):
        assert (at, run, session, op) == (first, plan.run, batch.session, plan)
        for kind, value, operand in zip(plan.kinds, given, operands, strict=True):
            if kind is META:
                assert operand is table.get(value, operand)
                assert value in table or operand == f"missing {value}"
            else:
                assert type(operand) is type(value)
                assert repr(operand) == repr(value)
        assert len(outs) == plan.n_out
        for k, slot in enumerate(outs):
            assert type(slot) is Slot
            assert batch.table[first + k] is slot
    assert len(batch.table) == 3 + sum(plan.n_out for _, plan, _ in wanted)
    assert set(batch.asked) == {9}


@takers
def test_a_result_is_the_operand_of_what_follows(take: Take) -> None:
    batch = Batch({FIRST_PLAN: Plan([META, META], 1)})
    batch.call(FIRST_PLAN, 7, 7)
    batch.call(FIRST_PLAN, 100, 101)
    assert batch.take(take) == (len(batch.body), 102)
    (_, _, (_, _, _, (first,))), (_, _, (_, _, operands, _)) = batch.queue
    # A number that is still to be given names nothing.
    assert operands == [first, "missing 101"]


@takers
@pytest.mark.parametrize("what", ["record", "plan", "NumPy's scalar", "half a call", "3 bytes"])
def test_what_is_left_to_who_calls(take: Take, what: str) -> None:
    plans = {FIRST_PLAN: Plan([META, "f"], 1), FIRST_PLAN + 1: Plan([META, "f4"], 1)}
    batch = Batch(plans)
    batch.call(FIRST_PLAN, 7, 0.5)
    end = len(batch.body)
    match what:
        case "record":
            batch.body += fixed_record(Op.STATS)
        case "plan":
            batch.body += struct.pack("<IQ", FIRST_PLAN + 2, 7)
        case "NumPy's scalar":
            batch.call(FIRST_PLAN + 1, 7, b"1234")
        case "half a call":
            batch.call(FIRST_PLAN, 7, 0.5)
            del batch.body[-1]
        case _:
            batch.body += b"abc"
    assert batch.take(take) == (end, 101)
    assert len(batch.queue) == 1
    assert len(batch.table) == 4
    assert batch.take(take, end, 101) == (end, 101)


@takers
@pytest.mark.parametrize("far", [False, True], ids=["FREE_NEAR", "FREE"])
def test_handles_that_are_freed(take: Take, far: bool) -> None:
    batch = Batch({FIRST_PLAN: Plan([META], 1)})
    last = 7 + 0xFFFF + far
    batch.table[last] = Slot()
    batch.call(FIRST_PLAN, 7)
    batch.body += free_record([last, 7, 9, 7, 8])
    batch.call(FIRST_PLAN, 7)
    batch.body += free_record([100])
    assert batch.take(take) == (len(batch.body), 104)
    (_, _, (_, _, first, _)), (_, _, (_, _, second, _)) = batch.queue
    assert isinstance(first[0], Slot)
    assert second == ["missing 7"]
    assert set(batch.table) == {(1 << 63) + 1, 102}


def frees(case: str) -> bytes:
    whole = free_record([7, 8])
    match case:
        case "cut":
            return whole[:-1]
        case "head":
            return whole[:10]
        case "many":
            return struct.pack("<IIQ", Op.FREE_NEAR, caps.MAX_FREES + 1, 7) + bytes(1 << 18)
        case _:
            return whole


@takers
@pytest.mark.parametrize("case", ["cut", "head", "many", "arriving", "no number"])
def test_what_is_freed_and_left_to_who_calls(take: Take, case: str) -> None:
    batch = Batch({})
    batch.body += frees(case)
    if case == "arriving":
        batch.arriving[7] = object()
    assert batch.take(take, most=case != "no number") == (8, 100)
    assert len(batch.table) == 3


@takers
def test_handles_beyond_every_number(take: Take) -> None:
    batch = Batch({})
    batch.table[0] = Slot()
    batch.body += struct.pack("<IIQI", Op.FREE, 1, (1 << 64) - 1, 1)
    taken = batch.take(take)
    assert taken in {(8, 100), (len(batch.body), 101)}
    assert 0 in batch.table


@takers
@pytest.mark.parametrize("n_out", [0, 1, 3])
def test_no_more_than_it_is_told(take: Take, n_out: int) -> None:
    """A record of 4 bytes may ask for thousands of results."""
    batch = Batch({FIRST_PLAN: Plan([], n_out)})
    for _ in range(10):
        batch.call(FIRST_PLAN)
    step = max(1, n_out)
    assert batch.take(take, most=4 * step + step - 1) == (8 + 4 * 4, 100 + 4 * step)
    assert len(batch.queue) == 4
    assert len(batch.table) == 3 + 4 * n_out
    for most in (0, -1, step - 1):
        assert batch.take(take, 24, 200, most) == (24, 200)
    assert batch.take(take, 24, 200, 6 * step) == (len(batch.body), 200 + 6 * step)


@takers
def test_an_error_on_the_way_loses_nothing(take: Take) -> None:
    """What was queued before stays; nothing of the call itself does."""
    batch = Batch({FIRST_PLAN: Plan([META], 1)})
    batch.call(FIRST_PLAN, 7)
    batch.call(FIRST_PLAN, 55)

    def refuse(handle: int) -> None:
        raise RuntimeError(f"no {handle}")

    batch.session.slot = refuse
    with pytest.raises(RuntimeError, match="no 55"):
        batch.take(take)
    assert len(batch.queue) == 1
    assert len(batch.table) == 4


@pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")
def test_arguments_are_checked() -> None:
    batch = Batch({FIRST_PLAN: Plan([META], 1)})
    with pytest.raises(TypeError, match="take_calls"):
        native.take_calls(batch.session)
    with pytest.raises(ValueError, match="offset"):
        batch.take(native.take_calls, -1)
    with pytest.raises(TypeError):
        native.take_calls(batch.session, "text", 0, 0, {}, {}, batch.queue, 1, {})
    with pytest.raises(TypeError):
        native.take_calls(batch.session, b"", 0, 0, {}, {}, batch.queue, 1, [])
    batch.plans[FIRST_PLAN].n_out = -1
    batch.call(FIRST_PLAN, 7)
    with pytest.raises(ValueError, match="results"):
        batch.take(native.take_calls)
