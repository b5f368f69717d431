"""Records: every kind comes back as it was sent, and nothing malformed gets through."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.wire import batch
from gpuremote.wire.batch import FIRST_PLAN, PREFIX, Op, blob_record, decode, fixed_record
from gpuremote.wire.caps import MAX_BATCH, MAX_BLOB, MAX_DEFINITION, MAX_FREES
from gpuremote.wire.frames import pack_info


class Plan:
    """The part of a plan that decoding needs."""

    def __init__(self, fields: str, n_out: int) -> None:
        self.layout = struct.Struct("<I" + fields)
        self.n_out = n_out


FIXED = {
    Op.GET: (7,),
    Op.SYNC: (batch.ALL_STREAMS,),
    Op.STREAM_USE: (1,),
    Op.STREAM_NEW: (1, 0),
    Op.STREAM_DROP: (1,),
    Op.EVENT_RECORD: (3,),
    Op.EVENT_WAIT: (3,),
    Op.EVENT_QUERY: (3,),
    Op.EVENT_SYNC: (3,),
    Op.EVENT_ELAPSED: (3, 4),
    Op.EVENT_DROP: (3,),
    Op.META: (1 << 60,),
    Op.CANCEL: (5,),
    Op.STATS: (),
    Op.COPY: (9, 1),
    Op.CLEAR_PLANS: (),
    Op.CONTENTS: (),
}
BLOBS: dict[Op, tuple[tuple[int, ...], Any]] = {
    Op.DEFINE: ((), [64, "add", 0, [], {}]),
    Op.PUT: ((), [[2, 3], "f4", 0]),
    Op.PUT_INLINE: ((), [[2], "u1", 0, b"ab"]),
    Op.SEND_TO: ((4,), {"host": "h", "port": 1, "session": b"", "ticket": b"t"}),
    Op.EXPECT: ((), [[1], "f8", 0, b"t" * 16]),
    Op.OFFER: ((), [[1 << 20], "u1", 0, b"d" * 32]),
}


FREES: dict[Op, tuple[int, ...]] = {
    Op.FREE: ((1 << 63) + 7, 1 << 63, (1 << 63) + batch.FREE_SPAN - 1),
    Op.FREE_NEAR: ((1 << 63) + 7, 1 << 63, (1 << 63) + 0xFFFF),
}


def records(body: bytes, plans: dict[int, Plan] | None = None) -> list[tuple[Any, ...]]:
    return list(decode(body, plans or {}))


def test_every_kind_is_covered() -> None:
    assert FIXED.keys() | BLOBS.keys() | FREES.keys() == set(Op) - {Op.REPEAT, Op.PATCH}


@pytest.mark.parametrize("op", FIXED)
def test_fixed_records(op: Op) -> None:
    body = PREFIX.pack(41) + fixed_record(op, *FIXED[op]) + fixed_record(Op.STATS)
    assert records(body) == [(41, op, FIXED[op]), (42, Op.STATS, ())]


@pytest.mark.parametrize("op", BLOBS)
def test_records_with_a_variable_part(op: Op) -> None:
    values, blob = BLOBS[op]
    body = PREFIX.pack(1) + blob_record(op, *values, blob=pack_info(blob))
    assert records(body) == [(1, op, (*values, blob))]


@pytest.mark.parametrize("op", FREES)
def test_frees(op: Op) -> None:
    handles = FREES[op]
    body = PREFIX.pack(5) + batch.free_record(list(handles)) + fixed_record(Op.STATS)
    assert records(body) == [(5, op, handles), (6, Op.STATS, ())]


def test_handles_that_lie_close_together_take_2_bytes() -> None:
    near = range(1 << 40, (1 << 40) + 0x10000, 0x100)
    assert len(batch.free_record([*near])) == 16 + 2 * len(near)
    assert len(batch.free_record([*near, (1 << 40) + 0x10000])) == 16 + 4 * (len(near) + 1)


def test_plan_calls_use_as_many_numbers_as_they_have_results() -> None:
    add, svd, inplace = Plan("QQ", 1), Plan("Q", 3), Plan("Qd", 0)
    plans = {FIRST_PLAN: add, FIRST_PLAN + 1: svd, FIRST_PLAN + 2: inplace}
    body = (
        PREFIX.pack(10)
        + add.layout.pack(FIRST_PLAN, 1, 2)
        + svd.layout.pack(FIRST_PLAN + 1, 10)
        + inplace.layout.pack(FIRST_PLAN + 2, 11, 0.5)
        + fixed_record(Op.GET, 12)
    )
    assert records(body, plans) == [
        (10, add, (FIRST_PLAN, 1, 2)),
        (11, svd, (FIRST_PLAN + 1, 10)),
        (14, inplace, (FIRST_PLAN + 2, 11, 0.5)),
        (15, Op.GET, (12,)),
    ]


def test_a_binary_op_takes_20_bytes() -> None:
    assert Plan("QQ", 1).layout.size == 20


def test_a_plan_may_be_defined_and_called_in_one_batch() -> None:
    plan = Plan("Q", 1)
    plans: dict[int, Plan] = {}
    body = (
        PREFIX.pack(1)
        + blob_record(Op.DEFINE, blob=pack_info([FIRST_PLAN]))
        + plan.layout.pack(FIRST_PLAN, 3)
    )
    seen = []
    for number, op, values in decode(body, plans):
        seen.append(number)
        if op == Op.DEFINE:
            plans[values[0][0]] = plan
    assert seen == [1, 2]


def test_an_undefined_plan() -> None:
    with pytest.raises(ProtocolError, match="not defined"):
        records(PREFIX.pack(1) + struct.pack("<I", FIRST_PLAN + 3))


def test_an_unknown_kind() -> None:
    with pytest.raises(ProtocolError, match="unknown kind"):
        records(PREFIX.pack(1) + struct.pack("<I", 63))


@pytest.mark.parametrize("op", [*FIXED, *BLOBS, *FREES])
def test_cut_anywhere(op: Op) -> None:
    if op in FIXED:
        record = fixed_record(op, *FIXED[op])
    elif op in FREES:
        record = batch.free_record(list(FREES[op]))
    else:
        values, blob = BLOBS[op]
        record = blob_record(op, *values, blob=pack_info(blob))
    for cut in range(1, len(record)):
        with pytest.raises(ProtocolError):
            records(PREFIX.pack(1) + record[:cut])


def test_caps() -> None:
    with pytest.raises(LimitExceeded):
        records(bytes(MAX_BATCH + 1))
    with pytest.raises(ProtocolError):
        records(PREFIX.pack(1) + struct.pack("<IIQ", Op.FREE, MAX_FREES + 1, 0) + bytes(64))
    with pytest.raises(ProtocolError):
        records(PREFIX.pack(1) + struct.pack("<II", Op.PUT, MAX_BLOB + 1) + bytes(64))
    with pytest.raises(ProtocolError):
        records(PREFIX.pack(1) + struct.pack("<II", Op.DEFINE, MAX_DEFINITION + 1) + bytes(64))
    with pytest.raises(LimitExceeded):
        blob_record(Op.PUT, blob=bytes(MAX_BLOB + 1))
    with pytest.raises(LimitExceeded):
        blob_record(Op.DEFINE, blob=bytes(MAX_DEFINITION + 1))
    with pytest.raises(ProtocolError):
        records(b"1234567")
