"""The limits that this project promises to keep, each as a figure of one run beside its limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Literal, TypeAlias

from benchmarks.workloads import DISTANCES, LINE

__all__ = ["DISTANCE", "REQUIREMENTS", "Requirement", "Verdict", "judge", "requirements"]

Source: TypeAlias = tuple[str, str, str]
"""Workload, contender, metric."""
Found: TypeAlias = Literal["PASS", "FAIL", "not measured"]

SPARE_MIB: Final = 64
"""Memory that a transfer may take beyond its payload."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """One limit.

    Attributes
    ----------
    number : int
        Which of the claims it belongs to.
    text : str
        What is compared with what.
    of : tuple
        The figure.
    by : tuple or None
        The figure of the same run that it is divided by.
    sense : {"<=", ">="}
    limit : float
    worst : bool
        The worst round counts, not the median: for what is counted and not timed.
    unit : str
        Of a figure that is no ratio.
    binding : bool
        Without this it is shown and decides nothing.
    """

    number: int
    text: str
    of: Source
    by: Source | None
    sense: Literal["<=", ">="]
    limit: float
    worst: bool = False
    unit: str = ""
    binding: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run says of a requirement.

    Attributes
    ----------
    value : float or None
        The ratio of the medians, or the figure itself; None if it was not measured.
    low, high : float or None
        The same within the single rounds.
    """

    requirement: Requirement
    value: float | None
    low: float | None
    high: float | None

    @property
    def found(self) -> Found:
        """Whether the limit is kept."""
        if self.value is None:
            return "not measured"
        limit = self.requirement.limit
        kept = self.value <= limit if self.requirement.sense == "<=" else self.value >= limit
        return "PASS" if kept else "FAIL"


def judge(results: Mapping[str, Any]) -> list[Verdict]:
    """Hold every requirement against the results of one run."""
    values: dict[Source, list[float]] = {
        (m["workload"], m["contender"], m["metric"]): m["values"] for m in results["measurements"]
    }
    return [_judge(requirement, values) for requirement in requirements(results)]


def requirements(results: Mapping[str, Any]) -> Sequence[Requirement]:
    """The limits of what was run."""
    family = results.get("family", "core")
    if family == "peers":
        ran = [c for c in results["contenders"] if not c["left_out"]]
        return [*_tcp_peers(ran), *_shared_memory(ran), *_choice()]
    return DISTANCE if family == "distance" else REQUIREMENTS


def _judge(requirement: Requirement, values: Mapping[Source, list[float]]) -> Verdict:
    ours = values.get(requirement.of)
    theirs = [1.0] if requirement.by is None else values.get(requirement.by)
    if not ours or not theirs:
        return Verdict(requirement, None, None, None)
    if requirement.by is None:
        theirs = [1.0] * len(ours)
    rounds = [a / b for a, b in zip(ours, theirs, strict=False)]
    if requirement.worst:
        value = max(rounds) if requirement.sense == "<=" else min(rounds)
    else:
        value = median(ours) / median(theirs)
    return Verdict(requirement, value, min(rounds), max(rounds))


def _transfers() -> Iterator[Requirement]:
    for contender in ("gpuremote", "gpuremote-uvloop"):
        for kind in ("put", "get"):
            for size in (64, 256):
                name = f"{kind}/{size}MiB"
                yield Requirement(
                    2,
                    f"{contender}: {kind} of {size} MiB / blocking sockets",
                    (name, contender, "gb_per_s"),
                    (name, "sockets", "gb_per_s"),
                    ">=",
                    0.90,
                )
    for contender in ("gpuremote", "gpuremote-uvloop"):
        for kind in ("put", "get"):
            for size in (64, 256):
                for side in ("client", "peer"):
                    yield Requirement(
                        2,
                        f"{contender}: {side}'s peak memory, {kind} of {size} MiB",
                        (f"{kind}_memory/{size}MiB", contender, f"{side}_mib"),
                        None,
                        "<=",
                        size + SPARE_MIB,
                        worst=True,
                        unit="MiB",
                    )


def _ops() -> Iterator[Requirement]:
    name = "ops/64B/two"
    for contender in ("gpuremote", "gpuremote-uvloop"):
        yield Requirement(
            3,
            f"{contender}: round trips of 10,000 ops and a get",
            (name, contender, "round_trips"),
            None,
            "<=",
            1,
            worst=True,
        )
        yield Requirement(
            3,
            f"{contender}: client's time per op / raw uvloop round trip of 64 B",
            (name, contender, "issue_us_per_op"),
            ("round_trip/64B/two", "uvloop-echo", "us"),
            "<=",
            0.10,
        )
        yield Requirement(
            3,
            f"{contender}: bytes on the wire per op",
            (name, contender, "wire_bytes_per_op"),
            None,
            "<=",
            64,
            worst=True,
            unit="B",
        )


def _latency() -> Iterator[Requirement]:
    layouts = {"one": "one core", "two": "two cores"}
    for layout, text in layouts.items():
        name = f"round_trip/8B/{layout}"
        yield Requirement(
            4,
            f"async: 8 B on {text} / raw uvloop echo",
            (name, "gpuremote-uvloop", "us"),
            (name, "uvloop-echo", "us"),
            "<=",
            1.5,
        )
        yield Requirement(
            4,
            f"sync: 8 B on {text} / blocking sockets",
            (name, "gpuremote", "us"),
            (name, "sockets", "us"),
            "<=",
            2.5,
        )
    for contender in ("gpuremote", "gpuremote-uvloop"):
        yield Requirement(
            4,
            f"{contender}: first op is executed while the caller goes on",
            ("first_op", contender, "us"),
            None,
            "<=",
            500,
            unit="µs",
        )
    yield Requirement(
        4,
        "sync: 8 B beside a busy thread, in switch intervals",
        ("busy_thread/8B", "gpuremote", "switch_intervals"),
        None,
        "<=",
        2,
    )
    for layout, text in layouts.items():
        yield Requirement(
            4,
            f"async: 8 B on {text} / raw uvloop echo without a coroutine",
            (f"round_trip/8B/{layout}", "gpuremote-uvloop", "us"),
            (f"round_trip/8B/{layout}", "uvloop-callbacks", "us"),
            "<=",
            1.5,
            binding=False,
        )
        yield Requirement(
            4,
            f"async: 8 B there and back on {text} / raw uvloop echo",
            (f"echo/8B/{layout}", "gpuremote-uvloop", "us"),
            (f"round_trip/8B/{layout}", "uvloop-echo", "us"),
            "<=",
            1.5,
            binding=False,
        )
        yield Requirement(
            4,
            f"sync: 8 B there and back on {text} / blocking sockets",
            (f"echo/8B/{layout}", "gpuremote", "us"),
            (f"round_trip/8B/{layout}", "sockets", "us"),
            "<=",
            2.5,
            binding=False,
        )


REQUIREMENTS: Final = (*_transfers(), *_ops(), *_latency())
"""In the order and with the numbers in which they were set; those that bind decide the exit
code of ``python -m benchmarks --check``."""


SIZES: Final = (1, 16, 64, 256)
"""MiB of the transfers that are held against other libraries."""


def _peer_names(ran: Sequence[Mapping[str, Any]], path: str) -> list[str]:
    """Other libraries that took part; what is written by hand is a yardstick, not a library."""
    return [
        c["name"]
        for c in ran
        if c["traits"].get("path") == path
        and not c["name"].startswith("gpuremote")
        and c["name"] != "sockets"
    ]


def _given(name: str, ran: Sequence[Mapping[str, Any]], kind: str) -> str:
    """The figure of a peer: where it can't fill the caller's array, without the copy into it."""
    into = next(c["traits"]["get_into"] for c in ran if c["name"] == name)
    hands_out = kind == "get" and "then copied" in into
    return "handed_gb_per_s" if hands_out else "gb_per_s"


def _tcp_peers(ran: Sequence[Mapping[str, Any]]) -> Iterator[Requirement]:
    for name in _peer_names(ran, "TCP"):
        for size in SIZES:
            for kind in ("put", "get"):
                workload = f"{kind}/{size}MiB"
                yield Requirement(
                    3,
                    f"gpuremote: {kind} of {size} MiB / {name}",
                    (workload, "gpuremote", "gb_per_s"),
                    (workload, name, _given(name, ran, kind)),
                    ">=",
                    1.0,
                )
        yield Requirement(
            3,
            f"gpuremote: 8 B / {name}",
            ("round_trip/8B", "gpuremote", "us"),
            ("round_trip/8B", name, "us"),
            "<=",
            1.0,
        )
    for size in (64, 256):
        for kind in ("put", "get"):
            workload = f"{kind}/{size}MiB"
            yield Requirement(
                3,
                f"gpuremote: {kind} of {size} MiB / blocking sockets",
                (workload, "gpuremote", "gb_per_s"),
                (workload, "sockets", "gb_per_s"),
                ">=",
                0.90,
            )


def _shared_memory(ran: Sequence[Mapping[str, Any]]) -> Iterator[Requirement]:
    large, ours = "put/256MiB", "gpuremote-shm"
    for other, limit in (("memcpy", 0.8), ("gpuremote", 2.5)):
        yield Requirement(
            2,
            f"{ours}: put of 256 MiB / {other}",
            (large, ours, "gb_per_s"),
            (large, other, "gb_per_s"),
            ">=",
            limit,
        )
    for size in SIZES:
        yield Requirement(
            2,
            f"{ours}-empty: put of {size} MiB takes at most 200 µs",
            (f"put/{size}MiB", f"{ours}-empty", "gb_per_s"),
            None,
            ">=",
            size * 2**20 / 200e3,
            unit="GB/s",
        )
    for name in _peer_names(ran, "same-host memory"):
        for size in SIZES:
            for kind in ("put", "get"):
                workload = f"{kind}/{size}MiB"
                yield Requirement(
                    2,
                    f"{ours}: {kind} of {size} MiB / {name}",
                    (workload, ours, "gb_per_s"),
                    (workload, name, _given(name, ran, kind)),
                    ">=",
                    1.0,
                )


def _choice() -> Iterator[Requirement]:
    """What our own choice of congestion control brings, which others do not have."""
    for size in (64, 256):
        for kind in ("put", "get"):
            workload = f"{kind}/{size}MiB"
            yield Requirement(
                3,
                f"gpuremote under reno, its own choice / under bbr: {kind} of {size} MiB",
                (workload, "gpuremote", "gb_per_s"),
                (workload, "gpuremote-bbr", "gb_per_s"),
                ">=",
                1.0,
                binding=False,
            )


DISTANCE: Final = tuple(
    Requirement(
        3,
        f"{contender}: {kind} of 256 MiB at {distance} ms, of the line's 0.125 GB/s",
        (f"{kind}/256MiB/{distance}ms", contender, "gb_per_s"),
        None,
        ">=",
        0.9 * LINE / 1e9,
        unit="GB/s",
        # One connection shows why there are lanes.
        binding=contender == "far-gpuremote-lanes" and distance == 150,
    )
    for distance in DISTANCES
    for kind in ("put", "get")
    for contender in ("far-gpuremote-lanes", "far-gpuremote")
)
"""Held against a run through the relay."""
