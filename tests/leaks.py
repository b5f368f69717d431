"""What a test may leave behind: nothing. Snapshots of what this process holds, compared.

Linux only, as far as descriptors, processes and shared memory go (all read from ``/proc`` and
``/dev/shm``); elsewhere only threads are compared.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHM_PREFIX = "gpuremote"
THREAD_PREFIX = "gpuremote"

_MARK = "GPUREMOTE_TEST_PROCESS"
_PROC = Path("/proc")
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """One process that this test process started, directly or not."""

    parent: int
    text: str


@dataclass(frozen=True)
class Snapshot:
    """What the process holds at one moment."""

    descriptors: dict[int, str]
    processes: dict[int, Process]
    threads: frozenset[threading.Thread]
    segments: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(
            dict(_descriptors()),
            dict(_descendants()),
            frozenset(threading.enumerate()),
            frozenset(_segments()),
        )

    def left_behind(self, before: Snapshot) -> list[str]:
        """What is here and was not there ``before``, one line each."""
        lines = [
            f"file descriptor {fd}: {target}"
            for fd, target in self.descriptors.items()
            if before.descriptors.get(fd) != target
        ]
        lines += [
            f"process {pid}: {process.text}"
            for pid, process in self.processes.items()
            if pid not in before.processes and not self._owned(pid, before)
        ]
        lines += [
            f"thread {thread.name!r}{' (daemon)' if thread.daemon else ''}"
            for thread in self.threads - before.threads
            if not thread.daemon or thread.name.startswith(THREAD_PREFIX)
        ]
        lines += [f"shared memory {name}" for name in sorted(self.segments - before.segments)]
        return lines

    def _owned(self, pid: int, before: Snapshot) -> bool:
        """Whether an ancestor was there before: a server of the whole module, say, that keeps
        its stock of workers filled."""
        process = self.processes.get(pid)
        while process is not None:
            if process.parent in before.processes:
                return True
            process = self.processes.get(process.parent)
        return False


def settled_leaks(before: Snapshot, seconds: float = 2.0) -> list[str]:
    """What stays behind after garbage collection and ``seconds`` of patience."""
    deadline = time.monotonic() + seconds
    lines = Snapshot.take().left_behind(before)
    if lines:
        gc.collect()
    while lines and time.monotonic() < deadline:
        time.sleep(0.02)
        lines = Snapshot.take().left_behind(before)
    return lines


def mark_descendants() -> None:
    """Let every process started from here on be found, also after its parent has died.

    The mark is inherited through the environment. A process that was forked without exec does
    not show it, but is found through its parent.
    """
    os.environ[_MARK] = uuid.uuid4().hex


def _descriptors() -> Iterator[tuple[int, str]]:
    folder = _PROC / "self" / "fd"
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            yield int(name), os.readlink(folder / name)


_strangers: set[str] = set()
"""Processes that are older than this one. Most are, and to look at all of them twice per test took
longer than most tests."""


def _descendants() -> Iterator[tuple[int, Process]]:
    if not _PROC.is_dir():
        return
    me = os.getpid()
    mark = f"{_MARK}={os.environ.get(_MARK, '')}".encode()
    began = _stat("self").began
    names = [name for name in os.listdir(_PROC) if name.isdigit() and int(name) != me]
    _strangers.intersection_update(names)
    for name in names:
        if name in _strangers:
            continue
        # A process may end at any moment, and some are not ours to read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            stat = _stat(name)
            if stat.began < began:
                _strangers.add(name)
                continue
            if stat.parent == me or mark in _environ(name, stat).split(b"\0"):
                command = (
                    _read(name, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
                )
                text = f"{command or stat.comm} (state {stat.state}, parent {stat.parent})"
                yield int(name), Process(stat.parent, text)


def _environ(name: str, stat: _Stat) -> bytes:
    """The environment of a process; one that is about to run another program has none for a moment,
    and its parent goes on by then."""
    found = _read(name, "environ")
    deadline = time.monotonic() + 0.1
    while not found and stat.parent != 2 and stat.state != "Z" and time.monotonic() < deadline:
        time.sleep(0.001)
        found = _read(name, "environ")
    return found


@dataclass(frozen=True)
class _Stat:
    """Of one process: its name, state, parent, and when it began (clock ticks since boot)."""

    comm: str
    state: str
    parent: int
    began: int


def _stat(name: str) -> _Stat:
    # "pid (comm) state parent ...", where comm may contain anything
    comm, _, rest = _read(name, "stat").decode(errors="replace").partition("(")[2].rpartition(")")
    fields = rest.split()
    return _Stat(comm, fields[0], int(fields[1]), int(fields[19]))


def _read(name: str, what: str) -> bytes:
    """A file of a process. Twice per test and for every process: in the cheapest way."""
    with open(f"{_PROC}/{name}/{what}", "rb", buffering=0) as file:
        return file.readall()


def _segments() -> Iterator[str]:
    if _SHM.is_dir():
        for name in os.listdir(_SHM):
            if name.startswith(SHM_PREFIX):
                yield str(_SHM / name)
