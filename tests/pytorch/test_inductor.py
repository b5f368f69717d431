"""Graphs that the server makes one piece of code of, by torch's compiler and a real one for C++."""

from __future__ import annotations

import copy
import glob
import logging
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gpuremote.backend.torch_inductor import compiler
from gpuremote.errors import OpError, ShapeError
from gpuremote.ops.torch_graph import Graph
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.torch._storages import form_of, handle_of, make_tensor
from gpuremote.torch._tier import native
from tests.pytorch.device import remote_device

pytestmark = [
    pytest.mark.skipif(native is None, reason="the same for both parts, and slow"),
    pytest.mark.skipif(
        not compiler(torch.device("cpu")), reason="torch's compiler needs a C++ compiler"
    ),
    pytest.mark.timeout(300),
]
INDUCTOR = {"inductor": True}


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    """One session, as it takes its worker seconds to import the compiler. What is compiled lies in
    a folder of the worker's, which goes with it."""
    with remote_device(torch_server.url) as found:
        pattern = f"{tempfile.gettempdir()}/gpuremote-inductor-{_homes.home().session.worker_pid}-*"
        yield found
        assert glob.glob(pattern)
    deadline = time.monotonic() + 10
    while glob.glob(pattern):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def compiled_graphs() -> int:
    return int(_homes.home().session.server_stats()["graphs_compiled"])


def compile_there(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="gpuremote", options=INDUCTOR | options)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_training_step(device: torch.device) -> None:
    """Forward, backward and an optimiser that writes to its arguments; op by op for comparison."""
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    there = copy.deepcopy(here).to(device)
    x = torch.randn(5, 8)
    at = x.to(device)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (here, there)]
    before = compiled_graphs()
    forward = compile_there(lambda x: there(x).square().mean())
    update = compile_there(optimisers[1].step)
    for step in range(4):
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss = forward(at)
        loss.backward()
        update()
        plain = here(x).square().mean()
        plain.backward()
        optimisers[0].step()
        torch.testing.assert_close(loss.cpu(), plain, rtol=1e-4, atol=1e-5, msg=f"step {step}")
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-5)
    assert compiled_graphs() - before >= 3
    # One record for each, as without.
    session = _homes.home().session
    sent = session.stats().ops
    for _ in range(5):
        optimisers[1].zero_grad()
        forward(at).backward()
        update()
    assert session.stats().ops - sent <= 5 * 4


def test_what_cannot_be_compiled_runs_op_by_op(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """And says why: here the bits of a tensor as numbers of another type."""
    before = compiled_graphs()
    x = torch.ones(64, 64)
    bits = compile_there(lambda x: (x + 1, x.view(torch.int32) + 1))
    with caplog.at_level(logging.WARNING, "gpuremote.client"):
        for _ in range(3):
            assert torch.equal(bits(x.to(device))[1].cpu(), x.view(torch.int32) + 1)
        _homes.home().session.synchronize()
    assert compiled_graphs() == before
    assert len([one for one in caplog.records if "op by op" in one.message]) == 1


def test_what_is_drawn_is_the_same(device: torch.device) -> None:
    """As op by op, from the same seed."""
    before = compiled_graphs()
    x = torch.ones(64, 64).to(device)
    ramp: Any = {
        "device": x.device,
        "dtype": x.dtype,
    }  # beside what is drawn: made by the graph itself
    drop = compile_there(
        lambda x: nn.functional.dropout(x, 0.5) + torch.rand_like(x) + torch.arange(64, **ramp)
    )
    found = []
    for _ in range(3):  # op by op, then compiled
        torch.manual_seed(5)
        found.append(drop(x).cpu())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert compiled_graphs() == before + 1


def test_other_options_are_refused(device: torch.device) -> None:
    x = torch.ones(3).to(device)
    with pytest.raises(Exception, match="no option 'fast'"):
        compile_there(lambda x: x + 1, fast=True)(x)


def test_a_failure_in_the_midst(device: torch.device) -> None:
    """What it gives and what it writes to is lost; the session goes on."""
    table = torch.arange(12.0).reshape(4, 3).to(device)
    pick = compile_there(lambda table, at: nn.functional.embedding(at, table) * 2)
    for _ in range(2):
        assert pick(table, torch.tensor([3]).to(device)).tolist() == [[18.0, 20.0, 22.0]]
    found = pick(table, torch.tensor([4]).to(device))
    with pytest.raises(OpError, match=r"graph of \d ops"):
        found.cpu()
    assert table.sum().item() == 66.0
    assert pick(table, torch.tensor([0]).to(device)).tolist() == [[0.0, 2.0, 4.0]]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[1:] * 2, x.add_(1)),
        lambda x: (x @ x.t(), x.sub_(3)),
        lambda x: (x[:, :2].mul_(3), x[0] + 1),
        lambda x: (x.add_(1), x.mul_(2)),
    ],
    ids=["a part", "transposed", "columns", "twice"],
)
def test_what_is_written_to(device: torch.device, function: Any) -> None:
    """Also where it is seen as another view, which runs op by op."""
    compiled = compile_there(lambda x: [one.clone() for one in function(x)])
    for _ in range(3):
        here = torch.arange(9.0).reshape(3, 3)
        there = here.to(device)
        found, expected = compiled(there), function(here)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other)
        torch.testing.assert_close(there.cpu(), here)


def test_results_share_no_memory(device: torch.device) -> None:
    same = compile_there(lambda x: (x * 2, x.clone(), x + 0))
    x = torch.ones(5, 5).to(device)
    for _ in range(3):
        found = [x, *same(x)]
        for k, one in enumerate(found[1:]):
            one.fill_(k + 10)
        assert [one[0, 0].item() for one in found] == [1.0, 10.0, 11.0, 12.0]


def test_a_graph_does_not_reach_beyond_a_storage(device: torch.device) -> None:
    """A client of its own making might name a smaller one than the graph was made for."""
    double = compile_there(lambda x: torch.relu(x) * 2)
    x = torch.ones(64, 64).to(device)
    for _ in range(2):
        double(x)
    home = _homes.home()
    plans: list[Any] = list(home.core.plans.values())
    graph = [plan for plan in plans if isinstance(plan, Graph) and plan.compiled][-1]
    small = torch.ones(2).to(device)
    for tensor, fits in ((small, False), (x, True)):
        number = home.core.record_call(graph, [handle_of(tensor).number])
        form = form_of(torch.float32, (64, 64), (64, 1), 0, 64 * 64 * 4)
        made = make_tensor(home, number, form)
        if fits:
            assert made.sum().item() == 2 * 64 * 64
        else:
            with pytest.raises(ShapeError, match="of the 16384 that the graph uses"):
                made.cpu()
