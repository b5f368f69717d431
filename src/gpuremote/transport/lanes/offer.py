"""What lanes are asked for, and how a further connection finds the one that it belongs to.

The server's worker makes a nonce and tells it over the first connection. Whoever opens a lane shows
an HMAC over it with the session's secret, which was told to the client of this session alone.
"""

from __future__ import annotations

import hmac
import math
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from gpuremote import _clock
from gpuremote.transport.lanes.compression import CODECS
from gpuremote.transport.lanes.rule import MAX_LANES
from gpuremote.transport.tls import TlsSocket

__all__ = ["LaneGate", "LanePolicy", "LaneWishes", "Line", "lane_proof"]

Line: TypeAlias = socket.socket | TlsSocket

NONCE: Final = 32


def lane_proof(secret: bytes, nonce: bytes, number: int) -> bytes:
    """Shows that a connection is lane ``number`` of the set-up to which ``nonce`` was told."""
    return hmac.digest(secret, b"gpuremote lane\0" + bytes([number]) + nonce, "sha256")


@dataclass(slots=True)
class LanePolicy:
    """What a session wants, and how far its server has been found to be.

    Attributes
    ----------
    number : int
        Lanes; 0: as many as the way needs.
    compression : {"auto", "off", "lz4", "zstd"}
    answer : float
        Seconds that the fastest answer took, over all connections from the same address: a server
        that is busy when the session comes back is not far away.
    """

    number: int = 0
    compression: str = "auto"
    answer: float = math.inf
    _address: str = ""

    @property
    def worth_offering(self) -> bool:
        """Whether further connections can come of this."""
        return self.number != 1 or self.compression in CODECS

    def heard(self, seconds: float, address: str = "") -> float:
        """An answer took that long (at this address of this side, if it is a new connection);
        gives the fastest one."""
        if address and address != self._address:
            self._address, self.answer = address, math.inf
        self.answer = min(self.answer, seconds)
        return self.answer


@dataclass(frozen=True, slots=True)
class LaneWishes:
    """What a client wants now.

    Attributes
    ----------
    policy : LanePolicy
    dial : callable
        Opens lane ``number`` with ``proof``, until a deadline on ``_clock.now()``. Raises
        GpuRemoteError or OSError. Any thread may call it.
    """

    policy: LanePolicy
    dial: Callable[[int, bytes, float], Line]


class LaneGate:
    """Where the lanes of a session come in; closed but for the time of a set-up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._secret = b""
        self._nonce = b""
        self._arrived: dict[int, Line] = {}

    def open(self, secret: bytes) -> bytes:
        """Take lanes from now on that show ``secret``; gives the nonce for them."""
        with self._changed:
            self._drop()
            self._secret = secret
            self._nonce = secrets.token_bytes(NONCE)
            return self._nonce

    def arrive(self, line: Line, number: int, proof: bytes) -> bool:
        """A connection says that it is lane ``number``. It is closed, and the result False, if
        nobody waits for that one or the proof is wrong."""
        with self._changed:
            expected = 0 <= number < MAX_LANES and number not in self._arrived
            if expected and self._nonce and self._secret:
                right = lane_proof(self._secret, self._nonce, number)
                if hmac.compare_digest(right, proof):
                    self._arrived[number] = line
                    self._changed.notify_all()
                    return True
        line.close()
        return False

    def collect(self, numbers: Sequence[int], seconds: float) -> dict[int, Line]:
        """Those of the lanes that are there within ``seconds``, in order; the caller's from now
        on. Others are closed."""
        deadline = _clock.now() + seconds
        with self._changed:
            while not all(number in self._arrived for number in numbers):
                left = deadline - _clock.now()
                if left <= 0 or not self._changed.wait(left):
                    break
            found = {n: self._arrived.pop(n) for n in sorted(numbers) if n in self._arrived}
            self._drop()
            return found

    def close(self) -> None:
        """Take no more."""
        with self._changed:
            self._drop()

    def _drop(self) -> None:
        self._nonce = self._secret = b""
        for line in self._arrived.values():
            line.close()
        self._arrived.clear()
