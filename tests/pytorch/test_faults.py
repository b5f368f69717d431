"""What goes wrong on the other side, and what a long run leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, cast

import psutil
import pytest
import torch
from torch import nn

from gpuremote.errors import OpError
from gpuremote.ops.torch_call import Call, Result, encode
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.torch._storages import HELD
from tests.pytorch.device import remote_device

REMOTE: Any = torch.get_device_module("remote")


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(f"{torch_server.url}?memory=256MiB") as found:
        yield found


def test_many_steps_leave_nothing(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
    optimiser = torch.optim.AdamW(model.parameters())
    data = torch.randn(4, 8).to(device)

    def steps(count: int) -> None:
        for _ in range(count):
            optimiser.zero_grad()
            model(data).square().mean().backward()
            optimiser.step()
        gc.collect()
        REMOTE.synchronize()

    def sizes() -> tuple[int, int, int]:
        worker = psutil.Process(_homes.home().session.worker_pid)
        return len(HELD), psutil.Process().memory_info().rss, worker.memory_info().rss

    def growth() -> tuple[int, int]:
        """Bytes here and in the worker, of a thousand steps of some 60 ops."""
        held, here, there = sizes()
        steps(1000)
        again = sizes()
        # What a step leaves to the next one may differ.
        assert again[0] < held + 50
        return again[1] - here, again[2] - there

    steps(600)
    memory = REMOTE.memory_allocated()
    # A queue may be longer than ever, and what it took then the C library keeps: once. What steps
    # leave behind is there after every thousand of them.
    grown = [growth()]
    while max(grown[-1]) >= 8 << 20 and len(grown) < 3:
        grown.append(growth())
    assert max(grown[-1]) < 8 << 20, grown
    assert REMOTE.memory_allocated() < memory + 50_000
    assert REMOTE.mem_get_info()[1] > REMOTE.max_memory_allocated() >= memory


def test_more_memory_than_there_is(device: torch.device) -> None:
    made = torch.empty(1 << 40, dtype=torch.uint8, device=device)
    with pytest.raises(MemoryError, match="do not fit"):
        made[:1].cpu()
    assert torch.ones(2).to(device).sum().item() == 2


def test_a_definition_that_lies_about_memory(device: torch.device) -> None:
    """It makes 32 GiB and says that it makes 4 bytes: the worker has no such room, and lives."""
    home = _homes.home()
    core = home.core
    result = Result(0, home.views.get("float32", (1,), (1,)), "float32")
    arguments = [[["list", 1 << 33]], {"device": ["device"]}]
    with core.lock:
        lie = Call(core.next_plan(), "aten::zeros", 0, (), arguments, (4,), (result,))
        core.add_plan("lie", cast(Any, lie), encode(lie))
    core.record_call(lie, ())
    with pytest.raises((MemoryError, OpError)):
        REMOTE.synchronize()
    assert torch.ones(2).to(device).sum().item() == 2
