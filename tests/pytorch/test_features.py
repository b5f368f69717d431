"""Parts of PyTorch around the ops: compilation, loaders, profilers, modes, optimisers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import gpuremote.torch
from gpuremote.errors import GpuRemoteError
from gpuremote.ops.torch_call import Views
from gpuremote.testing.servers import RunningServer
from gpuremote.torch._inference import results_of
from tests.pytorch.device import remote_device

Tensor = torch.Tensor


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(device: torch.device, backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    compiled: Any = torch.compile(model, backend=backend)
    data = torch.randn(5, 3).to(device)
    made = compiled(data)
    made.sum().backward()
    torch.testing.assert_close(made.detach().cpu(), model(data).detach().cpu())
    assert model[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_default_compiler_says_what_to_use(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(nn.Linear(3, 2).to(device))
    with pytest.raises(Exception, match=r"backend='gpuremote'"):
        compiled(torch.randn(2, 3).to(device))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export(device: torch.device) -> None:
    model = nn.Linear(3, 2).to(device)
    data = torch.randn(2, 3).to(device)
    exported = torch.export.export(model, (data,))
    torch.testing.assert_close(exported.module()(data).detach().cpu(), model(data).detach().cpu())


def test_dispatch_modes(device: torch.device) -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    mode: Any = Watch
    with mode():
        (torch.ones(2, device=device) + 1).cpu()
    assert seen == ["aten.ones.default", "aten.add.Tensor", "aten._to_copy.default"]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch's own, 2.11
def test_profiler(device: torch.device) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (torch.ones(2, device=device) + 1).cpu()
    assert any(event.name == "aten::add" for event in profile.events())


def test_loader_with_processes(device: torch.device) -> None:
    found: list[float] = []
    loader: Any = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, num_workers=2)
    for (batch,) in loader:
        found.append(batch.to(device, non_blocking=True).sum().item())
    assert found == [6.0, 22.0]


def test_modules_without_memory_first(device: torch.device) -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    model = model.to_empty(device=device)
    nn.init.ones_(model.weight)
    assert model.weight.sum().item() == 6
    with torch.device(device):
        assert torch.zeros(2).device == device
    parameter = nn.Parameter(torch.ones(2, device=device))
    parameter.data = torch.zeros(2, device=device)
    assert parameter.sum().item() == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.Adam, {"foreach": False}),
        (torch.optim.AdamW, {"capturable": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adadelta, {}),
        (torch.optim.LBFGS, {}),
    ],
)
def test_optimisers(device: torch.device, kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start = nn.Linear(3, 2)
    data = torch.randn(4, 3)
    found: list[Tensor] = []
    for place in (torch.device("cpu"), device):
        model = nn.Linear(3, 2)
        model.load_state_dict(start.state_dict())
        model.to(place)
        local = {k: v for k, v in options.items() if k != "capturable" or place == device}
        optimiser = kind(model.parameters(), **local)
        moved = data.to(place)

        def closure(model: Any = model, optimiser: Any = optimiser, moved: Any = moved) -> Tensor:
            optimiser.zero_grad()
            loss: Tensor = model(moved).square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimiser.step(closure)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found.append(model.weight.detach().cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_anomalies(device: torch.device) -> None:
    x = torch.zeros(1, device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            pytest.raises(RuntimeError, match="SqrtBackward0"),
            torch.autograd.detect_anomaly(),
        ):
            (torch.sqrt(x) * 0).sum().backward()


def test_own_functions_and_ops(device: torch.device) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    x = torch.ones(2, device=device, requires_grad=True)
    Double.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]


def test_what_is_fast_elsewhere(device: torch.device) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 5, 8)
    attention: Any = nn.functional.scaled_dot_product_attention
    here = attention(q, q, q, is_causal=True)
    there = attention(*(q.to(device) for _ in range(3)), is_causal=True)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)
    signal = torch.randn(8)
    torch.testing.assert_close(torch.fft.rfft(signal.to(device)).cpu(), torch.fft.rfft(signal))
    assert torch.accelerator.current_accelerator() == torch.device("remote")


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_batch_norm_in_mixed_precision(device: torch.device, lower: torch.dtype) -> None:
    """Its statistics are wider than its input."""
    found: list[list[Tensor]] = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model, data = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6)
        model.to(place)
        with torch.autocast(place.type, lower):
            made = model(data.to(place))
        made.float().square().sum().backward()
        found.append([made.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])  # type: ignore[union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-2)


def test_a_rule_that_keeps_a_layout_that_repeats_itself() -> None:
    made = torch.empty(3, device="meta").expand(2, 3)
    sizes, (result,) = results_of([made], Views())
    assert result.view is not None
    assert (sizes, result.view.stride) == ([24], (3, 1))


def test_sessions_can_be_opened_anew() -> None:
    """After ``close`` the next op opens another session; older tensors are gone with the first."""
    gone = torch.ones(3).to("remote")
    gpuremote.torch.close()
    with pytest.raises(GpuRemoteError, match="closed"):
        gone + 1
    fresh = torch.ones(3).to("remote")
    assert (fresh + 1).sum().item() == 6
    del fresh, gone
    gpuremote.torch.close()
