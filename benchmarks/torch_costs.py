"""What PyTorch on a remote device costs, beside PyTorch here: `python -m benchmarks.torch_costs`.

Everything in one run, with one thread at either end and client and server on a core each, for the
part in C++ and the one in Python in turn: the client's time per small op; a training step of a
transformer layer, op by op, with torch.compile and captured; the same through an emulated way.
Counted beside it: plans that were not known, bytes, messages, round trips.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
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
LAYERS: Final = 48
TIERS: Final = ("cpp", "python")
STEPS: Final = 10
"""After so many the loss is read."""


def main() -> None:
    parser = argparse.ArgumentParser(description="what PyTorch on a remote device costs")
    parser.add_argument("--out", help="a file for the figures as JSON")
    parser.add_argument("--tier", choices=TIERS, help="only this part, in this process")
    options = parser.parse_args()
    found = measure() if options.tier else both()
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")


def both() -> dict[str, Any]:
    """Each part in a process of its own, as a process has one of them."""
    found: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.torch_costs", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    for tier in TIERS:
        command = [sys.executable, "-m", "benchmarks.torch_costs", "--tier", tier]
        environment = os.environ | {"GPUREMOTE_TORCH_TIER": tier}
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, timeout=600
        )
        found[tier] = json.loads(done.stdout)
    return found


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the server; several threads on a core spin
    found: dict[str, Any] = {}
    with device_server("--backend", "torch", "--warm", "1", "--insecure") as server:
        gpuremote.torch.connect(f"{server.url}?transport=shm")
        home = _homes.home()
        apart(home.session.worker_pid)
        found["server"] = home.session.devices[home.number].model
        found["op, µs"] = {device: op_costs(device) for device in ("cpu", "remote")}
        found["chain of 20,000 ops, µs per op"] = chain()
        found["transformer layer, ms per step"] = {
            "cpu": layer("cpu"),
            "remote": layer("remote"),
            "remote, compiled": layer("remote", how=compiled),
            "remote, captured": layer("remote", how=captured),
        }
        found["counted per step"] = {
            "op by op": counted(step_of("remote")),
            "compiled": counted(compiled("remote")),
            "captured": counted(captured("remote")),
        }
        gpuremote.torch.close()
        relay = RelayProcess(server.port, DELAY)
        try:
            gpuremote.torch.connect(f"gpu://127.0.0.1:{relay.port}?transport=tcp&lanes=1")
            apart(_homes.home().session.worker_pid)
            found[f"a model of {LAYERS} matrices of 256 KiB through {DELAY} ms"] = moved()
            found[f"step through {DELAY} ms, ms"] = {
                "op by op": layer("remote", reads=True),
                "captured": layer("remote", reads=True, how=captured),
            }
        finally:
            gpuremote.torch.close()
            relay.close()
    return found


def moved() -> dict[str, float]:
    """``model.to``: milliseconds until it returns, and until the server has it; its waits."""
    session = _homes.home().session
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(LAYERS)))
    session.synchronize()
    trips, begin = session.stats().round_trips.total(), time.perf_counter()
    model.to("remote")
    returned = time.perf_counter() - begin
    trips = session.stats().round_trips.total() - trips
    session.synchronize()
    there = time.perf_counter() - begin
    return {
        "ms": round(1e3 * returned, 1),
        "ms until it is there": round(1e3 * there, 1),
        "round trips": trips,
    }


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


def parts(device: str) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), capturable=device != "cpu")
    return model, optimiser, torch.randn(2, 16, 64).to(device)


def step_of(device: str) -> Callable[[], Tensor]:
    model, optimiser, data = parts(device)
    if device != "cpu":
        # As a program would have it that does not capture.
        optimiser = torch.optim.AdamW(model.parameters())

    def step() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = model(data).square().mean()
        loss.backward()
        optimiser.step()
        return loss

    return step


def compiled(device: str) -> Callable[[], Tensor]:
    """Forward, backward and optimiser are a graph each."""
    model, optimiser, data = parts(device)

    def forward(x: Tensor) -> Tensor:
        loss: Tensor = model(x).square().mean()
        return loss

    forward_graph: Any = torch.compile(forward, backend="gpuremote")
    update: Any = torch.compile(optimiser.step, backend="gpuremote")

    def step() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = forward_graph(data)
        loss.backward()
        update()
        return loss

    return step


def captured(device: str) -> Callable[[], Tensor]:
    """All of it is one record."""
    model, optimiser, data = parts(device)

    def whole(x: Tensor) -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss

    step = gpuremote.torch.capture(whole)
    return lambda: step(data)


def layer(
    device: str, *, reads: bool = False, how: Callable[[str], Callable[[], Tensor]] = step_of
) -> dict[str, float]:
    """Time until the call returns, and of a step in all; with ``reads`` the loss is looked at after
    every ``STEPS`` steps, else at the end of all."""
    step = how(device)
    for _ in range(6):
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
        else:
            settle(device)
        total.append((time.perf_counter() - begin) * 1e3 / STEPS)
    return {"client": round(median(issued), 3), "in all": round(median(total), 3)}


def counted(step: Callable[[], Tensor]) -> dict[str, float]:
    for _ in range(6):
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
        "messages": (after.messages_sent - before.messages_sent) / STEPS,
        "round trips": sum(after.round_trips.values()) - sum(before.round_trips.values()),
    }


if __name__ == "__main__":
    main()
