"""A training step of the size of GPT-2 small, here and on a remote device: `python -m
benchmarks.torch_gpt2`.

On a machine with a GPU, with a server on it that has it:

    gpuremote serve --backend torch
    python -m benchmarks.torch_gpt2 --local cuda --url gpu://127.0.0.1:7700 --batch 8 --length 1024

Without options the processors of this machine, with one thread at either end, on a core each. Steps
of the two alternate, so that what else the machine does hits both. Those on a GPU of this machine
run in a process of their own: a process has one accelerator, and with gpuremote.torch that is it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import nn

from gpuremote.testing.servers import device_server

Tensor = torch.Tensor
WIDTH: Final = 768
LAYERS: Final = 12
WORDS: Final = 50257


class Gpt2(nn.Module):
    """124 million parameters: twelve layers of width 768, the head tied to the embedding."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(length, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 12, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        mask = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        made = self.words(x) + self.places.weight
        for layer in self.layers:
            made = layer(made, src_mask=self.mask, is_causal=True)
        found: Tensor = self.head(self.norm(made))
        return found


def step_of(device: str, batch: int, length: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    model = Gpt2(length).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    data = torch.randint(WORDS, (batch, length)).to(device)

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(data).flatten(0, 1), data.flatten())
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def timed(step: Callable[[], Tensor], count: int) -> tuple[float, list[float]]:
    """Seconds of ``count`` steps, with the losses read at their end."""
    begin = time.perf_counter()
    losses = torch.stack([step() for _ in range(count)]).tolist()
    return time.perf_counter() - begin, losses


Timer = Callable[[int], tuple[float, list[float]]]
"""Runs so many steps."""


def elsewhere(stack: ExitStack, device: str, batch: int, length: int) -> Timer:
    """Steps in another process."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, device, batch, length), daemon=True)
    process.start()
    theirs.close()
    pipe.recv()  # it has what it needs
    stack.callback(process.join, 10)
    stack.callback(pipe.close)

    def run(count: int) -> tuple[float, list[float]]:
        pipe.send(count)
        found: tuple[float, list[float]] = pipe.recv()
        return found

    return run


def serve(pipe: Connection, device: str, batch: int, length: int) -> None:
    step = step_of(device, batch, length)
    pipe.send(None)
    try:
        while True:
            pipe.send(timed(step, pipe.recv()))
    except EOFError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="a step of the size of GPT-2 small")
    parser.add_argument("--local", default="cpu", help="device here (default %(default)s)")
    parser.add_argument("--url", help="a server (default: one is started)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--out", help="a file for the figures as JSON")
    options = parser.parse_args()
    if options.local == "cpu":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the server
    with ExitStack() as stack:
        local = None
        if options.local != "cpu":
            local = elsewhere(stack, options.local, options.batch, options.length)
        import gpuremote.torch
        from benchmarks.torch_costs import apart
        from gpuremote.torch import _homes

        url = options.url
        if url is None:
            url = stack.enter_context(
                device_server("--backend", "torch", "--warm", "1", "--insecure")
            ).url
        gpuremote.torch.connect(url)
        stack.callback(gpuremote.torch.close)
        home = _homes.home()
        if options.url is None:
            apart(home.session.worker_pid)
        if local is None:
            step = step_of("cpu", options.batch, options.length)
            local = partial(timed, step)
        found = measure(options, local)
        found["command"] = " ".join(["python -m benchmarks.torch_gpt2", *sys.argv[1:]])
        found["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        found["python"] = platform.python_version()
        found["torch"] = torch.__version__
        found["server"] = home.session.devices[0].model
        found["load"] = os.getloadavg()[0]
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")


def measure(options: argparse.Namespace, local: Timer) -> dict[str, Any]:
    remote = partial(timed, step_of("remote", options.batch, options.length))
    steps: dict[str, Timer] = {options.local: local, "remote": remote}
    losses: dict[str, list[float]] = {name: step(2)[1] for name, step in steps.items()}
    ratios, times = [], {name: list[float]() for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            seconds, found = step(options.steps)
            times[name].append(seconds / options.steps)
            losses[name] += found
        ratios.append(times["remote"][-1] / times[options.local][-1])
    return {
        "step, s": {name: round(median(found), 4) for name, found in times.items()},
        "remote / local": round(median(ratios), 3),
        "of each round": [round(ratio, 3) for ratio in ratios],
        "last loss": {name: round(found[-1], 4) for name, found in losses.items()},
        "batch, length": [options.batch, options.length],
    }


if __name__ == "__main__":
    main()
