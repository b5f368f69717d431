"""``gpuremote doctor``: what works on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from gpuremote._version import __version__
from gpuremote.backend.registry import probe_all
from gpuremote.client.blocking import Session
from gpuremote.client.connect import connect_sync
from gpuremote.errors import GpuRemoteError
from gpuremote.transport import congestion
from gpuremote.transport.select import probe

__all__ = ["add_parser"]

ROUND_TRIPS: Final = 200
PACKAGES: Final = ("numpy", "uvloop", "msgpack", "cupy", "torch")


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say what works on this machine and why not",
        description="Say which transports and backends work on this machine, and why not; with "
        "--peer also what a connection to that server uses. Exit code 0: usable, 1: not.",
    )
    parser.add_argument("--peer", metavar="URL", help="a server to try, such as gpu://HOST:PORT")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    report: dict[str, Any] = {
        "gpuremote": __version__,
        "python": platform.python_version(),
        "packages": {
            name: _version(name) for name in ("numpy", "uvloop", "msgpack", "cupy", "torch")
        },
        "transports": [
            {"name": c.name, "available": c.available, "reason": c.reason} for c in probe()
        ],
        "backends": [
            {"name": b.name, "available": b.available, "reason": b.reason} for b in probe_all()
        ],
        "machine": _machine(),
        "local": _try("local://"),
    }
    if options.peer:
        report["peer"] = _try(options.peer)
    usable = bool(report["local"]["works"]) and (not options.peer or bool(report["peer"]["works"]))
    report["usable"] = usable
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0 if usable else 1


def _version(name: str) -> str | None:
    """Installed version, without importing the package."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed"


def _machine() -> dict[str, Any]:
    devices = Path("/dev/infiniband")
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "kernel": platform.release(),
        "congestion_control": congestion.available(),
        "infiniband_devices": sorted(p.name for p in devices.iterdir()) if devices.is_dir() else [],
        "memlock_bytes": None if memlock == resource.RLIM_INFINITY else memlock,
        "file_descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def _try(url: str) -> dict[str, Any]:
    """Connect, and measure a round trip of 4 KiB."""
    try:
        with connect_sync(url) as session:
            return {
                "url": url,
                "works": True,
                "backend": session.backend,
                "devices": [device.name for device in session.devices],
                "round_trip_4KiB_us": _round_trip(session),
                "transport": session.transport.explain().as_dict(),
            }
    except GpuRemoteError as error:
        return {"url": url, "works": False, "error": type(error).__name__, "reason": str(error)}


def _round_trip(session: Session) -> float:
    array = session.devices[0].put(np.zeros(4096, np.uint8))
    out = np.empty(4096, np.uint8)
    times = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        array.get(out=out)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1e6, 1)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(f"gpuremote {report['gpuremote']}, Python {report['python']}")
    for title in ("transports", "backends"):
        table = Table(title[:-1], "works", "why", title=None)
        for row in report[title]:
            table.add_row(row["name"], "yes" if row["available"] else "no", row["reason"])
        console.print(table)
    for name, value in report["machine"].items():
        console.print(f"{name.replace('_', ' ')}: {value if value else 'none'}")
    for place in ("local", "peer"):
        found = report.get(place)
        if found is None:
            continue
        if found["works"]:
            console.print(
                f"{found['url']}: works, {found['backend']} on {', '.join(found['devices'])}, "
                f"4 KiB there and back in {found['round_trip_4KiB_us']} µs over "
                f"{found['transport']['chosen']} ({found['transport']['reason']})"
            )
        else:
            console.print(f"{found['url']}: does not work: {found['reason']}")
