"""What is measured. Every contender runs the same list, as far as it can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

__all__ = [
    "DISTANCES",
    "FAMILIES",
    "FIRST",
    "FULL",
    "KIB",
    "LAYOUTS",
    "LINE",
    "MIB",
    "QUICK",
    "UNITS",
    "WINDOW",
    "Family",
    "FamilyName",
    "Kind",
    "Layout",
    "Workload",
]

Kind: TypeAlias = Literal[
    "round_trip",
    "echo",
    "put",
    "get",
    "ops",
    "put_memory",
    "get_memory",
    "first_op",
    "busy_thread",
    "intact",
]
FamilyName: TypeAlias = Literal["core", "peers", "distance"]
"""What is run together: the project's own limits; other libraries; long ways."""
Layout: TypeAlias = Literal["free", "one", "two"]
"""Where the processes run: wherever the kernel likes, both on one core, each on its own."""

KIB: Final = 1 << 10
MIB: Final = 1 << 20
FIRST: Final = 12
"""Transfers after a pause that are told apart, where there are more."""
DISTANCES: Final = (1, 30, 150)
"""Milliseconds of round trip of the emulated ways."""
LINE: Final = 125_000_000
"""Bytes per second of an emulated line in each direction, all connections together: 1 Gbit/s."""
WINDOW: Final = 4 * MIB
"""Bytes that one connection may have in flight on an emulated line: as Linux' tcp_wmem."""
LAYOUTS: Final[dict[Layout, str]] = {
    "free": "not pinned",
    "one": "both on one core",
    "two": "on two cores",
}

UNITS: Final[dict[str, str]] = {
    "us": "µs",
    "p99_us": "µs",
    "gb_per_s": "GB/s",
    "client_cpu_s_per_gb": "CPU s/GB",
    "peer_cpu_s_per_gb": "CPU s/GB",
    "wire_bytes_per_byte": "B/B",
    "issue_us_per_op": "µs/op",
    "total_us_per_op": "µs/op",
    "client_cpu_us_per_op": "CPU µs/op",
    "wire_bytes_per_op": "B/op",
    "counted_bytes_per_op": "B/op",
    "round_trips": "",
    "client_mib": "MiB",
    "peer_mib": "MiB",
    "late": "",
    "ms": "ms",
    "quiet_ms": "ms",
    "worst_ms": "ms",
    "switch_intervals": "",
    "first_gb_per_s": "GB/s",
    "handed_gb_per_s": "GB/s",
    "intact": "",
}
"""Every metric, and its unit."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing to measure.

    Attributes
    ----------
    kind : str
        ``round_trip``: the peer answers with ``size`` bytes. ``echo``: they travel there and
        back. ``put``, ``get``: ``size`` bytes to the peer; from the peer into a buffer that is
        kept. ``ops``: ``repeat`` small ops, then one ``get``. ``put_memory``,
        ``get_memory``: how much memory a put or get takes on either side at its peak.
        ``first_op``: when an op is executed while its caller goes on without waiting.
        ``busy_thread``: a call while another thread of the process runs Python. ``intact``:
        what a put brought and a get took back is what it was.
    size : int
        Bytes.
    layout : {"free", "one", "two"}
    repeat : int
        Repetitions within a round; a round gives one value, their median.
    rounds : int
        Rounds to take part in at most; 0 means all of them.
    distance : int
        Milliseconds of round trip of the emulated way; 0 means none.
    warm : int
        Puts before those that count; by default one more array than a peer may hold at a time.
    """

    kind: Kind
    size: int = 0
    layout: Layout = "free"
    repeat: int = 1
    rounds: int = 0
    distance: int = 0
    warm: int = 3

    @property
    def name(self) -> str:
        """Names it in the results, such as ``round_trip/8B/one``."""
        parts: list[str] = [self.kind]
        if self.size:
            parts.append(_size(self.size))
        if self.layout != "free":
            parts.append(self.layout)
        if self.distance:
            parts.append(f"{self.distance}ms")
        return "/".join(parts)


def _size(size: int) -> str:
    if size % MIB == 0:
        return f"{size // MIB}MiB"
    return f"{size // KIB}KiB" if size % KIB == 0 else f"{size}B"


def _repeat(size: int) -> int:
    """Transfers of a round: enough that their median is not what a pause has left behind (of 12
    of 1 MiB, within two milliseconds, it is)."""
    return max(4, min(100, 512 * MIB // size))


def _workloads(
    sizes: tuple[int, ...], trips: int, ops: int, first_ops: int, busy: int
) -> list[Workload]:
    layouts: tuple[Layout, ...] = ("free", "one", "two")
    pinned: tuple[Layout, ...] = ("one", "two")
    return [
        # First, and in this order: where the kernel can't forget a process's peak it only grows.
        *(Workload("put_memory", size, rounds=2) for size in sizes[1:]),
        *(Workload("get_memory", size, rounds=2) for size in sizes[1:]),
        *(Workload("round_trip", 8, layout, trips) for layout in layouts),
        *(Workload("round_trip", 4 * KIB, layout, trips // 2) for layout in layouts),
        *(Workload("echo", 8, layout, trips // 2) for layout in pinned),
        Workload("round_trip", 64, "two", trips),
        Workload("ops", 64, "two", ops),
        *(Workload(kind, size, repeat=_repeat(size)) for size in sizes for kind in ("put", "get")),
        Workload("first_op", repeat=first_ops),
        Workload("busy_thread", 8, repeat=busy),
    ]


FULL: Final = _workloads((MIB, 64 * MIB, 256 * MIB), 1000, 10_000, 10, 10)
QUICK: Final = _workloads((MIB, 8 * MIB), 50, 10_000, 3, 3)


def _peers(sizes: tuple[int, ...], trips: int) -> list[Workload]:
    return [
        *(Workload("intact", size, rounds=1) for size in sizes),
        Workload("round_trip", 8, repeat=trips),
        *(Workload(kind, size, repeat=_repeat(size)) for size in sizes for kind in ("put", "get")),
    ]


def _distance(size: int, distances: tuple[int, ...], trips: int) -> list[Workload]:
    return [
        workload
        for distance in distances
        for workload in (
            Workload("intact", MIB, rounds=1, distance=distance),
            Workload("round_trip", 8, repeat=trips, distance=distance),
            # A connection that has been used is past its slow start.
            Workload("put", size, distance=distance, warm=1),
            Workload("get", size, distance=distance, warm=1),
        )
    ]


@dataclass(frozen=True, slots=True)
class Family:
    """Workloads that are run together.

    Attributes
    ----------
    full, quick : list of Workload
        What is measured, and what shows that all of it works.
    rounds : int
        Of a full run.
    stem : str
        Names the files of its results.
    congestion : str
        The system's TCP congestion control for the length of a run; "" keeps what is set.
    """

    full: list[Workload]
    quick: list[Workload]
    rounds: int
    stem: str
    congestion: str = ""


FAMILIES: Final[dict[FamilyName, Family]] = {
    "core": Family(FULL, QUICK, 9, "results"),
    "peers": Family(
        _peers((MIB, 16 * MIB, 64 * MIB, 256 * MIB), 500),
        _peers((MIB,), 20),
        7,
        "peers",
        "reno",
    ),
    "distance": Family(
        _distance(256 * MIB, DISTANCES, 10),
        _distance(2 * MIB, (1, 30), 5),
        3,
        "distance",
        # What the way does is to come from the relay alone, and for all alike.
        "reno",
    ),
}
