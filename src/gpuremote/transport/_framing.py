"""What TCP connections put on the stream. Private: only the two ends of a connection see it.

::

    frame   = length u32 (bytes of body) | kind u8 | flags u8 (0) | channel u16 | body
    MESSAGE   body = header of a message without regions; channel 0
    OPEN      body = count u16 | count sizes u64 | header of a message with regions; the payload
              follows on ``channel`` (if it has any byte), which is free again after its last byte
    DATA      body = next bytes of the channel's regions, as if they were one run

Numbers are little-endian. MESSAGE and OPEN come in the order of the sends; DATA of several
channels may alternate, and other frames may come between, so that nothing waits for more than
one chunk.
"""

from __future__ import annotations

import struct
from typing import Final

from gpuremote.errors import LimitExceeded, ProtocolError

__all__ = [
    "DATA",
    "FRAME",
    "MAX_CHUNK",
    "MAX_HEADER",
    "MAX_OPEN",
    "MAX_REGIONS",
    "MESSAGE",
    "OPEN",
    "check_frame",
    "check_header",
    "decode_sizes",
    "encode_sizes",
]

FRAME: Final = struct.Struct("<IBBH")
COUNT: Final = struct.Struct("<H")
ONE_SIZE: Final = struct.Struct("<HQ")

MESSAGE: Final = 1
OPEN: Final = 2
DATA: Final = 3

MAX_HEADER: Final = 4 << 20
"""Bytes of a message's header."""
MAX_REGIONS: Final = 65535
"""Regions of one message."""
MAX_CHUNK: Final = 4 << 20
"""Bytes of one DATA frame that a receiver takes."""
MAX_OPEN: Final = MAX_HEADER + COUNT.size + 8 * MAX_REGIONS
"""Bytes of the body of an OPEN frame."""
MAX_SIZE: Final = (1 << 63) - 1
"""Bytes of one region."""


def check_frame(length: int, kind: int, flags: int, channel: int) -> None:
    """Refuse a MESSAGE or OPEN frame that no sender makes.

    Raises
    ------
    ProtocolError
    """
    if flags or (channel and kind == MESSAGE) or kind not in (MESSAGE, OPEN):
        raise ProtocolError(
            f"not a frame of this transport (kind {kind}, flags {flags}, channel {channel}, "
            f"{length} bytes)"
        )
    if length > (MAX_HEADER if kind == MESSAGE else MAX_OPEN):
        raise LimitExceeded(f"a message header of {length} bytes; at most {MAX_HEADER} are taken")


def encode_sizes(sizes: list[int]) -> bytes:
    """The first part of the body of an OPEN frame."""
    if len(sizes) == 1:
        return ONE_SIZE.pack(1, sizes[0])
    return struct.pack(f"<H{len(sizes)}Q", len(sizes), *sizes)


def decode_sizes(body: memoryview) -> tuple[tuple[int, ...], int]:
    """Sizes of the regions, and where the header begins in ``body``.

    Raises
    ------
    ProtocolError
    """
    if len(body) < COUNT.size:
        raise ProtocolError(f"the opening of a payload has {len(body)} bytes")
    if len(body) >= ONE_SIZE.size and body[0] == 1 and not body[1]:
        size = ONE_SIZE.unpack_from(body)[1]
        if size > MAX_SIZE:
            raise LimitExceeded(f"a region of {size} bytes")
        return (size,), ONE_SIZE.size
    (count,) = COUNT.unpack_from(body)
    begin = COUNT.size + 8 * count
    if not count or len(body) < begin:
        raise ProtocolError(f"the opening of a payload has {len(body)} bytes for {count} sizes")
    sizes = struct.unpack_from(f"<{count}Q", body, COUNT.size)
    if max(sizes) > MAX_SIZE:
        raise LimitExceeded(f"a region of {max(sizes)} bytes")
    return sizes, begin


def check_header(nbytes: int) -> None:
    """Refuse a message header that no sender makes.

    Raises
    ------
    LimitExceeded
    """
    if nbytes > MAX_HEADER:
        raise LimitExceeded(f"a message header of {nbytes} bytes; at most {MAX_HEADER} are taken")
