"""Every cap on a size that a peer may announce. Checked before anything is allocated."""

from __future__ import annotations

from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20

MAX_HELLO: Final = 24 * KiB
"""Bytes of a handshake body. Small, as msgpack can unfold to 70 bytes of objects per byte."""

MAX_BATCH: Final = 1 * MiB
"""Bytes of one op batch, inline payloads included."""

INLINE_PAYLOAD: Final = 16 * KiB
"""A payload up to this size travels inside its message: one copy is cheaper than one more frame."""

MAX_INLINE: Final = 64 * KiB
"""The same on a short way, where a frame more costs more than to send the bytes does."""

MAX_BLOB: Final = 24 * KiB
"""Bytes of one variable part in a batch (address of a peer, shape)."""
MAX_ARRAY: Final = MAX_INLINE + 1 * KiB
"""The same of a small array."""

MAX_DEFINITION: Final = 768 * KiB
"""Bytes of a plan's definition: a graph can be of many ops."""
MAX_FREES: Final = 65536
"""Handles in one FREE record."""

MAX_RESULT_INFO: Final = 24 * KiB
"""Bytes of a msgpack body in a message from the server."""

WINDOW_BYTES: Final = 1 * MiB
"""Message bytes (not payload) that may be on their way before the receiver grants more."""

OVERRUN_BYTES: Final = 8 * WINDOW_BYTES
"""Message bytes beyond what was granted after which a sender breaks the protocol. Several threads
of a program that heeds its credit may each be a batch over it."""

MAX_UNREAD: Final = 32 * MiB
"""Bytes of answers that a client may have asked for and not read; array bytes wait apart."""

ACK_BYTES: Final = WINDOW_BYTES // 4
"""Message bytes after which a receiver acknowledges without having anything else to say."""

ACK_MESSAGES: Final = 256
"""Messages after which it does."""

MAX_METAS: Final = 1024
"""Shapes and dtypes that a server has checked and remembers."""
MAX_PLANS: Final = 16384
"""Plans that a session may have defined at a time."""

MAX_BULK: Final = 1024
"""Messages with a payload that may be on their way in one direction."""

MAX_STREAMS: Final = 256
MAX_EVENTS: Final = 65536
MAX_HANDLES: Final = 1 << 22
"""Live arrays of one session."""

MAX_BACKLOG: Final = 65536
"""Ops that wait in a worker's streams before it stops granting credit."""
MAX_QUESTIONS: Final = 1024
"""Questions of a client's about uploads that wait in a worker before it does."""

DIGEST: Final = 32
"""Bytes of a digest of an upload (SHA-256)."""
SKETCH: Final = 8
"""Bytes of a sketch of an upload, which tells whether its digest is worth making."""
SHARED_LEAST: Final = 1 * MiB
"""Bytes of an upload that may be kept: for less it costs more than it spares."""
SHARED_MOST: Final = 2048
"""Uploads that a server keeps for further sessions."""
