"""Messages: one fixed header, then a body whose layout the kind fixes.

::

    0      1      2          4          8                16               24
    | kind | flags| reserved | arg      | seq            | ack            | body ...

``seq`` counts the reliable messages of one direction from 1, over the whole life of a session
(0: not reliable, lost with its connection). ``ack`` is the highest number up to which the
sender of this message has everything, payloads included.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgpack

from gpuremote._types import BytesLike
from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.wire.caps import MAX_RESULT_INFO

__all__ = [
    "CANCELLED",
    "CONTINUED",
    "HEADER",
    "IGNORABLE",
    "NUMBER",
    "SEPARATE",
    "Ack",
    "Kind",
    "decode_ack",
    "encode_ack",
    "pack_info",
    "unpack_info",
]

HEADER: Final = struct.Struct("<BBHIQQ")

CONTINUED: Final = 1
"""Flag: the rest of a payload whose first part came over an earlier connection."""
CANCELLED: Final = 2
"""Flag: the payload of this number will not come (any more)."""
IGNORABLE: Final = 128
"""Flag: a peer that does not know the kind skips the message instead of failing."""


class Kind(enum.IntEnum):
    """Kinds of messages."""

    BATCH = 1
    """Client to server: op records (see ``wire.batch``)."""
    PAYLOAD = 2
    """Client to server: bytes of arrays announced by PUT records; body: their handles."""
    RESULT = 3
    """Server to client: the answer to a record; ``arg`` says how the body is to be read."""
    FAILURE = 4
    """Server to client: an op failed, or a record that asked for an answer can't have one."""
    ACK = 5
    """Both, unreliable: numbers received, credit, ops executed."""
    PING = 6
    """Both, unreliable: ``arg`` comes back in a PONG."""
    PONG = 7
    GOODBYE = 8
    """Both: the sender ends the session; body: msgpack [code, text]."""
    NOTICE = 9
    """Server to client: msgpack {"event": ..., ...}; unknown events are skipped."""


class ResultForm(enum.IntEnum):
    """How the body of a RESULT is to be read (its ``arg``)."""

    BYTES = 0
    """Inline bytes of the array after the record number."""
    PAYLOAD = 1
    """The array's bytes are the payload of the message."""
    INFO = 2
    """msgpack after the record number."""


SEPARATE: Final = 1
"""The ``arg`` of a PAYLOAD whose arrays have nothing to do with one another: where one does not
fit, the others are there all the same. 0: there are all of them, or none."""
NUMBER: Final = struct.Struct("<Q")
_ACK_FIXED: Final = struct.Struct("<QQ")


class Ack(NamedTuple):
    """What an ACK says.

    Attributes
    ----------
    limit : int
        Message bytes that the receiver of the ACK may have sent in total, since the session began.
    executed : int
        Every record up to this number has been executed, on every stream.
    delivered : tuple of int
        Messages whose payload is complete, although an earlier one's may not be.
    """

    limit: int
    executed: int
    delivered: tuple[int, ...]


def encode_ack(limit: int, executed: int, delivered: Sequence[int]) -> bytes:
    fixed = _ACK_FIXED.pack(limit, executed)
    return fixed + struct.pack(f"<{len(delivered)}Q", *delivered) if delivered else fixed


def decode_ack(body: BytesLike) -> Ack:
    extra = len(body) - _ACK_FIXED.size
    if extra < 0 or extra % 8:
        raise ProtocolError(f"an ACK of {len(body)} bytes")
    limit, executed = _ACK_FIXED.unpack_from(body)
    return Ack(limit, executed, struct.unpack_from(f"<{extra // 8}Q", body, _ACK_FIXED.size))


def pack_info(value: Any) -> bytes:
    """msgpack of plain values."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack_info(body: BytesLike, cap: int = MAX_RESULT_INFO) -> Any:
    """Decode msgpack of plain values (no extension types), sizes capped by the input's own.

    Raises
    ------
    LimitExceeded
        The body is larger than ``cap``.
    ProtocolError
        Not msgpack, truncated, trailing bytes, too deep, extension types.
    """
    if len(body) > cap:
        raise LimitExceeded(f"{len(body)} bytes of msgpack, at most {cap} are allowed")
    try:
        return msgpack.unpackb(
            body, raw=False, strict_map_key=True, use_list=True, ext_hook=_no_extension
        )
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises half a dozen unrelated classes on bad input
        raise ProtocolError(f"malformed msgpack: {type(error).__name__}: {error}") from error


def _no_extension(code: int, data: bytes) -> Any:
    raise ProtocolError(f"msgpack extension type {code} ({len(data)} bytes) is not allowed")
