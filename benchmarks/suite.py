"""One run: the contenders' processes, and the rounds in which they take turns."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks import machine
from benchmarks.contenders import CONTENDERS, Entry
from benchmarks.contenders.base import Setup
from benchmarks.network import observed_congestion, private_network
from benchmarks.stamps import stamping
from benchmarks.workloads import MIB, UNITS, FamilyName, Layout, Workload
from gpuremote.testing.servers import device_server

__all__ = ["SCHEMA", "Driver", "DriverFailed", "run"]

SCHEMA: Final = 1
"""Version of the results' layout."""
ANSWER_TIMEOUT: Final = 60.0
"""Seconds for one workload with one contender."""
ENOUGH: Final = 5
"""Rounds that are run however long they take."""
BUDGET: Final = 240.0
"""Seconds that no further round may exceed."""
TRIALS: Final = 9
"""Puts and gets that decide which congestion control the sockets use."""
_ROOT: Final = Path(__file__).parent.parent


class DriverFailed(Exception):
    """A contender's process ended, took too long, or reports an error."""


@dataclass
class Driver:
    """The process of one contender, seen from the suite.

    Attributes
    ----------
    kinds : frozenset of str
        Workloads that it takes part in.
    facts : dict
        Choices of its own.
    processes : list of int
        Those that move the bytes.
    restless : bool
        They are stopped unless they are asked something.
    """

    name: str
    setup: Setup
    kinds: frozenset[str] = frozenset()
    facts: dict[str, Any] = field(default_factory=dict)
    processes: list[int] = field(default_factory=list)
    restless: bool = False

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.driver", self.name),
                *("--setup", json.dumps(asdict(self.setup))),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            # With its other side, which is stopped together with it. If this process dies, the
            # kernel ends a group that has stopped processes and nobody left to wake them.
            process_group=0,
        )

    def begin(self) -> None:
        """Let it open; does not wait."""
        self._tell({})

    def open(self) -> None:
        """Wait until both of its sides are ready."""
        answer = self._told()
        self.kinds = frozenset(answer["kinds"])
        self.facts = answer["facts"]
        self.processes = answer["processes"]
        self.restless = answer["restless"]
        self._signal(signal.SIGSTOP)

    def perform(self, workload: Workload, turn: int) -> dict[str, float]:
        """The values of one round, by metric."""
        self._signal(signal.SIGCONT)
        values: dict[str, float] = self._ask({"workload": asdict(workload), "turn": turn})["values"]
        self._signal(signal.SIGSTOP)
        return values

    def close(self) -> None:
        """End it, and with it its other side."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(15.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.restless:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._tell(request)
        return self._told()

    def _tell(self, request: dict[str, Any]) -> None:
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise DriverFailed(f"its process can't be reached: {error}") from error

    def _told(self) -> dict[str, Any]:
        process = self._process
        assert process.stdout is not None
        try:
            # One line at a time and never two: what is buffered can't hide an answer.
            if not select.select([process.stdout], [], [], ANSWER_TIMEOUT)[0]:
                process.kill()
                raise DriverFailed(f"no answer within {ANSWER_TIMEOUT:.0f} s")
            line = process.stdout.readline()
        except OSError as error:
            raise DriverFailed(f"its process can't be reached: {error}") from error
        if not line:
            raise DriverFailed(f"its process ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DriverFailed(answer["error"])
        return answer


def run(
    workloads: Sequence[Workload],
    rounds: int,
    names: Sequence[str],
    progress: Callable[[str, float], None],
    family: FamilyName = "core",
    congestion: str = "",
) -> dict[str, Any]:
    """Run everything; the results as plain values.

    Parameters
    ----------
    workloads : sequence of Workload
    rounds : int
        Values per workload and contender, if there is time for so many.
    names : sequence of str
        Contenders that take part.
    progress : callable
        Told what happens, and what share of the work is done.
    family : str
        Whose contenders are listed.
    congestion : str
        Default TCP congestion control of the run's own network; "" runs in the system's, and
        finds the best one for those who can choose.
    """
    began = time.monotonic()
    facts = machine.facts()
    left_out = {name: CONTENDERS[name].missing() for name in names}
    names = [name for name in names if not left_out[name]]
    layouts: set[Layout] = {"free", "one", "two"} if len(machine.CORES) > 1 else {"free", "one"}
    workloads = [workload for workload in workloads if workload.layout in layouts]
    with private_network(congestion) as shared:
        best = "" if shared else congestion
        if family == "core":
            progress("trying congestion controls", 0.0)
            largest = max((w.size for w in workloads if w.kind == "put"), default=0)
            trial = _try_congestion(rounds, min(largest, 64 * MIB)) if "sockets" in names else {}
            best = max(trial, key=lambda name: trial[name]) if trial else ""
            facts["congestion"]["trial_gb_per_s"] = trial
        facts["congestion"] |= {"sockets": best, "own_network": not shared, "shared": shared}
        with _servers(names, best) as setup, _drivers(names, setup, left_out, progress) as drivers:
            rounds, values = _rounds(drivers, workloads, rounds, left_out, progress)
            contenders = [
                _described(entry, drivers.get(entry.name), left_out)
                for entry in CONTENDERS.values()
                if family in entry.families
            ]
    return {
        "schema": SCHEMA,
        "family": family,
        "machine": facts,
        "rounds": rounds,
        "seconds": round(time.monotonic() - began, 1),
        "contenders": contenders,
        "workloads": [{"name": w.name, **asdict(w)} for w in workloads],
        "measurements": [
            _measurement(workload, contender, metric, found)
            for (workload, contender, metric), found in values.items()
        ],
    }


def _described(entry: Entry, driver: Driver | None, left_out: dict[str, str]) -> dict[str, Any]:
    """What the results say of a contender, asked while its sockets are open."""
    return {
        "name": entry.name,
        "title": entry.title,
        "left_out": left_out.get(entry.name, "not asked for"),
        "facts": driver.facts if driver is not None else {},
        "traits": asdict(entry.traits) if entry.traits is not None else {},
        "congestion": observed_congestion(driver.processes) if driver is not None else [],
    }


def _measurement(workload: str, contender: str, metric: str, values: list[float]) -> dict[str, Any]:
    return {
        "workload": workload,
        "contender": contender,
        "metric": metric,
        "unit": UNITS[metric],
        "median": _rounded(median(values)),
        "low": _rounded(min(values)),
        "high": _rounded(max(values)),
        "values": [_rounded(value) for value in values],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


@contextlib.contextmanager
def _servers(names: Sequence[str], congestion: str) -> Iterator[Setup]:
    """The device servers, where somebody needs them; every session gets a worker of its own."""
    if not any(CONTENDERS[name].server for name in names):
        yield Setup(congestion)
        return
    with (
        stamping() as stamps,
        # No workers ahead of need: they would be made while something is measured.
        device_server("--warm", "0") as plain,
        device_server("--warm", "0", "--backend", "stamps") as stamped,
    ):
        tcp = "?transport=tcp"
        yield Setup(congestion, plain.url + tcp, stamped.url + tcp, str(stamps))


@contextlib.contextmanager
def _drivers(
    names: Sequence[str],
    setup: Setup,
    left_out: dict[str, str],
    progress: Callable[[str, float], None],
) -> Iterator[dict[str, Driver]]:
    drivers = {name: Driver(name, setup) for name in names}
    # Other libraries one by one: some give up where many start together, some poll at once.
    peers = [[name] for name in names if CONTENDERS[name].extra]
    groups = [*peers, [name for name in names if not CONTENDERS[name].extra]]
    try:
        for group in groups:
            # All at once, as most of it is waiting for others.
            for step in (Driver.begin, Driver.open):
                for name in group:
                    progress(f"starting {CONTENDERS[name].title}", 0.0)
                    try:
                        if not left_out[name]:
                            step(drivers[name])
                    except DriverFailed as error:
                        left_out[name] = str(error)
        yield drivers
    finally:
        for driver in drivers.values():
            driver.close()


def _rounds(
    drivers: dict[str, Driver],
    workloads: Sequence[Workload],
    rounds: int,
    left_out: dict[str, str],
    progress: Callable[[str, float], None],
) -> tuple[int, dict[tuple[str, str, str], list[float]]]:
    """Round after round, workload after workload, one contender after the other.

    Every round begins with another contender, so that none always runs after the same one. On a
    machine that is busy with other things there are fewer rounds; gives how many.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    began = time.monotonic()
    for turn in range(rounds):
        spent = time.monotonic() - began
        if turn >= ENOUGH and spent * (turn + 1) / turn > BUDGET:
            rounds = turn
            break
        due = [w for w in workloads if not w.rounds or turn < w.rounds]
        for done, workload in enumerate(due):
            share = (turn + done / len(due)) / rounds
            progress(f"round {turn + 1} of {rounds}: {workload.name}", share)
            order = [name for name, driver in drivers.items() if workload.kind in driver.kinds]
            shift = turn % len(order) if order else 0
            for name in order[shift:] + order[:shift]:
                if left_out[name]:
                    continue
                try:
                    found = drivers[name].perform(workload, turn)
                except DriverFailed as error:
                    left_out[name] = f"failed at {workload.name}: {error}"
                    continue
                for metric, value in found.items():
                    values.setdefault((workload.name, name, metric), []).append(value)
    progress("done", 1.0)
    return rounds, values


def _try_congestion(rounds: int, size: int) -> dict[str, float]:
    """GB/s of blocking sockets by congestion control: puts and gets, interleaved.

    The best of each, as whatever else runs on the machine only makes them slower.
    """
    trials = min(TRIALS, rounds)
    workloads = [Workload("put", size), Workload("get", size)] if size else []
    drivers: dict[str, Driver] = {}
    speeds: dict[str, list[float]] = {}
    try:
        for name in machine.allowed_congestion():
            drivers[name] = Driver("sockets", Setup(name))
            drivers[name].begin()
        for driver in drivers.values():
            driver.open()
        for turn in range(trials):
            for name, driver in drivers.items():
                for workload in workloads:
                    found = driver.perform(workload, turn)
                    speeds.setdefault(name, []).append(found["gb_per_s"])
    except DriverFailed:
        return {}
    finally:
        for driver in drivers.values():
            driver.close()
    return {name: _rounded(max(found)) for name, found in speeds.items()}
