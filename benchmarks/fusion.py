"""Chains of elementwise ops on a server, beside NumPy here: `python -m benchmarks.fusion`.

1,000 ops on arrays of 1 MiB, each on the result of the one before, in turns: NumPy here, with a new
array for every result as a program has them, and written in place; on a server that runs op by op
(``GPUREMOTE_FUSION=0``); on one that runs chains as one. Client and server have a core each, and
NumPy has the server's. The time is that from the first op to the end of ``synchronize()``; beside
it stand the round trips and the processor time of whoever computes, which other processes on this
machine change less. The bits of all are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import gpuremote
from benchmarks.machine import facts, pin
from gpuremote.testing.servers import device_server

Array = npt.NDArray[Any]

ROUNDS: Final = 9
OPS: Final = 1000
NBYTES: Final = 1 << 20
RESULT: Final = Path(__file__).parent / "results" / "fusion.json"


def arithmetic(x: Any, y: Any) -> Any:
    """Additions and multiplications, half of them with an array and half with a number."""
    for _ in range(OPS // 4):
        x = x * y
        x = x + y
        x = x * 0.5
        x = x + 0.25
    return x


def arithmetic_in_place(x: Array, y: Array) -> Array:
    x = x.copy()
    for _ in range(OPS // 4):
        x *= y
        x += y
        x *= 0.5
        x += 0.25
    return x


def functions(x: Any, y: Any) -> Any:
    """One op of four is an ``exp``, one a ``sqrt``."""
    for _ in range(OPS // 4):
        x = x * y
        x = np.exp(x)
        x = np.sqrt(x)
        x = x - y
    return x


def functions_in_place(x: Array, y: Array) -> Array:
    x = x.copy()
    for _ in range(OPS // 4):
        x *= y
        np.exp(x, out=x)
        np.sqrt(x, out=x)
        x -= y
    return x


def wide(x: Any, y: Any) -> Any:
    """Several results that are needed at a time, as expressions of a program have them."""
    for _ in range(OPS // 10):
        a = x * y
        b = x + y
        c = a - b
        x = (a * a + b * b) * 0.125 + c * 0.5 - y
    return x


CHAINS: Final[dict[str, tuple[Callable[[Any, Any], Any], Callable[[Array, Array], Array] | None]]]
CHAINS = {
    "add, multiply": (arithmetic, arithmetic_in_place),
    "exp, sqrt": (functions, functions_in_place),
    "expressions": (wide, None),
}


@contextmanager
def served(name: str) -> Iterator[str]:
    """The address of a server of its own."""
    os.environ["GPUREMOTE_FUSION"] = "0" if name == "remote, op by op" else "1"
    with device_server("--warm", "1") as server:
        del os.environ["GPUREMOTE_FUSION"]  # the server has it
        yield server.url


def busy(worker: int) -> float:
    """Seconds of processor time that the worker has had."""
    tasks = Path(f"/proc/{worker}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def remote(session: Any, chain: Callable[[Any, Any], Any], x: Any, y: Any) -> dict[str, Any]:
    session.synchronize()
    trips, ran = session.stats().round_trips.total(), session.server_stats()
    worked, begin = busy(session.worker_pid), time.perf_counter()
    result = chain(x, y)
    issued = time.perf_counter()
    session.synchronize()
    end = time.perf_counter()
    worked = busy(session.worker_pid) - worked
    trips = session.stats().round_trips.total() - trips - 1  # server_stats
    after = session.server_stats()
    return {
        "µs per op": (end - begin) / OPS * 1e6,
        "processor, µs per op": worked / OPS * 1e6,
        "client, µs per op": (issued - begin) / OPS * 1e6,
        "round trips": trips,
        "ops fused": after["ops_fused"] - ran["ops_fused"],
        "ops": after["ops"] - ran["ops"],
        "bits": result.get().tobytes(),
    }


def local(chain: Callable[[Any, Any], Any], x: Array, y: Array) -> dict[str, Any]:
    begin, worked = time.perf_counter(), time.thread_time()
    result = chain(x, y)
    return {
        "µs per op": (time.perf_counter() - begin) / OPS * 1e6,
        "processor, µs per op": (time.thread_time() - worked) / OPS * 1e6,
        "bits": result.tobytes(),
    }


@contextmanager
def core_of(process: int) -> Iterator[None]:
    """This thread runs where another process does."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(process))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(urls: dict[str, str], rounds: int) -> dict[str, Any]:
    times: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for turn in range(rounds):
        # New ones each time: where memory lies makes a tenth for as long as a process lives.
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(gpuremote.connect_sync(url)) for name, url in urls.items()
            }
            for session in sessions.values():
                pin(os.getpid(), session.worker_pid, "two", turn)
            one_round(sessions, times)
    return {title: summed_up(found) for title, found in times.items()}


def one_round(sessions: dict[str, Any], times: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    worker = next(iter(sessions.values())).worker_pid
    for dtype in ("float64", "float32"):
        size = NBYTES // np.dtype(dtype).itemsize
        chance = np.random.default_rng(1)
        here = [chance.random(size).astype(dtype), (0.5 + chance.random(size) / 2).astype(dtype)]
        there = {name: [s.devices[0].put(host) for host in here] for name, s in sessions.items()}
        for title, (chain, in_place) in CHAINS.items():
            found = times.setdefault(f"{title}, {dtype}", {})
            for _ in range(2):  # the first time everybody has something to find out
                with core_of(worker):
                    turns = {"NumPy": local(chain, *here)}
                    if in_place is not None:
                        turns["NumPy, in place"] = local(in_place, *here)
                for name, session in sessions.items():
                    turns[name] = remote(session, chain, *there[name])
            for name, turn in turns.items():
                found.setdefault(name, []).append(turn)


def summed_up(times: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the rounds, and the medians of the ratios within a round."""
    bits = {name: turns[0]["bits"] for name, turns in times.items()}
    same = {name: value == bits["NumPy"] for name, value in bits.items()}
    found: dict[str, Any] = {}
    for name, turns in times.items():
        for turn in turns:
            assert turn.pop("bits") == bits[name], f"{name} gave other bits another time"
        keys = turns[0].keys()
        found[name] = {key: round(median(turn[key] for turn in turns), 2) for key in keys}
        for key, title in (
            ("µs per op", "of NumPy"),
            ("processor, µs per op", "of NumPy's processor time"),
        ):
            ratios = [
                turn[key] / base[key] for turn, base in zip(turns, times["NumPy"], strict=True)
            ]
            found[name][title] = {
                "median": round(median(ratios), 2),
                "least": round(min(ratios), 2),
                "most": round(max(ratios), 2),
            }
        found[name]["same bits as NumPy"] = same[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="chains of elementwise ops beside NumPy")
    parser.add_argument("--out", default=str(RESULT), help="a file for the figures as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with served("remote, op by op") as plain, served("remote, fused") as fused:
        urls = {"remote, op by op": plain, "remote, fused": fused}
        found = {
            "ops": OPS,
            "bytes": NBYTES,
            "rounds": options.rounds,
            "machine": facts(),
            "chains": measure(urls, options.rounds),
        }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
