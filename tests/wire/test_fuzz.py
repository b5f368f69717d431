"""Hostile bytes: mutated messages of every kind end in a value or a ProtocolError, quickly and
in bounded memory. Nothing else may come out."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest

from gpuremote.errors import GpuRemoteError
from gpuremote.ops.catalogue import CATALOGUE
from gpuremote.ops.meta import MetaTable
from gpuremote.ops.plan import Plan, decode_definition, define, encode_definition
from gpuremote.wire.batch import (
    FIRST_PLAN,
    PREFIX,
    Op,
    blob_record,
    decode,
    fixed_record,
    free_record,
)
from gpuremote.wire.caps import MAX_BATCH, MAX_HELLO
from gpuremote.wire.frames import decode_ack, encode_ack, pack_info, unpack_info
from gpuremote.wire.hello import Attach, Hello, HelloReader, Receipt, Refusal, Welcome

MUTATIONS = 25_000
"""Per decoder; with the four here 100,000, and as many again at the transport."""


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a length field, a cut, a repeat, a splice."""
    out = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        if not out:
            break
        at = random_.randrange(len(out))
        match random_.randrange(7):
            case 0:
                out[at] ^= 1 << random_.randrange(8)
            case 1:
                out[at] = random_.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xFF))
            case 2:
                size = random_.choice((1, 2, 4, 8))
                out[at : at + size] = random_.randbytes(size)
            case 3:
                del out[at:]
            case 4:
                piece = out[at : at + random_.randint(1, 64)]
                out[at:at] = piece * random_.randint(1, 50)
            case 5:
                value = random_.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**16, MAX_BATCH))
                out[at : at + 4] = struct.pack("<I", value)
            case 6:
                del out[at : at + random_.randint(1, 16)]
    return bytes(out)


def batches() -> list[bytes]:
    metas = MetaTable()
    meta = metas.get((3, 4), __import__("numpy").dtype("f4"), 0)
    plans = [
        define(FIRST_PLAN, CATALOGUE["add"], (meta, meta), {}, 0, metas),
        define(FIRST_PLAN + 1, CATALOGUE["sum"], (meta,), {"axis": (0, 1)}, 0, metas),
        define(FIRST_PLAN + 2, CATALOGUE["getitem"], (meta, "i"), {"index": ("i", ":")}, 0, metas),
    ]
    body = bytearray(PREFIX.pack(1))
    for plan in plans:
        body += blob_record(Op.DEFINE, blob=pack_info(encode_definition(plan)))
    body += plans[0].layout.pack(FIRST_PLAN, 1, 2) + plans[2].layout.pack(FIRST_PLAN + 2, 1, -1)
    body += free_record([1, 2, 3]) + fixed_record(Op.GET, 4) + fixed_record(Op.SYNC, 0)
    body += blob_record(Op.PUT_INLINE, blob=pack_info([[4], "u1", 0, b"abcd"]))
    body += blob_record(Op.EXPECT, blob=pack_info([[4], "u1", 0, b"t" * 16]))
    body += blob_record(Op.OFFER, blob=pack_info([[1 << 20], "u1", 0, b"d" * 32]))
    return [bytes(body), PREFIX.pack(9) + fixed_record(Op.STREAM_NEW, 1, 0)]


def decode_batch(data: bytes) -> None:
    """As the server does: definitions are entered as they come by."""
    metas = MetaTable()
    plans: dict[int, Plan] = {}
    for _, op, values in decode(data, plans):
        if op == Op.DEFINE:
            plan = decode_definition(values[0], metas)
            plans[plan.id] = plan


def decode_hello(data: bytes) -> None:
    reader = HelloReader("p")
    while data:
        step = reader.missing
        if reader.feed(data[:step]) is not None:
            return
        data = data[step:]


HELLOS = [
    Hello("x", "h", b"s" * 16, b"t" * 32, b"k", Receipt(9, [(3, 4)]), {"tcp": "yes"}, 5).encode(),
    Welcome(devices=[{"kind": "cpu", "memory": 1}], choice={"chosen": "tcp"}).encode(),
    Refusal(1, "no", {"tcp": "x"}).encode(),
    Attach(b"s" * 16, 3, b"p" * 32).encode(),
]
ACKS = [bytes(encode_ack(1, 2, [3, 4])[24:]), bytes(encode_ack(0, 0, [])[24:])]
INFOS = [pack_info([1, 2, 130, "text", "add"]), pack_info({"a": [1.5, None, True, b"x", {"b": 1}]})]

DECODERS: dict[str, tuple[list[bytes], Callable[[bytes], object], int]] = {
    "batch": (batches(), decode_batch, MAX_BATCH),
    "hello": (HELLOS, decode_hello, MAX_HELLO),
    "ack": (ACKS, decode_ack, MAX_BATCH),
    "info": (INFOS, unpack_info, MAX_BATCH),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", DECODERS)
def test_mutated_messages(name: str) -> None:
    seeds, decoder, _ = DECODERS[name]
    random_ = random.Random(f"gpuremote {name}")
    refused = accepted = 0
    for index in range(MUTATIONS):
        data = mutate(seeds[index % len(seeds)], random_)
        try:
            decoder(data)
            accepted += 1
        except GpuRemoteError:
            refused += 1
    # Mutations that change nothing structural are accepted; most must not be.
    assert refused > MUTATIONS // 5
    assert accepted + refused == MUTATIONS


@pytest.mark.parametrize("name", DECODERS)
def test_memory_stays_within_twice_the_cap(name: str) -> None:
    """The largest inputs allowed, built to unfold as much as msgpack can."""
    _, decoder, cap = DECODERS[name]
    bombs = [
        b"\x80" * (24 * 1024),
        b"\x91" * 500 + b"\xc0",
        b"\xdc\x5f\x00" + b"\x80" * 0x5F00,
        b"\xdd\xff\xff\xff\xff" + b"\xc0" * 100,
        b"\xdb\xff\xff\xff\xff" + b"x" * 100,
        b"\xc9\xff\xff\xff\xff" + b"x" * 100,
    ]
    for bomb in bombs:
        if name == "batch":
            data = PREFIX.pack(1) + struct.pack("<II", Op.DEFINE, len(bomb)) + bomb
        elif name == "hello":
            data = b"gpuR\x01\x01\x01\x00" + struct.pack("<I", len(bomb)) + bomb
        else:
            data = bomb
        tracemalloc.start()
        try:
            try:
                decoder(data)
            except GpuRemoteError:
                pass
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= 2 * max(cap, MAX_BATCH), f"{bomb[:4]!r} took {peak} bytes"
