"""What connections with lanes put on the wire, beside the frames of TCP. Private.

::

    on the first connection, among the frames of ``_framing``:
    kind SPREAD   body = count u16 | count sizes u64 | number u64 | header; channel 0

    on each lane, one piece after the other:
    piece  = number u64 | offset u64 | raw u32 | wire u32 | codec u8 | 3 zero bytes | bytes

A SPREAD takes the place of an OPEN: the payload comes in pieces, in any order, over any lane, and
possibly before it. ``number`` counts the payloads of one direction from 0. ``raw`` bytes belong at
``offset`` of the payload; ``wire`` bytes follow, which are those (codec 0) or the same compressed.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from gpuremote.errors import ProtocolError
from gpuremote.transport._framing import MAX_OPEN, check_frame, check_header, decode_sizes

__all__ = [
    "MAX_AHEAD",
    "MAX_PIECE",
    "NUMBER",
    "PIECE",
    "SPREAD",
    "Piece",
    "check_spread",
    "decode_piece",
    "decode_spread",
    "encode_piece",
]

SPREAD: Final = 24
PIECE: Final = struct.Struct("<QQIIB3s")
NUMBER: Final = struct.Struct("<Q")
MAX_PIECE: Final = 4 << 20
"""Bytes of a piece that a receiver takes."""
MAX_AHEAD: Final = 65536
"""Payloads that may be on their way, and how far ahead of the announcements pieces may be."""


class Piece(NamedTuple):
    """The head of a piece.

    Attributes
    ----------
    number : int
        Of the payload.
    offset, raw : int
        Where in the payload, and how many bytes of it.
    wire : int
        Bytes that follow.
    codec : int
        0: they are the payload's.
    """

    number: int
    offset: int
    raw: int
    wire: int
    codec: int


def encode_piece(piece: Piece) -> bytes:
    return PIECE.pack(*piece, b"\0\0\0")


def decode_piece(head: memoryview | bytes) -> Piece:
    """The head of a piece.

    Raises
    ------
    ProtocolError
        No sender makes it.
    """
    *fields, zeros = PIECE.unpack(head)
    piece = Piece(*fields)
    fits = 0 < piece.raw <= MAX_PIECE and 0 < piece.wire <= piece.raw
    if any(zeros) or not fits or (not piece.codec and piece.wire != piece.raw):
        raise ProtocolError(f"not a piece of a payload: {piece}")
    return piece


def check_spread(length: int, kind: int, flags: int, channel: int) -> None:
    """Refuse a frame that no sender makes on the first connection.

    Raises
    ------
    ProtocolError
    """
    if kind != SPREAD or flags or channel or length > MAX_OPEN + NUMBER.size:
        check_frame(length, kind, flags, channel)


def decode_spread(body: memoryview) -> tuple[tuple[int, ...], int, memoryview]:
    """Sizes of the regions, number of the payload, and the message's header.

    Raises
    ------
    ProtocolError
    """
    sizes, at = decode_sizes(body)
    begin = at + NUMBER.size
    if len(body) < begin or not any(sizes):
        raise ProtocolError(f"{len(body)} bytes announce a payload of {sum(sizes)}")
    check_header(len(body) - begin)
    number: int = NUMBER.unpack_from(body, at)[0]
    return sizes, number, body[begin:]
