"""What gpuremote's contenders share: one op, its arrays, and what is read from the counters."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpuremote.client.stats import SessionStats

__all__ = ["ADDEND", "IDLE", "START", "burn", "facts", "reached", "traffic"]

from benchmarks.contenders.base import now
from benchmarks.stamps import Stamps

START: Final[npt.NDArray[Any]] = np.ones(8)
ADDEND: Final[npt.NDArray[Any]] = np.full(8, 0.5)
"""The small op is an addition of arrays of 64 bytes."""

IDLE: Final = 0.005
"""Seconds between two first ops, for both sides to come to rest."""


def facts(session: Any) -> dict[str, Any]:
    """The transport that a session got, and why; no addresses."""
    explanation = session.transport.explain()
    return {"transport": explanation.chosen, "reason": explanation.reason}


def traffic(stats: SessionStats) -> tuple[int, int]:
    """Round trips of any kind, and bytes on the wire in both directions."""
    return sum(stats.round_trips.values()), stats.bytes_sent + stats.bytes_received


def burn(until: int) -> None:
    """Run Python, and nothing else, until a moment."""
    while now() < until:
        pass


def reached(stamps: Stamps, before: int, begin: int, burnt: int) -> int:
    """Nanoseconds from ``begin`` to the op's execution; all of the burnt ones if that has not
    come yet, while the caller has still not waited for anything."""
    count, stamp = stamps.last()
    return stamp - begin if count > before else burnt
