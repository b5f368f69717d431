"""What PyTorch on a remote device costs, beside PyTorch here: `python -m benchmarks.torch_costs`.

Everything in one run, with one thread at either end and client and server on a core each: the
client's time per small op; a training step of a transformer layer; the same through an emulated
way. Counted beside it: plans that were not known, bytes, round trips.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import nn

import gpuremote.torch
from benchmarks.contenders.base import RelayProcess
from gpuremote.testing.servers import device_server
from gpuremote.torch import _homes

Tensor = torch.Tensor
ROUNDS: Final = 9
DELAY: Final = 30
"""Milliseconds of round trip of the emulated way."""
STEPS: Final = 10
"""After so many the loss is read."""


def main() -> None:
    parser = argparse.ArgumentParser(description="what PyTorch on a remote device costs")
    parser.add_argument("--out", help="a file for the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server; several threads on a core spin
    found: dict[str, Any] = {"torch": torch.__version__, "load": os.getloadavg()[0]}
    with device_server("--backend", "torch", "--warm", "1", "--insecure") as server:
        gpuremote.torch.connect(f"{server.url}?transport=shm")
        apart(_homes.home().session.worker_pid)
        found["op, µs"] = {device: op_costs(device) for device in ("cpu", "remote")}
        found["chain of 20,000 ops, µs per op"] = chain()
        found["transformer layer, ms per step"] = {d: layer(d) for d in ("cpu", "remote")}
        found["counted per step"] = counted()
        gpuremote.torch.close()
        relay = RelayProcess(server.port, DELAY)
        try:
            gpuremote.torch.connect(f"gpu://127.0.0.1:{relay.port}?transport=tcp&lanes=1")
            apart(_homes.home().session.worker_pid)
            found[f"step through {DELAY} ms, ms"] = layer("remote", reads=True)
        finally:
            gpuremote.torch.close()
            relay.close()
    print(json.dumps(found, indent=2, ensure_ascii=False))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def apart(worker: int) -> None:
    """Client and worker on a core each, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        for task in os.listdir(f"/proc/{worker}/task"):
            os.sched_setaffinity(int(task), {cores[0]})
        os.sched_setaffinity(0, {cores[1]})


def settle(device: str) -> None:
    if device == "remote":
        _homes.home().session.synchronize()


def op_costs(device: str) -> dict[str, float]:
    """Time until the call returns; the server is waited for in between."""
    x, y, w = (torch.randn(4, 4).to(device) for _ in range(3))
    b = torch.randn(4).to(device)
    ops: dict[str, Callable[[], Tensor]] = {
        "add": lambda: x + y,
        "mm": lambda: x @ y,
        "relu": lambda: torch.relu(x),
        "softmax": lambda: torch.softmax(x, -1),
        "linear": lambda: nn.functional.linear(x, w, b),
        "cat": lambda: torch.cat([x, y]),
        "sum": lambda: x.sum(),
    }
    found: dict[str, list[float]] = {name: [] for name in ops}
    with torch.no_grad():
        for op in ops.values():
            for _ in range(100):
                op()
        for _ in range(ROUNDS):
            for name, op in ops.items():
                settle(device)
                begin = time.perf_counter()
                for _ in range(100):
                    op()
                found[name].append((time.perf_counter() - begin) * 1e4)
    costs = {name: round(median(times), 2) for name, times in found.items()}
    return costs | {"median": round(median(costs.values()), 2)}


def chain() -> dict[str, float]:
    """Ops without a pause: what the client needs for each, and what both do together."""
    x, y = torch.randn(4, 4).to("remote"), torch.randn(4, 4).to("remote")
    issued, total = [], []
    with torch.no_grad():
        for _ in range(3):
            settle("remote")
            z, begin = x, time.perf_counter()
            for _ in range(20_000):
                z = z + y
            issued.append((time.perf_counter() - begin) * 50)
            z.sum().item()
            total.append((time.perf_counter() - begin) * 50)
    return {"client": round(median(issued), 2), "in all": round(median(total), 2)}


def step_of(device: str) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(device)
    optimiser = torch.optim.AdamW(model.parameters())
    data = torch.randn(2, 16, 64).to(device)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = model(data).square().mean()
        loss.backward()
        optimiser.step()
        return loss

    return step


def layer(device: str, *, reads: bool = False) -> dict[str, float]:
    """Time until the call returns, and of a step in all; with ``reads`` the loss is looked at after
    every ``STEPS`` steps, else at the end of all."""
    step = step_of(device)
    for _ in range(5):
        step().item()
    issued, total = [], []
    for _ in range(ROUNDS):
        settle(device)
        begin = time.perf_counter()
        for _ in range(STEPS):
            loss = step()
        issued.append((time.perf_counter() - begin) * 1e3 / STEPS)
        if reads:
            loss.item()
        settle(device)
        total.append((time.perf_counter() - begin) * 1e3 / STEPS)
    return {"client": round(median(issued), 3), "in all": round(median(total), 3)}


def counted() -> dict[str, float]:
    step = step_of("remote")
    for _ in range(5):
        step()
    settle("remote")
    session = _homes.home().session
    before = session.stats()
    for _ in range(STEPS):
        step()
    session.flush()
    after = session.stats()
    ops = after.ops - before.ops
    return {
        "ops": ops / STEPS,
        "plans that were not known": after.plans - before.plans,
        "bytes per op": round((after.bytes_sent - before.bytes_sent) / ops, 1),
        "round trips": sum(after.round_trips.values()) - sum(before.round_trips.values()),
    }


if __name__ == "__main__":
    main()
