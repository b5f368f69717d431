"""What an op of ``gpuremote.cupy`` costs its client: `python -m benchmarks.arrays`.

Client and server have a core each. In one run, in turns: a raw round trip on uvloop between two
cores, and for each kind of op the time until the call has returned, in bursts of 1,000, beside the
same op of NumPy (and of CuPy, with ``--backend cupy`` on a machine that has it). Counted beside it:
the round trips of 10,000 ops and one ``float()``; and what it costs to say beforehand which shape
and dtype an op gives, for small and for very large arrays.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

import gpuremote.cupy as xp
from benchmarks.contenders.base import Setup
from benchmarks.contenders.uvloop_echo import Awaited
from benchmarks.machine import facts, pin
from gpuremote.errors import OpError
from gpuremote.ops.catalogue import CATALOGUE
from gpuremote.ops.meta import MetaTable
from gpuremote.testing.servers import device_server

ROUNDS: Final = 9
BURST: Final = 1000
RESULT: Final = Path(__file__).parent / "results" / "arrays.json"

OPS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "x + y": lambda m, x: x + x,
    "x * 2.0": lambda m, x: x * 2.0,
    "add": lambda m, x: m.add(x, x),
    "exp": lambda m, x: m.exp(x),
    "where": lambda m, x: m.where(x, x, x),
    "sum": lambda m, x: m.sum(x, axis=0),
    "mean": lambda m, x: x.mean(),
    "matmul": lambda m, x: m.matmul(x, x),
    "reshape": lambda m, x: x.reshape(2, 8),
    "x[1:3]": lambda m, x: x[1:3],
    "concatenate": lambda m, x: m.concatenate([x, x]),
    "astype": lambda m, x: x.astype("f4"),
    "zeros": lambda m, x: m.zeros(8),
    "sort": lambda m, x: m.sort(x),
}

ELEMENTWISE: Final = ["x + y", "x * 2.0", "add", "exp"]


def burst(op: Callable[[Any, Any], Any], module: Any, x: Any) -> float:
    """Microseconds per call."""
    begin = time.perf_counter()
    for _ in range(BURST):
        op(module, x)
    return (time.perf_counter() - begin) * 1e6 / BURST


def costs(rounds: int, others: dict[str, Any], worker: int) -> dict[str, Any]:
    echo = Awaited(Setup())
    echo.open()
    try:
        session = xp.session()
        host = np.ones((4, 4))
        arrays: dict[str, Any] = {name: module.asarray(host) for name, module in others.items()}
        remote = xp.asarray(host)
        times: dict[str, dict[str, list[float]]] = {}
        trips: list[float] = []
        for _ in range(rounds + 1):
            pin(os.getpid(), echo.peer, "two", 0)
            trips.append(median(echo.round_trips(8, 500)) / 1e3)
            pin(os.getpid(), worker, "two", 0)
            for title, op in OPS.items():
                found = times.setdefault(title, {})
                session.synchronize()
                found.setdefault("remote", []).append(burst(op, xp, remote))
                session.synchronize()
                for name, module in others.items():
                    found.setdefault(name, []).append(burst(op, module, arrays[name]))
    finally:
        echo.close()
    middle = {
        title: {name: round(median(turns[1:]), 2) for name, turns in found.items()}
        for title, found in times.items()
    }
    return {
        "round trip of uvloop, µs": round(median(trips[1:]), 1),
        "client, µs per op": middle,
        "elementwise ops": summed_up(times, ELEMENTWISE, trips),
        "all ops": summed_up(times, list(OPS), trips),
    }


def summed_up(
    times: dict[str, dict[str, list[float]]], titles: list[str], trips: list[float]
) -> dict[str, Any]:
    """The median op of some, and how much of a round trip it takes, round by round."""
    middle = [median(times[title]["remote"][k] for title in titles) for k in range(len(trips))]
    ratios = [op / trip for op, trip in zip(middle, trips, strict=True)][1:]
    return {
        "µs": round(median(middle[1:]), 2),
        "of a round trip": {
            "median": round(median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
    }


def counted() -> dict[str, int]:
    session = xp.session()
    x = xp.zeros(8)
    session.synchronize()
    before = session.stats().round_trips
    for _ in range(10_000):
        x = x + 1
    float(x.sum())
    return {"ops": 10_001, "round trips": (session.stats().round_trips - before).total()}


def predicted() -> dict[str, Any]:
    """Microseconds to infer what each op of the catalogue gives, where two arrays will do: the best
    of some loops of each, as whatever else the machine does makes a loop longer."""
    metas = MetaTable()
    found: dict[str, Any] = {}
    for title, shape in (("4 x 4", (4, 4)), ("10^5 x 10^5", (100_000, 100_000))):
        meta = metas.get(shape, np.dtype("f8"), 0)
        times = []
        for spec in CATALOGUE.values():
            if spec.indexed:
                continue
            for operands in ([meta], [meta, meta]):
                try:
                    spec.infer(operands, {})  # the first time NumPy is asked for the dtype
                except OpError:
                    continue
                loops = []
                for _ in range(5):
                    begin = time.perf_counter()
                    for _ in range(100):
                        spec.infer(operands, {})
                    loops.append((time.perf_counter() - begin) * 1e6 / 100)
                times.append(min(loops))
                break
        found[title] = {
            "ops": len(times),
            "median": round(median(times), 2),
            "most": round(max(times), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="what an op of gpuremote.cupy costs its client")
    parser.add_argument("--out", default=str(RESULT), help="a file for the figures as JSON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--backend", default="numpy")
    options = parser.parse_args()
    others = {"NumPy": np}
    if options.backend == "cupy":
        others["CuPy"] = importlib.import_module("cupy")
    with device_server("--backend", options.backend, "--warm", "1") as server:
        session = xp.use(server.url)
        found = {
            "rounds": options.rounds,
            "burst": BURST,
            "machine": facts(),
            "device": session.devices[0].model,
            "transport": session.transport.name,
            "costs": costs(options.rounds, others, session.worker_pid),
            "chain": counted(),
            "inference, µs": predicted(),
        }
        xp.close()
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    Path(options.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
