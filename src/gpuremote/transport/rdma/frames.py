"""What an RDMA connection's two ends tell each other on its control queue pair. Private.

Every send fills one slot of the peer's receive ring::

    slot  = consumed u32 | next bytes of the stream of frames
    frame = length u32 (bytes of body) | kind u8 | zero u8 | zero u16 | body

``consumed`` is how many slots of its own ring the sender of this one has posted again so far
(modulo 2**32): the receiver's credit. A slot that carries nothing else is credit only. A frame that
fits into a slot is not cut.

::

    MESSAGE     header of a message without regions
    OPEN        channel u32 | count u16 | count sizes u64 | header of a message with regions
    EAGER       bytes of header u32 | count u16 | count sizes u64 | header | payload
    PIECE       channel u32 | piece u32 | lane u16 | zero u16 | offset u64 | size u64 | segments:
                write this part of the payload there. A segment is address u64 | size u64 | rkey u32
    DROP        channel u32: nothing more of it is wanted
    DROPPED     channel u32: nothing more of it will be written
    LANE        lane u16 | zero u16 | queue pair u32 | psn u32: the lane failed, here is its new end
    LANE_READY  the same, then pieces u32: those that are still wanted
    BYE         the sender closes; it has everything it wanted to send acknowledged

Numbers are little-endian. Payload itself is written to where PIECE says, with the piece's number as
immediate data of its last write.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from gpuremote._types import BytesLike
from gpuremote.errors import ProtocolError
from gpuremote.transport._framing import MAX_HEADER, MAX_OPEN, decode_sizes, encode_sizes

__all__ = [
    "BYE",
    "CREDIT",
    "DROP",
    "DROPPED",
    "EAGER",
    "FRAME",
    "LANE",
    "LANE_READY",
    "MESSAGE",
    "OPEN",
    "PIECE",
    "LaneEnd",
    "Piece",
    "Segment",
    "check_frame",
    "decode_channel",
    "decode_eager",
    "decode_lane",
    "decode_open",
    "decode_piece",
    "encode_channel",
    "encode_eager",
    "encode_lane",
    "encode_open",
    "encode_piece",
]

CREDIT: Final = struct.Struct("<I")
FRAME: Final = struct.Struct("<IBBH")
_CHANNEL: Final = struct.Struct("<I")
_PIECE: Final = struct.Struct("<IIHHQQ")
_SEGMENT: Final = struct.Struct("<QQI")
_LANE: Final = struct.Struct("<HHII")

MESSAGE: Final = 1
OPEN: Final = 2
EAGER: Final = 3
PIECE: Final = 4
DROP: Final = 5
DROPPED: Final = 6
LANE: Final = 7
LANE_READY: Final = 8
BYE: Final = 9

MAX_SEGMENTS: Final = 256
"""Of one piece."""
_LARGEST: Final = {
    MESSAGE: MAX_HEADER,
    OPEN: MAX_OPEN + _CHANNEL.size,
    EAGER: MAX_OPEN + _CHANNEL.size,
    PIECE: _PIECE.size + MAX_SEGMENTS * _SEGMENT.size,
    DROP: _CHANNEL.size,
    DROPPED: _CHANNEL.size,
    LANE: _LANE.size,
    LANE_READY: _LANE.size + 4 * 1024,
    BYE: 0,
}


class Segment(NamedTuple):
    """Memory of the receiver that a part of a payload goes to."""

    address: int
    size: int
    rkey: int


class Piece(NamedTuple):
    """A part of a payload, and where the receiver wants it."""

    channel: int
    number: int
    lane: int
    offset: int
    size: int
    segments: tuple[Segment, ...]


class LaneEnd(NamedTuple):
    """One end of a lane, after it was made again."""

    lane: int
    queue_pair: int
    psn: int
    pieces: tuple[int, ...]


def check_frame(length: int, kind: int, zero: int, zeros: int) -> None:
    """
    Raises
    ------
    ProtocolError
        No sender makes such a frame.
    """
    largest = _LARGEST.get(kind)
    if largest is None or zero or zeros or length > largest:
        raise ProtocolError(f"not a frame of this transport (kind {kind}, {length} bytes)")


def encode_open(channel: int, sizes: list[int]) -> bytes:
    return _CHANNEL.pack(channel) + encode_sizes(sizes)


def decode_open(body: memoryview) -> tuple[int, tuple[int, ...], memoryview]:
    """Channel, sizes and header."""
    channel = decode_channel(body[: _CHANNEL.size])
    rest = body[_CHANNEL.size :]
    sizes, begin = decode_sizes(rest)
    if not sum(sizes):
        raise ProtocolError("a payload without bytes was announced")
    return channel, sizes, rest[begin:]


def encode_eager(header: int, sizes: list[int]) -> bytes:
    return _CHANNEL.pack(header) + encode_sizes(sizes)


def decode_eager(body: memoryview) -> tuple[tuple[int, ...], memoryview, memoryview]:
    """Sizes, header and payload."""
    length = decode_channel(body[: _CHANNEL.size])
    rest = body[_CHANNEL.size :]
    sizes, begin = decode_sizes(rest)
    header, payload = rest[begin : begin + length], rest[begin + length :]
    if len(header) != length or len(payload) != sum(sizes):
        raise ProtocolError(
            f"a message of {len(rest) - begin} bytes for a header of {length} and "
            f"{sum(sizes)} bytes of payload"
        )
    return sizes, header, payload


def encode_piece(piece: Piece) -> bytes:
    head = _PIECE.pack(piece.channel, piece.number, piece.lane, 0, piece.offset, piece.size)
    return head + b"".join(_SEGMENT.pack(*segment) for segment in piece.segments)


def decode_piece(body: memoryview) -> Piece:
    segments = len(body) - _PIECE.size
    if segments < _SEGMENT.size or segments % _SEGMENT.size:
        raise ProtocolError(f"a request for a piece of {len(body)} bytes")
    channel, number, lane, zero, offset, size = _PIECE.unpack_from(body)
    found = tuple(Segment(*fields) for fields in _SEGMENT.iter_unpack(body[_PIECE.size :]))
    if zero or not all(segment.size for segment in found):
        raise ProtocolError("a request for a piece with segments of no size")
    if sum(segment.size for segment in found) != size:
        raise ProtocolError(f"a request for {size} bytes with room for another number")
    return Piece(channel, number, lane, offset, size, found)


def encode_channel(channel: int) -> bytes:
    return _CHANNEL.pack(channel)


def decode_channel(body: BytesLike) -> int:
    if len(body) != _CHANNEL.size:
        raise ProtocolError(f"a channel's number of {len(body)} bytes")
    number: int = _CHANNEL.unpack(body)[0]
    return number


def encode_lane(lane: int, queue_pair: int, psn: int, pieces: Sequence[int] = ()) -> bytes:
    return _LANE.pack(lane, 0, queue_pair, psn) + struct.pack(f"<{len(pieces)}I", *pieces)


def decode_lane(body: memoryview) -> LaneEnd:
    pieces = len(body) - _LANE.size
    if pieces < 0 or pieces % 4:
        raise ProtocolError(f"a lane's end of {len(body)} bytes")
    lane, zero, queue_pair, psn = _LANE.unpack_from(body)
    if zero or queue_pair >> 24 or psn >> 24:
        raise ProtocolError("a lane's end that is none")
    return LaneEnd(lane, queue_pair, psn, struct.unpack_from(f"<{pieces // 4}I", body, _LANE.size))
