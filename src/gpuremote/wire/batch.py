"""Op batches: the records that a client sends, tens of bytes each.

A batch starts with the number of its first record (u64); every record counts, so both sides
know each one's number without sending it. A record starts with a u32: below ``FIRST_PLAN`` it
is one of the fixed kinds of :class:`Op`; from there on it is the id of a plan, and the operands
follow in the plan's own layout. A record's result is named by the record's number; a plan with
several results uses that many numbers.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

from gpuremote._types import BytesLike
from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.wire.caps import MAX_ARRAY, MAX_BATCH, MAX_BLOB, MAX_DEFINITION, MAX_FREES
from gpuremote.wire.frames import unpack_info

__all__ = [
    "FIRST_PLAN",
    "FREES",
    "FREE_SPAN",
    "PREFIX",
    "Layout",
    "Op",
    "begin",
    "blob_record",
    "decode",
    "fixed_record",
    "fixed_sizes",
    "read",
]

FIRST_PLAN: Final = 64
FREE_SPAN: Final = 1 << 32
"""Handles of one FREE record are less than this apart."""
PREFIX: Final = struct.Struct("<Q")


class Op(enum.IntEnum):
    """Records that are not plan calls."""

    DEFINE = 0
    """blob: a plan's definition."""
    FREE = 1
    """u32 n, u64 base, n x u32: handles that the client dropped, less the base."""
    GET = 2
    """u64 handle: answer with the array's bytes."""
    PUT = 3
    """blob [shape, dtype, device], or [shape, dtype, device, true]: the server may keep the bytes
    for others. They come in a PAYLOAD message."""
    PUT_INLINE = 4
    """blob [shape, dtype, device, bytes]."""
    SYNC = 5
    """u32 stream, or ALL_STREAMS: answer when everything issued before has been executed."""
    STREAM_USE = 6
    """u32 stream: the records that follow, also in later batches, go there."""
    STREAM_NEW = 7
    """u32 stream, u32 device."""
    STREAM_DROP = 8
    """u32 stream: gone once it has run dry."""
    EVENT_RECORD = 9
    """u32 event: a point in the current stream."""
    EVENT_WAIT = 10
    """u32 event: the current stream waits for it."""
    EVENT_QUERY = 11
    """u32 event: answer at once whether it has been reached."""
    EVENT_SYNC = 12
    """u32 event: answer when it has been reached."""
    EVENT_ELAPSED = 13
    """u32 event, u32 event: answer with the milliseconds between them."""
    EVENT_DROP = 14
    """u32 event."""
    META = 15
    """u64 handle: answer with shape and dtype."""
    CANCEL = 16
    """u64 number: a PUT or EXPECT whose bytes will not come."""
    SEND_TO = 17
    """u64 handle, blob {address, session, ticket}: bring the array to another server."""
    EXPECT = 18
    """blob [shape, dtype, device, ticket]: another server brings the bytes."""
    STATS = 19
    """Answer with the worker's counters."""
    COPY = 20
    """u64 handle, u32 device: a copy on another device of this server."""
    CLEAR_PLANS = 21
    """Every plan is forgotten."""
    OFFER = 22
    """blob [shape, dtype, device, digest]: as PUT, and answer whether the bytes are here already.
    If not, the PAYLOAD has to come."""
    CONTENTS = 23
    """Answer with the sketches of what is here."""
    FREE_NEAR = 24
    """u32 n, u64 base, n x u16: as FREE, for handles that lie close together."""
    REPEAT = 25
    """In a batch that is expanded first only, as PATCH: see ``wire.repeats``."""
    PATCH = 26


ALL_STREAMS: Final = 0xFFFFFFFF

_KIND: Final = struct.Struct("<I")
_BLOB: Final = struct.Struct("<I")
_FREE: Final = struct.Struct("<IQ")
_FREE_ONE: Final = struct.Struct("<IIQH")
_OFFSETS: Final = {int(Op.FREE): ("I", 4), int(Op.FREE_NEAR): ("H", 2)}
"""Of the handles that a record frees."""
FREES: Final = frozenset(_OFFSETS)
"""Kinds of the records that free handles."""
_FIXED: Final[dict[int, struct.Struct]] = {
    Op.DEFINE: struct.Struct("<"),
    Op.GET: struct.Struct("<Q"),
    Op.PUT: struct.Struct("<"),
    Op.PUT_INLINE: struct.Struct("<"),
    Op.SYNC: struct.Struct("<I"),
    Op.STREAM_USE: struct.Struct("<I"),
    Op.STREAM_NEW: struct.Struct("<II"),
    Op.STREAM_DROP: struct.Struct("<I"),
    Op.EVENT_RECORD: struct.Struct("<I"),
    Op.EVENT_WAIT: struct.Struct("<I"),
    Op.EVENT_QUERY: struct.Struct("<I"),
    Op.EVENT_SYNC: struct.Struct("<I"),
    Op.EVENT_ELAPSED: struct.Struct("<II"),
    Op.EVENT_DROP: struct.Struct("<I"),
    Op.META: struct.Struct("<Q"),
    Op.CANCEL: struct.Struct("<Q"),
    Op.SEND_TO: struct.Struct("<Q"),
    Op.EXPECT: struct.Struct("<"),
    Op.STATS: struct.Struct("<"),
    Op.COPY: struct.Struct("<QI"),
    Op.CLEAR_PLANS: struct.Struct("<"),
    Op.OFFER: struct.Struct("<"),
    Op.CONTENTS: struct.Struct("<"),
}
_WITH_BLOB: Final = frozenset((Op.DEFINE, Op.PUT, Op.PUT_INLINE, Op.SEND_TO, Op.EXPECT, Op.OFFER))
_MOST: Final = {int(Op.DEFINE): MAX_DEFINITION, int(Op.PUT_INLINE): MAX_ARRAY}
_WITH_KIND: Final = {op: struct.Struct("<I" + s.format[1:]) for op, s in _FIXED.items()}


class Layout(Protocol):
    """The part of a plan that decoding needs."""

    layout: struct.Struct
    """The whole record, the leading u32 included."""
    n_out: int


def fixed_record(op: Op, *values: int) -> bytes:
    """Encode a record without a variable part."""
    return _WITH_KIND[op].pack(op, *values)


def blob_record(op: Op, *values: int, blob: bytes) -> bytes:
    """Encode a record with a msgpack part.

    Raises
    ------
    LimitExceeded
        The part is over ``MAX_BLOB``, of a definition ``MAX_DEFINITION``, of an array
        ``MAX_ARRAY``.
    """
    if len(blob) > _most(op):
        raise LimitExceeded(
            f"{len(blob)} bytes in one {op.name} record, at most {_most(op)} are allowed"
        )
    return _WITH_KIND[op].pack(op, *values) + _BLOB.pack(len(blob)) + blob


def _most(op: int) -> int:
    return _MOST.get(op, MAX_BLOB)


def free_record(handles: list[int]) -> bytes:
    """Encode a FREE or FREE_NEAR record; at most ``MAX_FREES`` handles, less than ``FREE_SPAN``
    apart."""
    if len(handles) == 1:
        return _FREE_ONE.pack(Op.FREE_NEAR, 1, handles[0], 0)
    base = min(handles)
    offsets = [handle - base for handle in handles]
    op = Op.FREE_NEAR if max(offsets) <= 0xFFFF else Op.FREE
    return struct.pack(f"<IIQ{len(handles)}{_OFFSETS[op][0]}", op, len(handles), base, *offsets)


def fixed_sizes() -> dict[int, int]:
    """Bytes of records without a variable part that change nothing but arrays, streams and events,
    by their kind."""
    others = _WITH_BLOB | {Op.CLEAR_PLANS}
    return {int(op): layout.size for op, layout in _WITH_KIND.items() if op not in others}


def decode(
    body: BytesLike, plans: Mapping[int, Layout]
) -> Iterator[tuple[int, int | Layout, tuple[Any, ...]]]:
    """Iterate over the records of a batch: number, op and values as :func:`read` has them.

    ``plans`` is looked up lazily, so the consumer can enter a plan when its DEFINE comes by.
    """
    number, offset = begin(body)
    while offset < len(body):
        op, values, offset = read(body, offset, number, plans)
        yield number, op, values
        number += 1 if isinstance(op, int) else op.n_out or 1


def begin(body: BytesLike) -> tuple[int, int]:
    """Number of the first record of a batch, and where it begins.

    Raises
    ------
    ProtocolError
        The batch is too short.
    LimitExceeded
        It is longer than ``MAX_BATCH``.
    """
    size = len(body)
    if size > MAX_BATCH:
        raise LimitExceeded(f"a batch of {size} bytes, at most {MAX_BATCH} are allowed")
    if size < PREFIX.size:
        raise ProtocolError(f"a batch of {size} bytes")
    number: int = PREFIX.unpack_from(body)[0]
    return number, PREFIX.size


def read(
    body: BytesLike, offset: int, number: int, plans: Mapping[int, Layout]
) -> tuple[int | Layout, tuple[Any, ...], int]:
    """The record that begins at ``offset``, of that number, and where the next one begins.

    Returns
    -------
    op : Layout or int
        For a call the plan, else the kind.
    values : tuple
        Of a call what its layout unpacks, the plan id first; else the fixed fields, followed by the
        decoded msgpack of records with a variable part.
    offset : int

    Raises
    ------
    ProtocolError
        Unknown kind or plan, a record cut short.
    LimitExceeded
        A size over its cap.
    """
    if len(body) - offset < _KIND.size:
        raise ProtocolError("a batch that ends within a record")
    kind: int = _KIND.unpack_from(body, offset)[0]
    if kind >= FIRST_PLAN:
        plan = plans.get(kind)
        if plan is None:
            raise ProtocolError(f"record {number} calls plan {kind}, which is not defined")
        end = offset + plan.layout.size
        if end > len(body):
            raise ProtocolError("a batch that ends within a record")
        return plan, plan.layout.unpack_from(body, offset), end
    values, end = _read_fixed(body, offset + _KIND.size, kind, number)
    return kind, values, end


def _read_fixed(
    body: BytesLike, offset: int, kind: int, number: int
) -> tuple[tuple[Any, ...], int]:
    """Fields of a record that is not a plan call, and where the next record begins."""
    size = len(body)
    if kind in _OFFSETS:
        if size - offset < _FREE.size:
            raise ProtocolError("a batch that ends within a record")
        count, base = _FREE.unpack_from(body, offset)
        offset += _FREE.size
        code, width = _OFFSETS[kind]
        if count > MAX_FREES or size - offset < width * count:
            raise ProtocolError(f"a FREE record of {count} handles that are not there")
        offsets = struct.unpack_from(f"<{count}{code}", body, offset)
        return tuple([base + one for one in offsets]), offset + width * count
    fixed = _FIXED.get(kind)
    if fixed is None:
        raise ProtocolError(f"record {number} is of unknown kind {kind}")
    if size - offset < fixed.size:
        raise ProtocolError("a batch that ends within a record")
    values = fixed.unpack_from(body, offset)
    offset += fixed.size
    if kind not in _WITH_BLOB:
        return values, offset
    if size - offset < _BLOB.size:
        raise ProtocolError("a batch that ends within a record")
    length: int = _BLOB.unpack_from(body, offset)[0]
    offset += _BLOB.size
    most = _MOST.get(kind, MAX_BLOB)
    if length > most or size - offset < length:
        raise ProtocolError(f"record {number} announces {length} bytes that are not there")
    blob = unpack_info(memoryview(body)[offset : offset + length], most)
    return (*values, blob), offset + length
