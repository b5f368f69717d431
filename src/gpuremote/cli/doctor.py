"""``gpuremote doctor``: what works on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import socket
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpuremote._speed import NATIVE, native
from gpuremote._version import __version__
from gpuremote.backend.registry import probe_all
from gpuremote.cli._console import say, show
from gpuremote.client.blocking import Session
from gpuremote.client.connect import connect_sync
from gpuremote.config import parse_url
from gpuremote.errors import GpuRemoteError, TransportUnavailable
from gpuremote.memory.cuda import CudaError, cuda_driver
from gpuremote.torch_native.build import outlook
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
    if options.peer:
        parse_url(options.peer)  # wrong usage rather than a server that does not work
    report: dict[str, Any] = {
        "gpuremote": __version__,
        "python": platform.python_version(),
        "native": {"used": native is not None, "reason": NATIVE},
        "torch_native": dict(zip(("used", "reason"), outlook(), strict=True)),
        "packages": {name: _version(name) for name in PACKAGES},
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
    report["usable"] = all(report[place]["works"] for place in ("local", "peer") if place in report)
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)
    return 0 if report["usable"] else 1


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
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "cores": len(os.sched_getaffinity(0)),
        "congestion_control": _congestion(),
        "infiniband": {
            "present": devices.is_dir(),
            "devices": sorted(p.name for p in devices.iterdir()) if devices.is_dir() else [],
        },
        "gpu_memory": _gpu_memory(),
        "memlock_bytes": _limits(resource.RLIMIT_MEMLOCK),
        "file_descriptors": _limits(resource.RLIMIT_NOFILE),
    }


def _gpu_memory() -> dict[str, Any]:
    """What a card could do with the memory of each GPU; which way is taken is found out with the
    memory at hand."""
    peermem = Path("/sys/module/nvidia_peermem").is_dir()
    try:
        driver = cuda_driver()
        devices = [
            {
                "dma_buf": driver.exports_dmabuf(number),
                "ordered": driver.orders_writes(number),
                "flush": driver.flushes_writes(number),
            }
            for number in range(driver.devices())
        ]
    except CudaError as error:
        return {"devices": [], "nvidia_peermem": peermem, "reason": str(error)}
    return {"devices": devices, "nvidia_peermem": peermem, "reason": "a CUDA driver is there"}


def _ways(found: dict[str, Any]) -> str:
    if not found["devices"]:
        return str(found["reason"])
    peermem = "nvidia-peermem" if found["nvidia_peermem"] else "nvidia-peermem is not loaded"
    texts = []
    for number, gpu in enumerate(found["devices"]):
        ways = "dma-buf" if gpu["dma_buf"] else "no dma-buf"
        writes = "ordered" if gpu["ordered"] else "flushed" if gpu["flush"] else "staged"
        texts.append(f"GPU {number}: {ways}, {peermem}, a card's writes are {writes}")
    return "; ".join(texts)


def _limits(what: int) -> dict[str, int | None]:
    """Soft and hard limit; None: unlimited."""
    soft, hard = (
        None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(what)
    )
    return {"soft": soft, "hard": hard}


def _congestion() -> dict[str, Any]:
    """Algorithms that are loaded, and which of them this process may set: each is tried."""
    available, permitted = congestion.available(), []
    with socket.socket() as sock:
        default = congestion.current(sock)
        for name in available:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            except OSError:
                continue
            permitted.append(name)
    return {"default": default, "available": available, "permitted": permitted}


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
    except (GpuRemoteError, OSError) as error:
        found = {"url": url, "works": False, "error": type(error).__name__, "reason": str(error)}
        if isinstance(error, TransportUnavailable):
            found["candidates"] = error.reasons
        return found


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
    say(f"gpuremote {report['gpuremote']}, Python {report['python']}")
    packages = report["packages"].items()
    say("packages: " + ", ".join(f"{name} {found or 'missing'}" for name, found in packages))
    say(f"part in C: {report['native']['reason']}")
    front = report["torch_native"]
    tier = "C++" if front["used"] else "Python"
    say(f"gpuremote.torch uses its part in {tier}: {front['reason']}")
    for column in ("transport", "backend"):
        say("")
        show((column, "works", "why"), _verdicts(report[column + "s"]))
    machine = report["machine"]
    algorithms = machine["congestion_control"]
    say("")
    show(
        ("machine", "found"),
        [
            ("kernel", machine["kernel"]),
            ("cores", machine["cores"]),
            ("congestion control", f"{algorithms['default'] or 'unknown'} unless another is set"),
            ("  available", " ".join(algorithms["available"]) or "unknown"),
            ("  permitted", " ".join(algorithms["permitted"]) or "none"),
            ("/dev/infiniband", " ".join(machine["infiniband"]["devices"]) or "not there"),
            ("GPU memory", _ways(machine["gpu_memory"])),
            ("locked memory, bytes", _limit(machine["memlock_bytes"])),
            ("open files", _limit(machine["file_descriptors"])),
        ],
    )
    for place in ("local", "peer"):
        if place not in report:
            continue
        found = report[place]
        say("")
        if not found["works"]:
            say(f"{found['url']}: does not work: {found['reason']}")
            if "candidates" in found:
                show(("candidate", "what was found"), list(found["candidates"].items()))
            continue
        say(
            f"{found['url']}: works, {found['backend']} on {', '.join(found['devices'])}, 4 KiB "
            f"there and back in {found['round_trip_4KiB_us']} µs"
        )
        transport = found["transport"]
        say(f"transport {transport['chosen']}: {transport['reason']}")
        show(("candidate", "usable", "why"), _verdicts(transport["candidates"]))


def _verdicts(rows: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (row.get("name"), "yes" if row.get("available") else "no", row.get("reason"))
        for row in rows
    ]


def _limit(limits: dict[str, int | None]) -> str:
    soft, hard = ("unlimited" if value is None else f"{value:,}" for value in limits.values())
    return f"{soft} (at most {hard})"
