"""One workload with one contender, once: the values of one round."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Final

import numpy as np

from benchmarks import machine
from benchmarks.contenders.base import Bytes, Contender
from benchmarks.workloads import FIRST, MIB, Kind, Workload

__all__ = ["perform"]

CYCLES: Final = 3
"""Transfers that may have to share the memory of one."""
RESTS: Final = 6
"""Switch intervals before a call beside a busy thread."""
BURN: Final = 5_000_000
"""Nanoseconds that the caller of a first op goes on."""


def perform(contender: Contender, workload: Workload, turn: int) -> dict[str, float]:
    """The values of one round, by metric.

    Parameters
    ----------
    turn : int
        Number of the round; the pinned ones take the cores in turn.
    """
    if workload.distance:
        contender.move_to(workload.distance)
    machine.pin(os.getpid(), contender.peer, workload.layout, turn)
    try:
        return _KINDS[workload.kind](contender, workload)
    finally:
        machine.pin(os.getpid(), contender.peer, "free", turn)


def _round_trip(contender: Contender, workload: Workload) -> dict[str, float]:
    call = contender.echoes if workload.kind == "echo" else contender.round_trips
    call(workload.size, min(workload.repeat, max(5, workload.repeat // 20)))
    times = call(workload.size, workload.repeat)
    return {"us": median(times) / 1e3, "p99_us": quantiles(times, n=100)[98] / 1e3}


def _transfer(contender: Contender, workload: Workload) -> dict[str, float]:
    memory = _pattern(workload.size)
    call: Callable[[Bytes, int], list[int]] = contender.puts
    if workload.kind == "get":
        contender.puts(memory, 1)
        memory[:] = 0
        call = contender.gets
    # Until either side uses memory that it has touched before.
    call(memory, workload.warm if workload.kind == "put" else 1)
    here, there, wire = time.process_time(), _peer_cpu(contender), machine.tcp_bytes()
    contender.handed = []
    times = call(memory, workload.repeat)
    here, there = time.process_time() - here, _peer_cpu(contender) - there
    wire = machine.tcp_bytes() - wire
    contender.forget()
    size, moved = workload.size, workload.size * workload.repeat
    values = {
        "gb_per_s": size / median(times),
        "first_gb_per_s": size / median(times[:FIRST]),
        "client_cpu_s_per_gb": here / moved * 1e9,
        "peer_cpu_s_per_gb": there / moved * 1e9,
        "wire_bytes_per_byte": wire / moved,
    }
    if workload.kind == "get" and contender.handed:
        values["handed_gb_per_s"] = size / median(contender.handed)
    return values


def _intact(contender: Contender, workload: Workload) -> dict[str, float]:
    """Bytes that went there and came back, and others behind them in the same place."""
    for memory in (_pattern(workload.size), _pattern(workload.size)[::-1].copy()):
        expected = memory.copy()
        contender.puts(memory, 1)
        memory[:] = 0
        contender.gets(memory, 1)
        assert np.array_equal(memory, expected), "the bytes changed on their way"
        contender.forget()
    return {"intact": 1.0}


def _ops(contender: Contender, workload: Workload) -> dict[str, float]:
    count = workload.repeat
    contender.ops(workload.size, 1)  # what has to travel once has travelled
    wire = machine.tcp_bytes()
    found = contender.ops(workload.size, count)
    wire = machine.tcp_bytes() - wire
    values = {
        "issue_us_per_op": found.issue / count / 1e3,
        "total_us_per_op": found.total / count / 1e3,
        "client_cpu_us_per_op": found.cpu / count / 1e3,
        "wire_bytes_per_op": wire / count,
        "round_trips": float(found.round_trips),
    }
    if found.counted is not None:
        values["counted_bytes_per_op"] = found.counted / count
    return values


def _memory(contender: Contender, workload: Workload) -> dict[str, float]:
    """Growth of both sides from before the payload's memory was there to the peak.

    Of several transfers, one after the other: what one has left behind counts for the next.
    """
    here, there = os.getpid(), contender.peer
    contender.puts(_pattern(workload.size // 64), 1)
    contender.forget()
    before = {process: machine.resident_mib(process) for process in (here, there) if process}
    memory: Bytes
    if workload.kind == "put_memory":
        _reset_peaks(before)
        memory = _pattern(workload.size)
        for _ in range(CYCLES):
            contender.forget()
            contender.puts(memory, 1)
    else:
        contender.puts(_pattern(workload.size), 1)
        _reset_peaks(before)
        memory = np.empty(workload.size, np.uint8)
        contender.gets(memory, CYCLES)
    peaks = {process: machine.peak_mib(process) - before[process] for process in before}
    if workload.kind == "put_memory":
        memory[:] = 0
        contender.gets(memory, 1)
    assert np.array_equal(memory, _pattern(workload.size)), "the bytes changed on their way"
    contender.forget()
    values = {"client_mib": peaks[here]}
    if there:
        values["peer_mib"] = peaks[there]
    return values


def _first_op(contender: Contender, workload: Workload) -> dict[str, float]:
    times = contender.first_ops(workload.repeat, BURN)
    return {"us": median(times) / 1e3, "late": float(sum(taken >= BURN for taken in times))}


def _busy_thread(contender: Contender, workload: Workload) -> dict[str, float]:
    """Calls beside a thread that never waits; ``switch_intervals`` is what it adds to a call.

    The caller rests before each call for as long as the other thread needs to get going, and
    every time that the call gives the interpreter up, the other thread is there to take it.
    Without the rest it is a matter of luck how often that happens.
    """
    quiet = median(contender.round_trips(workload.size, workload.repeat))
    stop = False

    def spin() -> None:
        while not stop:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        rest = RESTS * sys.getswitchinterval()
        times = contender.rested_round_trips(workload.size, workload.repeat, rest)
    finally:
        stop = True
        thread.join()
    return {
        "ms": median(times) / 1e6,
        "worst_ms": max(times) / 1e6,
        "quiet_ms": quiet / 1e6,
        "switch_intervals": (median(times) - quiet) / 1e9 / sys.getswitchinterval(),
    }


_KINDS: Final[dict[Kind, Callable[[Contender, Workload], dict[str, float]]]] = {
    "round_trip": _round_trip,
    "echo": _round_trip,
    "put": _transfer,
    "get": _transfer,
    "ops": _ops,
    "put_memory": _memory,
    "get_memory": _memory,
    "first_op": _first_op,
    "busy_thread": _busy_thread,
    "intact": _intact,
}


def _pattern(size: int) -> Bytes:
    """Bytes that show when they are mixed up, made without a second array of that size."""
    pattern = np.empty(size, np.uint8)
    block = np.random.default_rng(size).integers(0, 256, MIB, np.uint8)
    for index, begin in enumerate(range(0, size, MIB)):
        part = pattern[begin : begin + MIB]
        part[:] = block[: part.size]
        part[0] = index % 256
    return pattern


def _peer_cpu(contender: Contender) -> float:
    return 0.0 if contender.peer is None else machine.cpu_seconds(contender.peer)


def _reset_peaks(processes: dict[int, float]) -> None:
    for process in processes:
        machine.reset_peak(process)
