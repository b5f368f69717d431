"""Which kernel computes attention: that of the server's device. For processors torch knows it here,
a server with CUDA is asked, once for each kind of call. What a card does then is in tests/gpu."""

from __future__ import annotations

import warnings
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


def shaped(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    made = torch.randn(shape).to(dtype)
    return made.requires_grad_() if grad else made


HEADS = (2, 3, 8, 16)
CALLS: dict[str, tuple[Any, list[torch.Tensor]]] = {
    "plain": ({}, [shaped(*HEADS) for _ in range(3)]),
    "causal": ({"is_causal": True}, [shaped(*HEADS) for _ in range(3)]),
    "scaled": ({"scale": 0.3}, [shaped(*HEADS) for _ in range(3)]),
    "one query": ({}, [shaped(2, 3, 1, 16), shaped(*HEADS), shaped(*HEADS)]),
    "mask": ({}, [*(shaped(*HEADS) for _ in range(3)), torch.randn(8, 8)]),
    "mask and causal": (
        {"is_causal": True},
        [*(shaped(*HEADS) for _ in range(3)), torch.randn(8, 8)],
    ),
    "mask of bool": ({}, [*(shaped(*HEADS) for _ in range(3)), torch.rand(2, 1, 8, 8) > 0.3]),
    "mask that learns": ({}, [*(shaped(*HEADS) for _ in range(3)), shaped(8, 8)]),
    "without gradients": ({}, [shaped(*HEADS, grad=False) for _ in range(3)]),
    "double": ({}, [shaped(*HEADS, dtype=torch.float64) for _ in range(3)]),
    "bfloat16": ({}, [shaped(*HEADS, dtype=torch.bfloat16) for _ in range(3)]),
    "of three dimensions": ({}, [shaped(3, 8, 16) for _ in range(3)]),
    "grouped": ({"enable_gqa": True}, [shaped(2, 6, 8, 16), shaped(*HEADS), shaped(*HEADS)]),
}
FUSED = set(CALLS) - {"mask that learns", "of three dimensions"}
if _attention.DOUBLES_DIFFER:
    FUSED -= {"double"}


def attention(call: str, where: str, moved: Any = None) -> list[torch.Tensor]:
    """The result, and the gradients of what wants some."""
    options, operands = CALLS[call]
    given = [x.detach().to(where).requires_grad_(x.requires_grad) for x in operands]
    made = F.scaled_dot_product_attention(*(map(moved, given) if moved else given), **options)
    if made.requires_grad:
        made.square().sum().backward()
    gradients = [x.grad.cpu() for x in given if x.grad is not None]
    assert len(gradients) == sum(x.requires_grad for x in operands)
    return [made.detach().cpu(), *gradients]


@pytest.mark.parametrize("call", CALLS)
def test_as_processors_do(call: str, device: torch.device) -> None:
    """The same kernel computes the same, bit for bit."""
    for made, wanted in zip(attention(call, "remote"), attention(call, "cpu"), strict=True):
        if call in FUSED:
            assert torch.equal(made, wanted)
        torch.testing.assert_close(made, wanted)
        assert made.stride() == wanted.stride()


@pytest.mark.parametrize("call", CALLS)
def test_one_op(call: str, device: torch.device) -> None:
    options, operands = CALLS[call]
    given = [x.detach().to("remote").requires_grad_(x.requires_grad) for x in operands]
    session = _homes.home().session
    session.synchronize()
    before, trips = session.stats().ops, session.stats().round_trips.total()
    F.scaled_dot_product_attention(*given, **options)
    masking = 3 if call == "mask of bool" else 0  # zeros, not, fill
    assert (session.stats().ops - before == 1 + masking) == (call in FUSED)
    assert session.stats().round_trips.total() == trips
    if call == "mask and causal":
        return  # as plain ops torch refuses that
    before = session.stats().ops
    with sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(*given, **options)
    assert session.stats().ops - before > 4


def test_rows_that_do_not_lie_together(device: torch.device) -> None:
    """Torch's kernel for processors takes them only if they do."""
    for moved in (lambda x: x.mT.contiguous().mT, lambda x: x.transpose(1, 2)):
        pairs = zip(
            attention("plain", "remote", moved), attention("plain", "cpu", moved), strict=True
        )
        assert all(torch.equal(made, wanted) for made, wanted in pairs)


def test_within_transforms(device: torch.device) -> None:
    q, k, v = (torch.randn(4, *HEADS) for _ in range(3))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v).square().sum()  # type: ignore[no-any-return]

    slopes: Any = torch.func.grad(loss)
    for function in (slopes, torch.func.vmap(loss)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has no rule of its own for several at once
            here = function(q, k, v)
            there = function(*(x.to("remote") for x in (q, k, v)))
        torch.testing.assert_close(there.cpu(), here)


def test_in_a_graph(device: torch.device) -> None:
    """With the part in C++ and for a shape that is known the same kernel, else plain ops."""
    torch._dynamo.reset()

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return F.scaled_dot_product_attention(q, k, v)

    def found(function: Any, where: str) -> list[Any]:
        operands = [x.detach().to(where).requires_grad_() for x in CALLS["plain"][1]]
        made = function(*operands)
        made.sum().backward()
        return [made.detach().cpu(), *(x.grad.cpu() for x in operands)]  # type: ignore[union-attr]

    compiled: Any = torch.compile(plain, backend="gpuremote")
    for _ in range(3):
        for made, wanted in zip(found(compiled, "remote"), found(plain, "cpu"), strict=True):
            torch.testing.assert_close(made, wanted)
            assert native is None or torch.equal(made, wanted)
    longer = [torch.randn(2, 3, 9, 16) for _ in range(3)]
    torch.testing.assert_close(compiled(*(x.to("remote") for x in longer)).cpu(), plain(*longer))


def test_what_torch_refuses(device: torch.device) -> None:
    """In its words: both parts leave that to its own checks."""
    x = torch.randn(HEADS)
    for where in ("cpu", "remote"):
        y = x.to(where)
        with pytest.raises(RuntimeError, match="same dtype"):
            F.scaled_dot_product_attention(y, y.bool(), y)


def test_mixed_devices_are_refused(device: torch.device) -> None:
    x = torch.randn(HEADS)
    with pytest.raises(RuntimeError, match="device"):
        F.scaled_dot_product_attention(x.to("remote"), x, x)


def test_asked_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    home = _homes.home()
    monkeypatch.setattr(home, "kind", "cuda")
    # The kernel of the host stands in for CUDA's.
    monkeypatch.setattr(_attention, "OVERRIDEABLE", _attention.FLASH)
    monkeypatch.setattr(home, "choices", {})
    x = torch.randn(HEADS).to("remote")
    session = home.session
    trips = session.stats().round_trips.total()
    for _ in range(3):
        assert torch._fused_sdp_choice(x, x, x, None, 0.0, True) == _attention.FLASH
    assert list(home.choices.values()) == [_attention.FLASH]
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        assert torch._fused_sdp_choice(x, x, x) == _attention.MATH
    assert list(home.choices.values()) == [_attention.FLASH, _attention.MATH]
    assert session.stats().round_trips.total() == trips + 2


def test_generation_does_not_ask_with_each_word(monkeypatch: pytest.MonkeyPatch) -> None:
    home = _homes.home()
    monkeypatch.setattr(home, "kind", "cuda")
    monkeypatch.setattr(home, "choices", {})
    session = home.session
    query = torch.randn(1, 4, 1, 16).to("remote")
    cache = torch.randn(1, 4, 300, 16).to("remote")
    trips = session.stats().round_trips.total()
    keys = cache
    for length in range(2, 300):
        keys = cache[:, :, :length].contiguous()
        torch._fused_sdp_choice(query, keys, keys)
    assert session.stats().round_trips.total() - trips == len(home.choices) <= 8
    # What may matter is another kind.
    mask = keys[0, 0, :1, :1].expand(1, 299)
    others: list[tuple[Any, ...]] = [
        (query, query, query),
        (query, keys, keys, None, 0.0, True),
        (keys, keys, keys, None, 0.0, True),
        (query, keys[..., :8], keys[..., :8]),
        (query, keys, keys, mask),
    ]
    for call in others:
        known = len(home.choices)
        torch._fused_sdp_choice(*call)
        assert len(home.choices) == known + 1


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
