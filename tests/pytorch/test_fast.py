"""Calls of one op in every way that Python can spell it: the short way of the part in Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _fast
from gpuremote.torch._kernels import Kernel
from gpuremote.torch._storages import ODD
from gpuremote.torch._tier import native
from tests.pytorch.device import remote_device

aten = torch.ops.aten
X = torch.arange(12.0).reshape(3, 4)
CALLS: dict[str, Any] = {
    "all that is required": lambda x: aten.sum.dim_IntList(x, [0]),
    "one more": lambda x: aten.sum.dim_IntList(x, [0], True),
    "by name": lambda x: aten.sum.dim_IntList(x, [0], dtype=torch.float64),
    "one more, and by name": lambda x: aten.sum.dim_IntList(x, [0], True, dtype=torch.float64),
    "layout by name": lambda x: x.t().clone(memory_format=torch.contiguous_format),
    "several results": lambda x: aten.native_layer_norm(x, [4], x[0], x[1], 1e-5),
    "several results, one by name": lambda x: torch.max(x, 0),
    "a number for a tensor": lambda x: aten.add.Tensor(x, 2, alpha=3),
    "tensors by name": lambda x: aten.clamp.Tensor(x, min=x[0], max=x[1]),
    "no tensor by name": lambda x: aten.clamp.Tensor(x, min=x[0], max=None),
    "into a tensor": lambda x: aten.add.out(x, x, out=torch.zeros_like(x)),
    "into a tensor, and more": lambda x: aten.add.out(x, x, alpha=2, out=torch.zeros_like(x)),
    "in place, and more": lambda x: aten.add_.Tensor(x.clone(), x, alpha=2),
    "a mask": lambda x: aten.native_layer_norm_backward(
        x, x, [4], x[:, :1], x[:, :1], x[0], x[1], [True, False, True]
    ),
}


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


@pytest.mark.parametrize("how", CALLS)
def test_it_is_the_same_each_time(how: str, device: torch.device) -> None:
    """Before the plan is known, when it is, and with other values of what is no part of it."""
    x = X.to(device)
    for scale in (1, 1, 2):
        torch.testing.assert_close(_host(CALLS[how](x * scale)), _host(CALLS[how](X * scale)))


def _host(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_host(one) for one in value]
    return None if value is None else value.cpu()


def test_what_is_written_to_is_given_back(device: torch.device) -> None:
    x, out = X.to(device), torch.zeros(3, 4, device=device)
    for _ in range(3):
        assert aten.add.out(x, x, alpha=2, out=out) is out
        y = x.clone()
        assert aten.add_.Tensor(y, x, alpha=2) is y
    assert out.sum().item() == 3 * X.sum().item()


def test_conjugated_views_go_the_general_way(device: torch.device) -> None:
    x = torch.complex(X, -X)
    there = x.to(device)
    for _ in range(2):
        odd = there.conj()
        assert native is not None or ODD
        torch.testing.assert_close(
            aten.sum.dim_IntList(odd, [0], True).cpu(), x.conj().sum(0, keepdim=True)
        )
        del odd


@pytest.mark.skipif(native is not None, reason="the part in C++ knows calls by itself")
def test_only_the_first_call_of_a_way_goes_the_general_way(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    generally: list[int] = []
    run = Kernel.run

    def counted(self: Kernel, args: Any, keywords: Any, **more: Any) -> Any:
        generally.append(len(args))
        return run(self, args, keywords, **more)

    monkeypatch.setattr(Kernel, "run", counted)
    kernel = _fast.fast(Kernel(aten.sum.dim_IntList))
    x = X.to(device)
    for _ in range(5):
        kernel(x, [0])
        kernel(x, [0], True)
        kernel(x, [0], dtype=torch.float64)
    # Once for the plan of each.
    assert generally == [2, 3, 2]


@pytest.mark.skipif(native is not None, reason="the part in C++ knows calls by itself")
def test_ways_are_bounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fast, "MOST_WAYS", 1)
    kernel = _fast.fast(Kernel(aten.sum.dim_IntList))
    x = X.to(device)
    for _ in range(2):
        assert kernel(x, [0], True).shape == (1, 4)
        assert kernel(x, [0], dtype=torch.float64).dtype == torch.float64
        assert kernel(x, [0], False, dtype=torch.float64).shape == (4,)
