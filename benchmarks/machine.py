"""What the suite asks the system: facts for the record, CPU time, memory, bytes, cores."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.workloads import MIB, Layout

__all__ = [
    "CORES",
    "allowed_congestion",
    "cpu_seconds",
    "facts",
    "peak_mib",
    "pin",
    "reset_peak",
    "resident_mib",
    "tcp_bytes",
    "tcp_socket",
]

CORES: Final = sorted(os.sched_getaffinity(0))
"""Processors that this process may use."""

_PACKAGES: Final = (
    *("gpuremote", "numpy", "uvloop", "pyzmq", "msgpack", "torch", "ucxx-cu12", "libucx-cu12"),
    *("nixl", "mooncake-transfer-engine-non-cuda", "grpcio", "pyarrow", "ray", "distributed"),
)
_TCP_INFO_SIZE: Final = 216
_RECEIVED: Final = struct.Struct("=128xQ")  # tcpi_bytes_received
_SENT: Final = struct.Struct("=200xQQ")  # tcpi_bytes_sent, tcpi_bytes_retrans of them


def facts() -> dict[str, Any]:
    """The machine, without anything that names it."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpus": len(CORES),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": versions,
        "load_average": round(os.getloadavg()[0], 2),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "congestion": {
            "system": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
            "allowed": allowed_congestion(),
        },
    }


def allowed_congestion() -> list[str]:
    """Congestion control algorithms of TCP that anybody may set."""
    return _read("/proc/sys/net/ipv4/tcp_allowed_congestion_control").split()


def tcp_socket(congestion: str) -> socket.socket:
    """A TCP socket that sends at once; what a listening one accepts is set up as itself.

    Parameters
    ----------
    congestion : str
        Its congestion control; "" keeps the system's.
    """
    sock = socket.socket(proto=socket.IPPROTO_TCP)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if congestion:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    return sock


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used, all of its threads, in user and kernel."""
    # The clock that clock_getcpuclockid(3) gives, in nanoseconds; /proc has hundredths.
    return time.clock_gettime((~process << 3) | 2)


def resident_mib(process: int) -> float:
    """Memory of a process now."""
    return _status(process, "VmRSS")


def peak_mib(process: int) -> float:
    """Most memory that a process has had (since :func:`reset_peak`)."""
    return _status(process, "VmHWM")


def reset_peak(process: int) -> None:
    """Forget the peak, where that is allowed."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{process}/clear_refs").write_text("5")


def tcp_bytes() -> int:
    """Bytes sent and received by the TCP sockets that this process has open.

    Counted by the kernel, whoever made the sockets; headers of TCP and IP not included, nor what it
    sent again, as it does where the other side was kept from running.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    total += _counted(sock)
    return total


def pin(client: int, peer: int | None, layout: Layout, turn: int) -> None:
    """Tie every thread of both processes to the cores of ``layout``, in turn to each of them."""
    first, second = CORES[turn % len(CORES)], CORES[(turn + 1) % len(CORES)]
    here, there = {
        "free": (CORES, CORES),
        "one": ([first], [first]),
        "two": ([first], [second]),
    }[layout]
    _pin_threads(client, here)
    if peer is not None:
        _pin_threads(peer, there)


def _pin_threads(process: int, cores: list[int]) -> None:
    for thread in os.listdir(f"/proc/{process}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def _counted(sock: socket.socket) -> int:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return 0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    if len(info) < _TCP_INFO_SIZE:
        return 0
    sent, again = _SENT.unpack_from(info)
    received: int = _RECEIVED.unpack_from(info)[0]
    return int(sent - again) + received


def _status(process: int, field: str) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / MIB
    return 0.0


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _chosen(path: str) -> str:
    return _read(path).partition("[")[2].partition("]")[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
