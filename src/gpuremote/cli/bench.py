"""``gpuremote bench``: this library beside blocking sockets, on the way to a server.

Both are measured in turns within one run, so the ratios mean something on a noisy machine; the
figures alone do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gpuremote.cli._sockets import REQUEST, tune
from gpuremote.client.blocking import Session
from gpuremote.client.connect import connect_sync

__all__ = ["add_parser"]

MIB: Final = 1 << 20
OPS: Final = 10_000


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure a server beside plain sockets",
        description="Measure round trips, uploads, downloads and small ops to a server, beside a "
        "blocking loopback socket measured in turns with it.",
    )
    parser.add_argument(
        "url", nargs="?", default="local://", help="gpu://HOST:PORT (default: local://)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    parser.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


class Reference:
    """Blocking sockets: what the kernel gives without a library."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpuremote.cli._sockets"],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.settimeout(None)
        tune(self._socket)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def put(self, data: memoryview) -> None:
        self._socket.sendall(REQUEST.pack(b"p", data.nbytes))
        self._socket.sendall(data)
        self._socket.recv(1)

    def get(self, out: memoryview) -> None:
        self._socket.sendall(REQUEST.pack(b"g", out.nbytes))
        done = 0
        while done < out.nbytes:
            done += self._socket.recv_into(out[done:])


def run(options: argparse.Namespace) -> int:
    sizes = [MIB, 16 * MIB] if options.quick else [MIB, 64 * MIB, 256 * MIB]
    rounds = 3 if options.quick else max(5, options.rounds)
    console = Console(stderr=True)
    reference = Reference()
    try:
        with (
            connect_sync(options.url) as session,
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            bar = progress.add_task("measuring", total=3 + 2 * len(sizes))

            def step() -> None:
                progress.advance(bar)

            rows = [_round_trip(session, reference, nbytes, step) for nbytes in (8, 4096)]
            for nbytes in sizes:
                rows += _transfers(session, reference, nbytes, rounds, step)
            ops = _small_ops(session, rounds)
            report = {
                "url": options.url,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "transport": session.transport.explain().as_dict(),
                "workloads": rows,
                "small_ops": ops,
            }
    finally:
        reference.close()
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _round_trip(
    session: Session, reference: Reference, nbytes: int, step: Callable[[], None]
) -> dict[str, Any]:
    array = session.devices[0].put(np.zeros(nbytes, np.uint8))
    out = np.empty(nbytes, np.uint8)
    view = out.data
    ours, theirs = [], []
    for _ in range(6):
        ours.append(statistics.median(_timed(lambda: array.get(out=out)) for _ in range(300)))
        theirs.append(statistics.median(_timed(lambda: reference.get(view)) for _ in range(300)))
    step()
    return _row("round trip", nbytes, ours, theirs)


def _transfers(
    session: Session, reference: Reference, nbytes: int, rounds: int, step: Callable[[], None]
) -> list[dict[str, Any]]:
    device = session.devices[0]
    data = np.random.default_rng(1).integers(0, 255, nbytes, np.uint8)
    out = np.zeros_like(data)
    put: list[list[float]] = [[], []]
    get: list[list[float]] = [[], []]
    array = device.put(data)
    for _ in range(rounds):
        del array
        session.synchronize()
        began = time.perf_counter()
        array = device.put(data)
        put[0].append(time.perf_counter() - began)
        put[1].append(_timed(lambda: reference.put(data.data)))
        began = time.perf_counter()
        array.get(out=out)
        get[0].append(time.perf_counter() - began)
        get[1].append(_timed(lambda: reference.get(out.data)))
    step()
    step()
    return [_row("put", nbytes, *put), _row("get", nbytes, *get)]


def _row(name: str, nbytes: int, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """``ratio``: the reference's time over ours; 1 is as fast, more is faster."""
    mine, plain = statistics.median(ours), statistics.median(theirs)
    return {
        "workload": name,
        "bytes": nbytes,
        "microseconds": round(mine * 1e6, 2),
        "sockets_microseconds": round(plain * 1e6, 2),
        "GB_per_s": round(nbytes / mine / 1e9, 3),
        "ratio": round(plain / mine, 3),
        "spread": round((max(ours) - min(ours)) / mine, 3),
        "rounds": len(ours),
    }


def _small_ops(session: Session, rounds: int) -> dict[str, Any]:
    """10,000 additions, then one get: what issuing costs, and what travels."""
    start = session.devices[0].zeros(8)
    times = []
    before = after = session.stats()
    for _ in range(rounds):
        value = start + 1.0
        value.get()
        session.synchronize()
        before = session.stats()
        began = time.perf_counter()
        for _ in range(OPS):
            value = value + 1.0
        times.append((time.perf_counter() - began) / OPS)
        value.get()
        after = session.stats()
    return {
        "ops": OPS,
        "client_microseconds_per_op": round(statistics.median(times) * 1e6, 3),
        "round_trips": after.round_trips.total() - before.round_trips.total(),
        "wire_bytes_per_op": round((after.bytes_sent - before.bytes_sent) / OPS, 2),
        "messages": after.messages_sent - before.messages_sent,
    }


def _print(report: dict[str, Any]) -> None:
    table = Table("workload", "bytes", "µs", "GB/s", "sockets µs", "of sockets", "spread")
    for row in report["workloads"]:
        table.add_row(
            row["workload"],
            f"{row['bytes']:,}",
            f"{row['microseconds']:,.1f}",
            f"{row['GB_per_s']:.2f}" if row["bytes"] >= MIB else "",
            f"{row['sockets_microseconds']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['spread']:.0%}",
        )
    console = Console()
    console.print(table)
    ops = report["small_ops"]
    console.print(
        f"{ops['ops']:,} small ops, then one get: {ops['client_microseconds_per_op']} µs of client "
        f"time and {ops['wire_bytes_per_op']} bytes per op, {ops['round_trips']} round trip, "
        f"{ops['messages']} messages"
    )
    console.print(f"transport: {report['transport']['chosen']} ({report['transport']['reason']})")
