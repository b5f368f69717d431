"""Which kernel computes attention: a server with CUDA says so, once for each kind of call. What a
card does with that is in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpuremote.backend.torch_attention import choose_attention
from gpuremote.errors import UnsupportedOp
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _attention, _homes
from gpuremote.torch._tier import native
from tests.pytorch.device import remote_device

F: Any = torch.nn.functional
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


def choice(x: torch.Tensor, mask: Any = None, allowed: Any = (True,) * 4, **given: Any) -> int:
    wanted = (False,) * (3 if mask is None else 4)
    options = {"dropout": 0.0, "causal": False, "scale": None, "grouped": False} | given
    found = choose_attention(CPU, x, x, x, mask, gradients=wanted, allowed=allowed, **options)
    assert found.dtype == torch.uint8
    return int(found.item())


def test_what_torch_takes_here() -> None:
    x = torch.randn(1, 2, 8, 16)
    assert choice(x) == choice(x, torch.zeros(8, 8)) == SDPBackend.FLASH_ATTENTION.value
    assert choice(x, allowed=(False, True, True, True)) == SDPBackend.MATH.value
    assert choice(x, dropout=0.5) == SDPBackend.MATH.value


@pytest.mark.skipif(native is None, reason="torch asks only where the part in C++ is")
def test_asked_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    home = _homes.home()
    monkeypatch.setattr(home, "kind", "cuda")
    # The kernel of the host stands in for CUDA's.
    monkeypatch.setattr(_attention, "OVERRIDEABLE", _attention.FLASH)
    monkeypatch.setattr(home, "choices", {})
    x = torch.randn(2, 3, 8, 16)
    here, there = x.clone().requires_grad_(), x.to("remote").requires_grad_()
    for _ in range(3):
        made = F.scaled_dot_product_attention(there, there, there, is_causal=True)
        made.sum().backward()
        wanted = F.scaled_dot_product_attention(here, here, here, is_causal=True)
        wanted.sum().backward()
        torch.testing.assert_close(made.detach().cpu(), wanted.detach())
    torch.testing.assert_close(there.grad.cpu(), here.grad)  # type: ignore[union-attr]
    assert list(home.choices.values()) == [_attention.FLASH]
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        F.scaled_dot_product_attention(there, there, there)
    assert list(home.choices.values()) == [_attention.FLASH, _attention.MATH]


def test_numbers_among_the_results() -> None:
    """CUDA's kernels give lengths beside tensors; torch's rules know them, so nobody is asked."""
    x = torch.randn(2, 3, 8, 16).to("remote")
    home = _homes.home()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "kind", "cuda")
        made = torch.ops.aten._scaled_dot_product_fused_attention_overrideable(x, x, x)
    assert made[4:6] == (8, 8)
    assert (made[0].shape, made[1].shape, made[2]) == (x.shape, (2, 3, 8), None)
    with pytest.raises(UnsupportedOp, match="_scaled_dot_product_flash_attention"):
        made[0].cpu()  # this server has no CUDA
