"""Calls that repeat earlier ones: what comes out is what went in, whatever it was."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from gpuremote.errors import ProtocolError
from gpuremote.wire.batch import FIRST_PLAN, PREFIX, Op, fixed_record, free_record
from gpuremote.wire.caps import MAX_BATCH
from gpuremote.wire.repeats import ANEW, ON, Expander, learn, new_repeats, offered

pytestmark = pytest.mark.skipif(not offered(), reason="the part in C is not used")

REPEAT, PATCH = int(Op.REPEAT), int(Op.PATCH)


class Plan:
    def __init__(self, ident: int, form: str, n_out: int) -> None:
        self.ident = ident
        self.layout = struct.Struct("<I" + form)
        self.n_out = n_out


class Ends:
    """A program that issues calls, what is sent of them, and what comes out."""

    def __init__(self) -> None:
        self.repeats = new_repeats()
        self.charged = 0
        self.expander = Expander(self.charge)
        self.number = 1
        self.first = 1
        self.buffer = b""
        self.sent = 0
        self.whole = 0

    def charge(self, nbytes: int) -> None:
        self.charged += nbytes

    def plan(self, ident: int, form: str, n_out: int) -> Plan:
        made = Plan(ident, form, n_out)
        learn(self.repeats, ident, made)
        self.expander.learn(ident, made)
        return made

    def call(self, plan: Plan, *values: Any) -> int:
        self.buffer += plan.layout.pack(plan.ident, *values)
        number = self.number
        self.number += plan.n_out or 1
        return number

    def record(self, data: bytes) -> None:
        self.buffer += data
        self.number += 1

    def flush(self) -> bytes:
        body = PREFIX.pack(self.first) + self.buffer
        self.first, self.buffer = self.number, b""
        sent, arg = self.repeats.squeeze(body) or (body, 0)
        if arg:
            self.repeats.fresh = False
        self.sent += len(sent)
        self.whole += len(body)
        if arg:
            assert self.expander.expand(sent, arg) == body
        else:
            assert sent == body
        assert self.whole - self.sent == self.charged
        return sent


def steps(ends: Ends, count: int, rng: random.Random, *, diverge: float = 0.0) -> list[int]:
    """A program of layers with weights, states that the next step takes, and frees; flushed at
    any place. Bytes that each step took."""
    mm = ends.plan(FIRST_PLAN, "QQ", 1)
    scale = ends.plan(FIRST_PLAN + 1, "Qd", 1)
    norm = ends.plan(FIRST_PLAN + 2, "QQ?", 3)
    update = ends.plan(FIRST_PLAN + 3, "12Q", 0)
    weights = [ends.call(scale, 1, 0.5) for _ in range(12)]
    state = weights[0]
    took = []
    for step in range(count):
        before, made = ends.sent, []
        x = state
        for layer in range(6):
            x = ends.call(mm, x, weights[2 * layer])
            made.append(x)
            out = ends.call(norm, x, weights[2 * layer + 1], True)
            made += [out, out + 1, out + 2]
            x = ends.call(scale, out, 0.5 if rng.random() >= diverge else step)
            made.append(x)
            if rng.random() < 0.2:
                ends.flush()
            if rng.random() < 0.1:
                ends.record(fixed_record(Op.GET, x))
        state = x
        ends.call(update, *weights)
        ends.record(free_record(made[:-1]))
        if rng.random() < 0.7:
            ends.flush()
        took.append(ends.sent - before)
    ends.flush()
    return took


def test_a_step_that_repeats_takes_few_bytes() -> None:
    ends = Ends()
    took = steps(ends, 40, random.Random(0))
    assert ends.repeats.repeated > 35 * 19
    # 19 calls, that took 480 bytes; two thirds of what is left are frees.
    assert sum(took[20:]) / 20 < 200
    assert ends.whole / ends.sent > 3


@pytest.mark.parametrize("seed", range(20))
def test_whatever_it_was(seed: int) -> None:
    rng = random.Random(seed)
    ends = Ends()
    steps(ends, 30, rng, diverge=rng.choice([0.05, 0.5]))


def test_numbers_that_change_with_each_step() -> None:
    ends = Ends()
    scale = ends.plan(FIRST_PLAN, "12Q12d", 0)
    handles = range(100, 112)
    for step in range(20):
        ends.call(scale, *handles, *[step / 7] * 12)
        before = ends.sent
        sent = ends.flush()
        if step > 2:
            assert sent[8:16] == struct.pack("<II", PATCH, 1)
            assert ends.sent - before == 8 + 8 + 4 + 12 * 8


@pytest.mark.parametrize("seed", range(10))
def test_calls_without_any_order(seed: int) -> None:
    """And more of them than are kept, so that the older half goes on both sides."""
    rng = random.Random(seed)
    ends = Ends()
    plans = [
        ends.plan(FIRST_PLAN + k, rng.choice(["", "Q", "QQ", "QQQ", "d", "3Qq"]), rng.randrange(4))
        for k in range(12)
    ]
    for _ in range(40_000):
        plan = rng.choice(plans)
        values: list[Any] = []
        for code in plan.layout.format[2:].replace("3Q", "QQQ"):
            recent = rng.random() < 0.8
            handle = ends.number - rng.randrange(1, 40) if recent else rng.randrange(ends.number)
            values.append(1.5 if code == "d" else max(0, handle))
        ends.call(plan, *values)
        if rng.random() < 0.01:
            ends.flush()
    ends.flush()


def test_large_calls() -> None:
    """Where bytes and operands are what there is no room for."""
    ends = Ends()
    plans = [ends.plan(FIRST_PLAN + k, f"{300 * (k + 1)}Q", 40) for k in range(4)]
    handles = [ends.call(plans[0], *range(300))]
    for step in range(600):
        plan = plans[step % 4]
        count = 300 * (step % 4 + 1)
        made = ends.call(plan, *(handles[-1] + k % 40 if k % 3 else k for k in range(count)))
        handles.append(made)
        if step % 10 == 0:
            ends.flush()
    ends.flush()
    assert ends.repeats.repeated > 400


def test_what_can_not_be_part_of_it_is_sent_as_it_is() -> None:
    ends = Ends()
    add = ends.plan(FIRST_PLAN, "QQ", 1)
    unknown = Plan(FIRST_PLAN + 5, "Q", 1)
    for odd in (
        unknown.layout.pack(unknown.ident, 3),
        struct.pack("<II", Op.DEFINE, 0),
        fixed_record(Op.CLEAR_PLANS),
        b"\x40\0",
    ):
        body = PREFIX.pack(1) + add.layout.pack(add.ident, 1, 2) + odd
        assert ends.repeats.squeeze(body) is None


def test_after_something_that_was_not_sent() -> None:
    """Nobody knows: the other end is told to forget all."""
    ends = Ends()
    add = ends.plan(FIRST_PLAN, "QQ", 1)
    for _ in range(3):
        for _ in range(10):
            ends.call(add, 1, 2)
        ends.flush()
    lost = PREFIX.pack(ends.number) + add.layout.pack(add.ident, 7, 8)
    made = ends.repeats.squeeze(lost)
    assert made is not None
    assert made[1] == ON
    # Nobody said that it went out.
    ends.call(add, 1, 2)
    body = PREFIX.pack(ends.first) + ends.buffer
    made = ends.repeats.squeeze(body)
    assert made is not None
    assert made[1] == ANEW
    assert ends.expander.expand(*made) == body


def one_call() -> Ends:
    """Both ends keep a call."""
    ends = Ends()
    ends.call(ends.plan(FIRST_PLAN, "QQ", 1), 1, 2)
    ends.flush()
    return ends


def test_what_makes_no_sense() -> None:
    call = struct.pack("<IQQ", FIRST_PLAN, 1, 2)
    head = PREFIX.pack(2)
    back = head + struct.pack("<III", REPEAT, 1, 0)
    for body, text in (
        (b"\0", "without the number"),
        (head + b"\1", "within a record"),
        (head + struct.pack("<II", REPEAT, 1), "within a record"),
        (head + struct.pack("<III", REPEAT, 0, 1), "not kept"),
        (head + struct.pack("<III", REPEAT, 1 << 31, 1), "not kept"),
        (head + struct.pack("<III", REPEAT, 1, (1 << 32) - 1), "too long"),
        (head + struct.pack("<II", PATCH, 0), "not kept"),
        (back + struct.pack("<II", PATCH, 1), "too soon"),
        (back + struct.pack("<IIHHI", PATCH, 1, 0, 1, 0), "not in the call"),
        (back + struct.pack("<IIHHI", PATCH, 1, 5, 1, 0), "not in the call"),
        (back + struct.pack("<IIHHI", PATCH, 1, 1, 2, 0), "not in the call"),
        (head + call[:-1], "can't be in a batch"),
        (head + struct.pack("<I", FIRST_PLAN + 9), "can't be in a batch"),
        (head + struct.pack("<IIQ", Op.FREE, 1 << 31, 0), "can't be in a batch"),
        (head + struct.pack("<II", Op.DEFINE, 0), "can't be in a batch"),
    ):
        with pytest.raises(ProtocolError, match=text):
            one_call().expander.expand(body, ON)
    with pytest.raises(ProtocolError, match="form 3"):
        one_call().expander.expand(head, 3)


@pytest.mark.parametrize("seed", range(5))
def test_bytes_of_any_kind(seed: int) -> None:
    """What a client may send that means harm: an error, or no more than a batch may have."""
    rng = random.Random(seed)
    ends = Ends()
    for k in range(8):
        ends.plan(FIRST_PLAN + k, rng.choice(["Q", "QQ", "9Q", ""]), rng.randrange(3))
    words = [*range(30), *range(FIRST_PLAN, FIRST_PLAN + 9), 1 << 31, (1 << 32) - 1]
    for _ in range(3000):
        body = struct.pack("<20I", *(rng.choice(words) for _ in range(20)))
        try:
            assert len(ends.expander.expand(body, rng.choice((ON, ON, ANEW)))) <= MAX_BATCH
        except ProtocolError:
            pass
