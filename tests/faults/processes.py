"""Looking at processes, in ``/proc``."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["children", "cpu_seconds", "gone", "resident", "wait_until_gone"]


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


def children(pid: int) -> list[int]:
    """Processes whose parent it is."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if int(_stat(int(name))[1]) == pid:
                    found.append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def cpu_seconds(pid: int) -> float:
    """Time that the process has computed, in seconds."""
    fields = _stat(pid)
    ticks: int = os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks


def resident(pid: int) -> int:
    """Memory of the process in bytes."""
    page: int = os.sysconf("SC_PAGE_SIZE")
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page
