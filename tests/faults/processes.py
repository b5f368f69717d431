"""Looking at processes, in ``/proc``."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["cpu_seconds", "descendants", "forked", "gone", "resident", "wait_until_gone"]


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` behind the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has)."""
    try:
        return _stat(pid)[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(*pids: int, seconds: float) -> None:
    """Fail if one of the processes lives longer than that."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if not gone(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} live on after {seconds} s"
        time.sleep(0.02)


def _children() -> dict[int, list[int]]:
    """Of each process that has any."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.setdefault(int(_stat(int(name))[1]), []).append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def descendants(pid: int) -> list[int]:
    """Processes that it has started, those that these have started, and so on."""
    children = _children()
    found = [*children.get(pid, [])]
    for child in found:  # which grows
        found += children.get(child, [])
    return found


def forked(server: int, least: int = 0) -> list[int]:
    """The workers of a device server, those that wait for a session included; once there are
    ``least``."""
    deadline = time.monotonic() + 20
    while True:
        children = _children()
        found = [worker for child in children.get(server, []) for worker in children.get(child, [])]
        if len(found) >= least:
            return found
        assert time.monotonic() < deadline, f"there are {len(found)} workers, not {least}"
        time.sleep(0.02)


def cpu_seconds(pid: int) -> float:
    """Time that the process has computed, in seconds."""
    fields = _stat(pid)
    ticks: int = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks


def resident(pid: int) -> int:
    """Memory of the process in bytes."""
    page: int = os.sysconf("SC_PAGE_SIZE")
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
