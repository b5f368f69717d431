"""Which uploads a server has already, and when it is worth finding out.

A digest costs time, and so does sending what is there. So the server tells the sketches of what it
has: where the way is slow enough, an upload with one of them is offered by its digest first, and
any other is sent at once, for the server to keep. Nothing here waits: the drivers do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from gpuremote import _clock
from gpuremote.client.waits import Wait
from gpuremote.rpc.peer import Connection
from gpuremote.wire.caps import SHARED_LEAST, SKETCH
from gpuremote.wire.digests import digest_of

__all__ = ["PIECE", "Known", "digest_of"]

DIGESTS: Final = 4
"""Digests that could be made of an upload while it is sent, at least."""
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
        self._sketches: set[bytes] = set()
        self._asked: Wait | None = None
        self._asked_at = 0.0  # 0: what it has is not known
        self._listed = False
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
        """Whether to look for it at the server. What is there costs its digest, and about as much
        again for the server to copy it: at the limit half of what sending it costs."""
        if not self.applies(nbytes, connection):
            return False
        if self._wish == "on":
            return True
        rate = self.rate(connection)
        return rate is not None and DIGESTS * seconds_per_byte() <= 1 / rate

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
        if wait is None or not (wait.done or wait.cancelled):
            return
        self._asked = None
        found = wait.value
        if wait.done and wait.error is None and isinstance(found, bytes):
            ends = range(SKETCH, len(found) + 1, SKETCH)
            self._sketches = {found[end - SKETCH : end] for end in ends}
            self._listed = True
        elif not self._listed:
            # The put that waited was given up, or the server has not looked: the next one asks.
            self._asked_at = 0.0

    def has(self, sketch: bytes) -> bool:
        """Whether the server may have what has this sketch."""
        self._learn()
        return sketch in self._sketches

    def note(self, sketch: bytes, there: bool) -> None:
        """The server has, or has not, what has this sketch."""
        if there:
            self._sketches.add(sketch)
        else:
            self._sketches.discard(sketch)


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
