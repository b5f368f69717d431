"""How many connections a long way needs: from its delay, its bandwidth and the window of one.

One TCP connection moves at most its window per round trip. So a way of 150 ms that carries
1 Gbit/s holds 18.75 MB, and with the 4 MiB that Linux lets a connection have under way by default
one of them gets a quarter of it. Everything here is a function of figures that were measured
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpuremote.config import MAX_LANES

__all__ = [
    "ASSUMED_BANDWIDTH",
    "LONG_WAY",
    "MAX_LANES",
    "Way",
    "bandwidth_of",
    "kernel_limit",
    "lanes_for",
    "window_between",
]

LONG_WAY: Final = 0.005
"""Seconds of round trip from which on more than one connection may be worth it."""
ASSUMED_BANDWIDTH: Final = 125e6
"""Bytes per second where measuring gave nothing: 1 Gbit/s."""
SLACK: Final = 2.0
"""Times what the way holds that all windows have together: they are rarely full."""
TRAIN: Final = 48 << 10
"""Bytes that have to come one after the other for their rate to say anything."""
PAUSE: Final = 0.5
"""Part of a round trip without bytes that ends a train: the sender waits for an acknowledgement."""
LUMP: Final = 0.002
"""Seconds in which bytes may come that something on the way had collected: a train that takes no
longer says how fast it was let go, not how fast the way is."""
DEFAULT_WINDOW: Final = 4 << 20
"""Bytes, where the system does not say."""


@dataclass(frozen=True, slots=True)
class Way:
    """What was measured between two ends.

    Attributes
    ----------
    delay : float
        Seconds of round trip, the best of those seen.
    bandwidth : float or None
        Bytes per second in the better direction; None: not measured.
    window : int
        Bytes that one connection can have under way; 0: not known.
    """

    delay: float
    bandwidth: float | None = None
    window: int = 0

    def __str__(self) -> str:
        text = f"round trip {self.delay * 1e3:.3g} ms"
        if self.bandwidth is not None:
            text += f", {self.bandwidth / 1e6:.3g} MB/s"
        if self.window:
            text += f", window {self.window / (1 << 20):.3g} MiB"
        return text


def lanes_for(way: Way) -> int:
    """Connections to carry payload: ``ceil(2 * bandwidth * delay / window)``, from 1 to
    ``MAX_LANES``; 1 on a short way."""
    if way.delay < LONG_WAY:
        return 1
    bandwidth = ASSUMED_BANDWIDTH if way.bandwidth is None else way.bandwidth
    needed = SLACK * bandwidth * way.delay / (way.window or DEFAULT_WINDOW)
    return max(1, min(MAX_LANES, math.ceil(needed)))


def bandwidth_of(arrivals: Sequence[tuple[float, int]], delay: float) -> float | None:
    """The rate at which a burst came in.

    A sender that is not up to speed yet pauses for acknowledgements, which says nothing of the
    way: the longest run of bytes without such a pause counts. The first bytes of a run are the
    starting point.

    Parameters
    ----------
    arrivals : sequence of (float, int)
        Seconds (of any clock) and bytes, in order.
    delay : float
        Seconds of round trip.

    Returns
    -------
    float or None
        Bytes per second; None where no run was long enough to tell.
    """
    best: tuple[int, float] | None = None
    begin = last = 0.0
    count = 0
    for number, (at, size) in enumerate(arrivals):
        if not number or at - last > PAUSE * delay:
            begin, count = at, 0
        else:
            count += size
            if at > begin and count >= TRAIN and (best is None or count > best[0]):
                best = count, at - begin
        last = at
    return None if best is None else best[0] / max(LUMP, best[1])


def kernel_limit(name: str) -> int:
    """Bytes up to which the kernel lets a socket's buffer grow by itself; 0 where unknown.

    Parameters
    ----------
    name : {"tcp_wmem", "tcp_rmem"}
    """
    try:
        return int(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return 0


def window_between(sends: int, takes: int) -> int:
    """Bytes that one connection can have under way: what the sender's kernel keeps until it is
    acknowledged, or the half of the receiver's buffer that Linux announces; 0 where unknown."""
    known = [limit for limit in (sends, takes // 2) if limit > 0]
    return min(known, default=0)
