"""Which uploads a server has already, and when it is worth finding out.

A digest costs time, and so does sending what is there. Where the way is slow enough, an upload is
preceded by its digest if the server said that it may have it, and comes with it otherwise. Nothing
here waits: the drivers do.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Final

from gpuremote import _clock
from gpuremote.client.waits import Wait
from gpuremote.rpc.peer import Connection
from gpuremote.transport.lanes.compression import Rule
from gpuremote.wire.caps import DIGEST_START, SHARED_LEAST

__all__ = ["PIECE", "Known"]

PIECE: Final = 4 << 20
"""Bytes that are hashed at a time: some 3 ms."""
TRIAL: Final = 1 << 20
"""Bytes that are hashed to find out how long it takes."""
REFRESH: Final = 10.0
"""Seconds after which the server is asked again what it has."""
ENOUGH: Final = 8 << 20
"""Bytes of uploads that tell how fast the way is, where the transport does not."""
FORGET: Final = 64 << 20
"""Of more, older ones count less and less."""


class Known:
    """What one session knows of the uploads that its server has.

    Parameters
    ----------
    wish : {"auto", "on", "off"}

    Attributes
    ----------
    enabled : bool
        The server keeps uploads.
    """

    def __init__(self, wish: str = "off") -> None:
        self.enabled = False
        self._wish = wish
        self._starts: set[bytes] = set()
        self._asked: Wait | None = None
        self._asked_at = 0.0
        self._sent_bytes = 0.0
        self._sent_seconds = 0.0
        self._connection: Connection | None = None
        self._told: float | None = None

    def applies(self, nbytes: int, connection: Connection | None) -> bool:
        """Whether an upload of this size may come with a digest, or tells how fast the way is."""
        if not self.enabled or self._wish == "off" or nbytes < SHARED_LEAST:
            return False
        # Where the server sees this side's memory nothing travels anyway.
        return self._wish == "on" or (connection is not None and not connection.shared)

    def worth_it(self, nbytes: int, connection: Connection | None) -> bool:
        """Whether to make its digest: it may cost a tenth of sending the bytes, as nobody knows
        whether that is of use. So much less has compression to cost, too."""
        if not self.applies(nbytes, connection):
            return False
        if self._wish == "on":
            return True
        rate = self.rate(connection)
        return rate is not None and seconds_per_byte() <= (1 - Rule.MARGIN) / rate

    def rate(self, connection: Connection | None) -> float | None:
        """Bytes per second of the way: as uploads found it, or the transport before; None: nobody
        knows."""
        if self._sent_bytes >= ENOUGH and self._sent_seconds > 0:
            return self._sent_bytes / self._sent_seconds
        if connection is not self._connection:
            told = None if connection is None else connection.describe().get("bandwidth")
            self._connection = connection
            self._told = told if isinstance(told, float) and told > 0 else None
        return self._told

    def sent(self, nbytes: int, seconds: float) -> None:
        """So many bytes went out, and the server has them."""
        self._sent_bytes += nbytes
        self._sent_seconds += seconds
        if self._sent_bytes > FORGET:
            self._sent_bytes /= 2
            self._sent_seconds /= 2

    # -- what the server has --------------------------------------------------------------------

    def ask(self, asking: Callable[[], Wait]) -> Wait | None:
        """Ask the server what it has, where that is due. What has to be waited for: only the first
        time, as an old answer is better than a wait."""
        self._learn()
        first = self._asked_at == 0.0
        if self._asked is None and (first or _clock.now() > self._asked_at + REFRESH):
            self._asked = asking()
            self._asked_at = _clock.now()
        return self._asked if first else None

    def _learn(self) -> None:
        wait = self._asked
        if wait is None or not wait.done:
            return
        self._asked = None
        found = wait.value
        if wait.error is None and isinstance(found, bytes):
            ends = range(DIGEST_START, len(found) + 1, DIGEST_START)
            self._starts = {found[end - DIGEST_START : end] for end in ends}

    def has(self, digest: bytes) -> bool:
        """Whether the server may have the bytes of this digest."""
        self._learn()
        return digest[:DIGEST_START] in self._starts

    def note(self, digest: bytes, there: bool) -> None:
        """The server has, or has not, the bytes of this digest."""
        if there:
            self._starts.add(digest[:DIGEST_START])
        else:
            self._starts.discard(digest[:DIGEST_START])


def digest_of(view: memoryview) -> bytes:
    """The digest of an upload. SHA-256: of the functions that every Python has and that nobody can
    find two inputs for, it is the fastest where the processor has instructions for it."""
    return hashlib.sha256(view).digest()


@functools.cache
def seconds_per_byte() -> float:
    """That a digest takes here; measured once."""
    trial = memoryview(bytearray(TRIAL))
    times = []
    for _ in range(3):
        begin = _clock.now()
        digest_of(trial)
        times.append(_clock.now() - begin)
    return min(times) / TRIAL
