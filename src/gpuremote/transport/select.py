"""Which transports there are on this machine, and which one two peers use."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any, Final

__all__ = ["GROUP", "PREFERENCE", "Candidate", "choose", "probe"]

GROUP: Final = "gpuremote.transports"
PREFERENCE: Final = ("shm", "rdma", "tcp")
"""Best first."""

_MISSING: Final = {
    "shm": "no shared-memory transport is installed (this version brings tcp)",
    "rdma": "no RDMA transport is installed (this version brings tcp)",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A transport that was looked at.

    Attributes
    ----------
    name : str
    available : bool
    reason : str
        What the probe found.
    """

    name: str
    available: bool
    reason: str


@functools.cache
def probe() -> tuple[Candidate, ...]:
    """Look at every transport on this side, best first; once per process. Never raises.

    A transport is a class in the entry point group ``gpuremote.transports``; its static method
    ``probe()`` gives ``(available, reason)``.
    """
    found: dict[str, Candidate] = {}
    for entry in entry_points(group=GROUP):
        try:
            available, reason = entry.load().probe()
            found[entry.name] = Candidate(entry.name, bool(available), str(reason))
        except Exception as error:  # somebody else's transport must not break the choice
            found[entry.name] = Candidate(
                entry.name, False, f"its probe failed: {type(error).__name__}: {error}"
            )
    if "tcp" not in found:
        # The package runs from a source tree that was never installed.
        found["tcp"] = Candidate("tcp", True, "sockets always work")
    for name in PREFERENCE:
        found.setdefault(name, Candidate(name, False, _MISSING.get(name, "not installed")))
    rank = {name: position for position, name in enumerate(PREFERENCE)}
    return tuple(sorted(found.values(), key=lambda c: (rank.get(c.name, len(rank)), c.name)))


def choose(offered: Mapping[str, str]) -> dict[str, Any]:
    """The best transport that both sides have.

    Parameters
    ----------
    offered : mapping of str to str
        What the other side can use, with what its probe found.

    Returns
    -------
    dict
        ``chosen``, ``reason`` and ``candidates`` (each ``name``, ``available``, ``reason``), as
        it travels in the handshake. Both sides always have tcp, as they are talking over it.
    """
    candidates = []
    chosen = ""
    for here in probe():
        there = offered.get(here.name)
        if not here.available:
            verdict = Candidate(here.name, False, f"server: {here.reason}")
        elif there is None and here.name != "tcp":
            verdict = Candidate(here.name, False, "client: does not offer it")
        else:
            verdict = Candidate(here.name, True, here.reason)
            chosen = chosen or here.name
        candidates.append(asdict(verdict))
    return {
        "chosen": chosen,
        "reason": f"the best that both sides have ({' > '.join(PREFERENCE)})",
        "candidates": candidates,
    }
