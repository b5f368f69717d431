"""The results for people: tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.check import Verdict
from benchmarks.workloads import DISTANCES, FIRST, LINE, MIB, WINDOW

__all__ = ["Figure", "figures", "print_report", "print_verdicts"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A median, and the lowest and highest round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.low)}–{_short(self.high)})"


def figures(results: Mapping[str, Any]) -> dict[tuple[str, str, str], Figure]:
    """All of them, by workload, contender and metric."""
    return {
        (m["workload"], m["contender"], m["metric"]): Figure(m["median"], m["low"], m["high"])
        for m in results["measurements"]
    }


_Columns = Sequence[tuple[str, str, str]]

_TABLES: Final[tuple[tuple[str, _Columns], ...]] = (
    (
        "round trip, µs",
        [
            ("8 B, one core", "round_trip/8B/one", "us"),
            ("8 B, two cores", "round_trip/8B/two", "us"),
            ("8 B, not pinned", "round_trip/8B", "us"),
            ("4 KiB, one core", "round_trip/4KiB/one", "us"),
            ("4 KiB, two cores", "round_trip/4KiB/two", "us"),
        ],
    ),
    (
        "round trip with the bytes going both ways, µs (a put and a get; others: as above)",
        [
            ("8 B, one core", "echo/8B/one", "us"),
            ("8 B, two cores", "echo/8B/two", "us"),
        ],
    ),
    (
        "GB/s",
        [
            (f"{kind} {size} MiB", f"{kind}/{size}MiB", "gb_per_s")
            for size in (1, 8, 16, 64, 256)
            for kind in ("put", "get")
        ],
    ),
    (
        f"GB/s of the first {FIRST} after a pause",
        [
            (f"{kind} {size} MiB", f"{kind}/{size}MiB", "first_gb_per_s")
            for size in (1, 16)
            for kind in ("put", "get")
        ],
    ),
    (
        "GB/s of gets until memory of the library's own is handed out, before the copy into the "
        "caller's array",
        [(f"get {size} MiB", f"get/{size}MiB", "handed_gb_per_s") for size in (1, 8, 16, 64, 256)],
    ),
    *(
        (
            f"emulated way of {distance} ms round trip, line of {LINE / 1e9} GB/s, "
            f"{WINDOW // MIB} MiB in flight per connection",
            [
                ("8 B, µs", f"round_trip/8B/{distance}ms", "us"),
                *(
                    (f"{kind} {size} MiB, GB/s", f"{kind}/{size}MiB/{distance}ms", "gb_per_s")
                    for size in (2, 256)
                    for kind in ("put", "get")
                ),
            ],
        )
        for distance in DISTANCES
    ),
    (
        "CPU seconds per GB, client + peer",
        [
            (f"{kind} {size} MiB, {side}", f"{kind}/{size}MiB", f"{side}_cpu_s_per_gb")
            for size in (8, 64, 256)
            for kind in ("put", "get")
            for side in ("client", "peer")
        ],
    ),
    (
        "memory at its peak, MiB",
        [
            (f"{kind} {size} MiB, {side}", f"{kind}_memory/{size}MiB", f"{side}_mib")
            for size in (8, 256)
            for kind in ("put", "get")
            for side in ("client", "peer")
        ],
    ),
    (
        "10,000 small ops (others: messages of 64 B) and one answer, two cores",
        [
            ("µs/op until issued", "ops/64B/two", "issue_us_per_op"),
            ("client's CPU µs/op", "ops/64B/two", "client_cpu_us_per_op"),
            ("µs/op until answered", "ops/64B/two", "total_us_per_op"),
            ("bytes/op", "ops/64B/two", "wire_bytes_per_op"),
            ("round trips", "ops/64B/two", "round_trips"),
        ],
    ),
    (
        "a caller that does not wait, a thread that does not rest",
        [
            ("first op, µs", "first_op", "us"),
            ("beside a busy thread, ms", "busy_thread/8B", "ms"),
            ("worst, ms", "busy_thread/8B", "worst_ms"),
            ("alone, ms", "busy_thread/8B", "quiet_ms"),
        ],
    ),
)


def print_report(console: Console, results: Mapping[str, Any]) -> None:
    """Everything that was measured; medians, and in parentheses the spread of the rounds."""
    machine = results["machine"]
    congestion = machine["congestion"]
    console.print(
        f"{machine['cpus']} × {machine['processor']}, {machine['kernel']}, {machine['python']}, "
        f"numpy {machine['packages'].get('numpy', '?')}; {results['rounds']} rounds in "
        f"{results['seconds']} s; congestion control of the sockets: "
        f"{congestion['sockets'] or congestion['system']}{_network(results)}",
        highlight=False,
    )
    for contender in results["contenders"]:
        if contender["left_out"]:
            console.print(
                f"left out: {contender['title']} ({contender['left_out']})", highlight=False
            )
    if results.get("family") == "peers":
        _print_traits(console, results["contenders"])
    found = figures(results)
    titles = {contender["name"]: contender["title"] for contender in results["contenders"]}
    for title, columns in _TABLES:
        _print_table(console, title, columns, titles, found)


def _network(results: Mapping[str, Any]) -> str:
    if results.get("family", "core") == "core":
        return ""
    congestion = results["machine"]["congestion"]
    text = ", the default of a network of this run's own"
    if not congestion["own_network"]:
        text = f", the system's default (no network of this run's own: {congestion['shared']})"
    return f"{text}; load average before it began: {results['machine']['load_average']}"


def _print_traits(console: Console, contenders: Sequence[Mapping[str, Any]]) -> None:
    """What each does with memory, and what its sockets say of themselves."""
    table = Table(title="what is compared", title_justify="left", title_style="bold")
    headings = ("", "path", "one-sided", "kept", "a put lies in", "a get lies in", "congestion")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for contender in contenders:
        traits = contender["traits"]
        tcp = traits["path"] == "TCP"
        table.add_row(
            contender["title"],
            traits["path"],
            "yes" if traits["one_sided"] else "no",
            traits["reuse"],
            traits["put_into"],
            traits["get_into"],
            ", ".join(contender["congestion"]) if tcp else "",
            style="dim" if contender["left_out"] else None,
        )
    console.print(table)


def _print_table(
    console: Console,
    title: str,
    columns: _Columns,
    titles: Mapping[str, str],
    found: Mapping[tuple[str, str, str], Figure],
) -> None:
    present = {(workload, metric) for workload, _, metric in found}
    columns = [column for column in columns if column[1:] in present]
    if not columns:
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for name, text in titles.items():
        row = [found.get((workload, name, metric)) for _, workload, metric in columns]
        if any(figure is not None for figure in row):
            table.add_row(text, *("" if figure is None else str(figure) for figure in row))
    console.print(table)


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Each requirement with its figure and its limit."""
    table = Table(title="what must hold", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("", overflow="fold")
    for heading in ("figure", "rounds", "limit"):
        table.add_column(heading, justify="right")
    table.add_column("")
    styles = {"PASS": "green", "FAIL": "bold red", "not measured": "yellow"}
    for verdict in verdicts:
        requirement = verdict.requirement
        spread, figure = "", "–"
        if verdict.value is not None and verdict.low is not None and verdict.high is not None:
            figure = f"{_short(verdict.value)} {requirement.unit}".strip()
            spread = f"{_short(verdict.low)}–{_short(verdict.high)}"
        word = f"({verdict.found.lower()})"
        if requirement.binding:
            word = f"[{styles[verdict.found]}]{verdict.found}[/]"
        table.add_row(
            str(requirement.number),
            requirement.text,
            figure,
            spread,
            f"{requirement.sense} {requirement.limit:g} {requirement.unit}".strip(),
            word,
            style=None if requirement.binding else "dim",
        )
    console.print(table)


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
