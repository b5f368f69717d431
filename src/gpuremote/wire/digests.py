"""What uploads are known by: a digest, which nobody can find other bytes for, and a sketch, which
costs next to nothing and says which digests are worth the time."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from typing import Final

from gpuremote._types import BytesLike
from gpuremote.wire.caps import SKETCH

__all__ = ["SAMPLE", "SAMPLES", "digest_of", "sketch_of", "sketch_of_file"]

SAMPLES: Final = 64
SAMPLE: Final = 4096
"""Pieces of an upload that its sketch looks at, and bytes of each."""
PIECE: Final = 1 << 20
_SIZE: Final = struct.Struct("<Q")


def digest_of(view: BytesLike) -> bytes:
    """SHA-256. Of the functions that every Python has and that nobody can find two inputs for, it
    is the fastest where the processor has instructions for it."""
    return hashlib.sha256(view).digest()


def sketch_of(view: memoryview) -> bytes:
    """The sketch of flat bytes, ``caps.SHARED_LEAST`` of them or more."""
    return _sketch(view.nbytes, lambda offset: view[offset : offset + SAMPLE])


def _sketch(nbytes: int, read: Callable[[int], BytesLike]) -> bytes:
    """The beginning of the SHA-256 of the size and of pieces at equal distances, the first and the
    last one among them."""
    made = hashlib.sha256(_SIZE.pack(nbytes))
    for k in range(SAMPLES):
        made.update(read(k * (nbytes - SAMPLE) // (SAMPLES - 1)))
    return made.digest()[:SKETCH]


def sketch_of_file(descriptor: int, nbytes: int) -> bytes:
    return _sketch(nbytes, lambda offset: os.pread(descriptor, SAMPLE, offset))
