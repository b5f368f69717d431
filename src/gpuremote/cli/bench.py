"""``gpuremote bench``: this library beside plain sockets, on the way to a server.

Both are measured in turns within one run, so the ratios mean something on a noisy machine; the
figures alone do not. Round trips depend on the cores that the two processes run on, so those are
pinned where both processes are ours (``local://``): once to one core, once to two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from gpuremote._version import __version__
from gpuremote.cli._console import say, show, size
from gpuremote.cli._sockets import Blocking, Echo
from gpuremote.cli.progress import Bars
from gpuremote.client.blocking import Session
from gpuremote.client.connect import connect_sync
from gpuremote.config import parse_url
from gpuremote.errors import InternalError

__all__ = ["add_parser"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
OPS: Final = 10_000
ECHO_BYTES: Final = 64
MIN_ROUNDS: Final = 5

Layout: TypeAlias = Literal["not pinned", "one core", "two cores"]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure a server beside plain sockets",
        description="Measure round trips, uploads, downloads and small ops to a server, beside "
        "blocking loopback sockets and a raw echo measured in turns with it.",
    )
    parser.add_argument(
        "url", nargs="?", default="local://", help="gpu://HOST:PORT (default: local://)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    parser.add_argument(
        "--rounds", type=_rounds, metavar="N", help="at least 5 (default: 15; with --quick: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, at least {MIN_ROUNDS}")
    return int(text)


@dataclass
class Run:
    """One run of the command: what is measured, and what it is compared with."""

    session: Session
    sockets: Blocking
    echo: Echo
    bars: Bars
    cores: list[int]
    ours: list[int]
    """Processes of the server that this command may pin: none unless it started the server."""
    rounds: int
    trips: int
    """Round trips in a round."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Those in which a server can be compared with the references."""
        if not self.ours:
            return ("not pinned",)
        return ("one core", "two cores") if len(self.cores) > 1 else ("one core",)

    @contextlib.contextmanager
    def pinned(self, layout: Layout) -> Iterator[None]:
        """Tie this process and those it talks to to the cores of ``layout``."""
        if layout == "not pinned":
            yield
            return
        here, there = self.cores[0], self.cores[-1 if layout == "two cores" else 0]
        others = [self.sockets.pid, self.echo.pid, *self.ours]
        try:
            _pin(os.getpid(), [here])
            for process in others:
                _pin(process, [there])
            yield
        finally:
            for process in (os.getpid(), *others):
                _pin(process, self.cores)


def _pin(process: int, cores: Sequence[int]) -> None:
    """All of its threads; one that has ended meanwhile needs it no more."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(thread), cores)


def run(options: argparse.Namespace) -> int:
    sizes = [MIB, 16 * MIB] if options.quick else [MIB, 64 * MIB, 256 * MIB]
    local = parse_url(options.url).scheme == "local"
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(connect_sync(options.url))
        sockets = stack.enter_context(contextlib.closing(Blocking(max(sizes))))
        echo = stack.enter_context(contextlib.closing(Echo()))
        bars = stack.enter_context(Bars("measuring", 2 * (1 + local) + len(sizes) + 1))
        report = _measure(
            Run(
                session,
                sockets,
                echo,
                bars,
                cores=sorted(os.sched_getaffinity(0)),
                ours=[session.worker_pid] if local else [],
                rounds=options.rounds or (MIN_ROUNDS if options.quick else 15),
                trips=100 if options.quick else 300,
            ),
            sizes,
        )
    report = {"url": options.url} | report
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def _measure(run: Run, sizes: Sequence[int]) -> dict[str, Any]:
    rows = []
    for layout in run.layouts:
        with run.pinned(layout):
            rows += [_round_trip(run, nbytes, layout) for nbytes in (8, 4 * KIB)]
    for nbytes in sizes:
        rows += _transfers(run, nbytes)
    return {
        "gpuremote": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": len(run.cores),
        "load_average": round(os.getloadavg()[0], 2),
        "transport": run.session.transport.explain().as_dict(),
        "sockets": {"congestion": run.sockets.congestion},
        "workloads": rows,
        "small_ops": _small_ops(run),
    }


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _in_turns(
    rounds: int, ours: Callable[[], float], theirs: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Both, once in each round, and each of them first in every other."""
    found: tuple[list[float], list[float]] = ([], [])
    both = list(zip(found, (ours, theirs), strict=True))
    for turn in range(rounds):
        for times, function in both[:: -1 if turn % 2 else 1]:
            times.append(function())
    return found


def _round_trip(run: Run, nbytes: int, layout: Layout) -> dict[str, Any]:
    """A ``get`` into a buffer that is kept, beside as many bytes over a socket."""
    run.bars.step(f"round trips of {size(nbytes)}")
    array = run.session.devices[0].put(np.zeros(nbytes, np.uint8))
    out = np.empty(nbytes, np.uint8)
    view = out.data

    def several(function: Callable[[], object]) -> Callable[[], float]:
        def medians() -> float:
            return statistics.median(_timed(function) for _ in range(run.trips))

        medians()
        return medians

    ours, theirs = _in_turns(
        run.rounds, several(lambda: array.get(out=out)), several(lambda: run.sockets.get(view))
    )
    return _row("round trip", nbytes, layout, ours, theirs)


def _transfers(run: Run, nbytes: int) -> list[dict[str, Any]]:
    """Uploads and downloads from and into memory that both sides have touched before.

    Small ones several times in a round, of which the median counts: the first after a change
    finds cold caches.
    """
    run.bars.step(f"transfers of {size(nbytes)}")
    session, sockets = run.session, run.sockets
    device = session.devices[0]
    data = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    out = np.zeros_like(data)
    held = [device.put(data)]
    held[0].get(out=out)
    if not np.array_equal(out, data):
        raise InternalError(f"{nbytes} bytes went there and others came back")
    sockets.put(data.data)
    sockets.get(out.data)

    def put() -> float:
        held.clear()
        session.synchronize()  # its memory is free again
        with run.bars.transfer(session, nbytes, f"put {size(nbytes)}"):
            began = time.perf_counter()
            held.append(device.put(data))
            return time.perf_counter() - began

    def get() -> float:
        with run.bars.transfer(session, nbytes, f"get {size(nbytes)}"):
            return _timed(lambda: held[0].get(out=out))

    def their_put() -> float:
        return _timed(lambda: sockets.put(data.data))

    def their_get() -> float:
        return _timed(lambda: sockets.get(out.data))

    repeat = max(1, min(8, 256 * MIB // nbytes))

    def several(transfer: Callable[[], float]) -> Callable[[], float]:
        return lambda: statistics.median(transfer() for _ in range(repeat))

    return [
        _row(name, nbytes, "not pinned", *_in_turns(run.rounds, several(ours), several(theirs)))
        for name, ours, theirs in (("put", put, their_put), ("get", get, their_get))
    ]


def _row(
    name: str, nbytes: int, layout: Layout, ours: list[float], theirs: list[float]
) -> dict[str, Any]:
    """``ratio``: the reference's time over ours; 1 is as fast, more is faster."""
    mine, plain = statistics.median(ours), statistics.median(theirs)
    return {
        "workload": name,
        "bytes": nbytes,
        "layout": layout,
        "microseconds": round(mine * 1e6, 2),
        "sockets_microseconds": round(plain * 1e6, 2),
        "GB_per_s": round(nbytes / mine / 1e9, 3),
        "ratio": round(plain / mine, 3),
        "spread": round((max(ours) - min(ours)) / mine, 3),
        "rounds": len(ours),
    }


def _small_ops(run: Run) -> dict[str, Any]:
    """10,000 additions, then one get: what issuing costs, and what travels.

    Beside a raw echo between two cores, the least that waiting for each op would cost. What is
    counted is that of the worst round.
    """
    run.bars.step(f"{OPS:,} small ops")
    session = run.session
    value = session.devices[0].zeros(8) + 1.0
    value.get()  # what has to travel once has travelled
    counted: list[tuple[int, int, int]] = []

    def ops() -> float:
        nonlocal value
        session.synchronize()
        before = session.stats()
        began = time.perf_counter()
        for _ in range(OPS):
            value = value + 1.0
        took = time.perf_counter() - began
        value.get()
        after = session.stats()
        counted.append(
            (
                after.round_trips.total() - before.round_trips.total(),
                after.bytes_sent + after.bytes_received - before.bytes_sent - before.bytes_received,
                after.messages_sent - before.messages_sent,
            )
        )
        return took / OPS

    awaited = []

    def echo() -> float:
        awaited.append(statistics.median(run.echo.awaited(ECHO_BYTES, 3 * run.trips)))
        return statistics.median(run.echo.round_trips(ECHO_BYTES, 3 * run.trips))

    layout: Layout = "two cores" if len(run.cores) > 1 else "one core"
    with run.pinned(layout):
        echo()
        ours, theirs = _in_turns(run.rounds, ops, echo)
    if (found := float(value.get()[0])) != 1.0 + OPS * run.rounds:
        raise InternalError(f"{OPS * run.rounds} additions of 1 to 1 made {found}")
    round_trips, nbytes, messages = map(max, zip(*counted, strict=True))
    mine, raw = statistics.median(ours), statistics.median(theirs)
    return {
        "ops": OPS,
        "layout": layout,
        "client_microseconds_per_op": round(mine * 1e6, 3),
        "echo_microseconds": round(raw * 1e6, 2),
        "awaited_echo_microseconds": round(statistics.median(awaited) * 1e6, 2),
        "echo_bytes": ECHO_BYTES,
        "echo_loop": run.echo.loop,
        "ratio_to_echo": round(mine / raw, 4),
        "ratio_to_awaited_echo": round(mine / statistics.median(awaited), 4),
        "round_trips": round_trips,
        "wire_bytes_per_op": round(nbytes / OPS, 2),
        "messages": messages,
        "rounds": len(ours),
    }


def _print(report: dict[str, Any]) -> None:
    show(
        ("workload", "size", "processes", "µs", "GB/s", "sockets µs", "of sockets", "spread"),
        [
            (
                row["workload"],
                size(row["bytes"]),
                row["layout"],
                f"{row['microseconds']:,.1f}",
                f"{row['GB_per_s']:.2f}" if row["bytes"] >= MIB else "",
                f"{row['sockets_microseconds']:,.1f}",
                f"{row['ratio']:.2f}",
                f"{row['spread']:.0%}",
            )
            for row in report["workloads"]
        ],
    )
    ops = report["small_ops"]
    trips = "1 round trip" if ops["round_trips"] == 1 else f"{ops['round_trips']} round trips"
    say(
        f"{ops['ops']:,} small ops, then one get: {ops['client_microseconds_per_op']} µs of client "
        f"time and {ops['wire_bytes_per_op']} bytes on the wire per op, {trips}, {ops['messages']} "
        "messages"
    )
    say(
        f"raw {ops['echo_bytes']} B echo on {ops['echo_loop']}, {ops['layout']}: "
        f"{ops['echo_microseconds']} µs, an op takes {ops['ratio_to_echo']:.3f} of it; awaited "
        f"{ops['awaited_echo_microseconds']} µs, {ops['ratio_to_awaited_echo']:.3f}"
    )
    say(f"sockets: blocking, on loopback, {report['sockets']['congestion'] or 'default'}")
    say(f"transport {report['transport']['chosen']}: {report['transport']['reason']}")
