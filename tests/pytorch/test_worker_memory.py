"""Memory that results come and go in stays with a worker that is busy, and only with that one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from tests.faults.processes import resident
from tests.pytorch.device import remote_device

MiB = 1 << 20
LENGTH = 4 * MiB  # of float32: 16 MiB, which the C library would map and unmap each time


@pytest.fixture(autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


def faults(pid: int) -> int:
    """Pages that the process has been given since it began."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_results_come_in_memory_that_others_left(device: torch.device) -> None:
    session = _homes.home().session
    x = torch.ones(LENGTH, device=device)

    def several() -> None:
        for _ in range(4):
            held = [x + k for k in range(4)]
            session.synchronize()
            del held
            session.synchronize()

    several()
    pages = 16 * (16 * MiB // 4096)
    asked = []
    for _ in range(5):  # a worker that this process kept waiting for seconds gives it back
        before = faults(session.worker_pid)
        several()
        asked.append(faults(session.worker_pid) - before)
    assert min(asked) < pages / 4, asked


def test_an_idle_worker_gives_it_back(device: torch.device) -> None:
    session = _homes.home().session
    x = torch.ones(LENGTH, device=device)
    x.sum().item()
    before = resident(session.worker_pid)
    held = [x + k for k in range(8)]
    session.synchronize()
    assert resident(session.worker_pid) - before > 7 * 16 * MiB
    del held
    session.synchronize()
    deadline = time.monotonic() + 20
    while resident(session.worker_pid) - before > 16 * MiB:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (x + 1).sum().item() == 2 * LENGTH
