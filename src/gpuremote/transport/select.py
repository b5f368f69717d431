"""Which transports there are on this machine, and which one two peers use."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import Any, Final

from gpuremote.errors import ProtocolError, TransportUnavailable
from gpuremote.transport.base import Connection
from gpuremote.transport.lanes.setup import Lanes
from gpuremote.transport.setup import Setup, Upgrade, upgrade

__all__ = ["GROUP", "PREFERENCE", "Candidate", "choose", "climb", "probe"]

GROUP: Final = "gpuremote.transports"
TCP: Final = "tcp"
PREFERENCE: Final = ("shm", "rdma", TCP)
"""Best first."""
NOT_OFFERED: Final = "client: does not offer it"

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
    if TCP not in found:
        # The package runs from a source tree that was never installed.
        found[TCP] = Candidate(TCP, True, "sockets always work")
    for name in PREFERENCE:
        found.setdefault(name, Candidate(name, False, _MISSING.get(name, "not installed")))
    rank = {name: position for position, name in enumerate(PREFERENCE)}
    return tuple(sorted(found.values(), key=lambda c: (rank.get(c.name, len(rank)), c.name)))


def choose(offered: Mapping[str, str], *, same_host: bool, lanes: bool = False) -> dict[str, Any]:
    """Which transports two sides try, and why not the others.

    Parameters
    ----------
    offered : mapping of str to str
        What the other side can use, with what its probe found.
    same_host : bool
        Whether it says that it runs on this host; shared memory proves it later.
    lanes : bool
        Whether it can open further connections beside the first one.

    Returns
    -------
    dict
        ``order`` (what to try, best first), ``candidates`` (each ``name``, ``available``,
        ``reason``), as it travels in the handshake. Both sides always have tcp, as they are
        talking over it; at the end of ``order`` it stands for lanes, if the way is long.
    """
    candidates = []
    order = []
    for here in probe():
        if not here.available:
            verdict = Candidate(here.name, False, f"server: {here.reason}")
        elif here.name not in offered and here.name != TCP:
            verdict = Candidate(here.name, False, NOT_OFFERED)
        elif here.name == "shm" and not same_host:
            verdict = Candidate(here.name, False, "the two ends run on different hosts")
        else:
            verdict = here
            if here.name != TCP:
                order.append(here.name)
        candidates.append(asdict(verdict))
    if lanes and TCP in offered:
        order.append(TCP)
    return {"order": order, "candidates": candidates}


@functools.cache
def _upgrade_named(name: str) -> type[Upgrade] | None:
    for entry in entry_points(group=GROUP, name=name):
        found: type[Upgrade] = entry.load()
        return found
    return None


def climb(setup: Setup, order: Sequence[str], *, client: bool) -> tuple[Connection, dict[str, str]]:
    """Bring up the first transport of ``order`` that works; both ends do this at a time.

    Returns
    -------
    Connection
        That transport's, or ``setup.connection``.
    dict of str to str
        Why each one that was tried before it did not work.

    Raises
    ------
    ConnectionLost, HandshakeTimeout, ProtocolError
        ``setup.connection`` is of no use any more.
    """
    failures: dict[str, str] = {}
    for name in order:
        if name == TCP:
            return _over_tcp(setup, client=client), failures
        transport = _upgrade_named(name)
        if transport is None:
            raise ProtocolError(f"the other end wants the transport {name!r}, unknown here")
        try:
            return upgrade(setup, transport, client=client), failures
        except TransportUnavailable as error:
            failures[name] = error.message
    return setup.connection, failures


def _over_tcp(setup: Setup, *, client: bool) -> Connection:
    """Lanes beside the first connection, or that one by itself and why."""
    first = setup.connection
    try:
        return upgrade(setup, Lanes, client=client)
    except TransportUnavailable as error:
        first.reason = f"{first.reason}; {error.message}" if first.reason else error.message
        return first
