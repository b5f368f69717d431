"""Sparse tensors and sparse gradients on a remote device, as on the host."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpuremote.torch
from gpuremote.errors import UnsupportedOp
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.torch._storages import HELD
from tests.pytorch.device import remote_device

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings(  # of products here
    "ignore:Sparse CSR tensor support is in beta"
)
# torch 2.11 warns where it isn't said, if an argument says it or not.
torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


def _waits() -> int:
    found: int = sum(_homes.home().session.stats().round_trips.values())
    return found


def _near(there: Tensor, here: Tensor) -> None:
    """The same layout, dtype and values; elements may be in another order, or not summed yet."""
    assert there.device.type == "remote"
    assert (there.layout, there.dtype, there.shape) == (here.layout, here.dtype, here.shape)
    found, wanted = there.detach().cpu(), here.detach()
    if here.layout != torch.strided:
        found, wanted = found.to_dense(), wanted.to_dense()
    loose = here.dtype in (torch.bfloat16, torch.float16)
    relative, absolute = (2e-2, 5e-2) if loose else (1e-4, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=relative, atol=absolute)


def _sparse(
    seed: int,
    shape: tuple[int, ...] = (4, 5),
    dense: tuple[int, ...] = (),
    *,
    count: int = 7,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """With places that are named twice."""
    source = torch.Generator().manual_seed(seed)
    places = [torch.randint(0, length, (count,), generator=source) for length in shape]
    values = (3 * torch.randn(count, *dense, generator=source)).to(dtype)
    size = (*shape, *dense)
    return torch.sparse_coo_tensor(torch.stack(places), values, size, check_invariants=False)


OPTIMISERS: Final[dict[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD, foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1),
}
LAYERS: Final[dict[str, Callable[[], nn.Module]]] = {
    "Embedding": lambda: nn.Embedding(11, 4, sparse=True),
    "Embedding, padded": lambda: nn.Embedding(11, 4, padding_idx=2, sparse=True),
    "Embedding, bounded": lambda: nn.Embedding(11, 4, max_norm=1.0, sparse=True),
    "bag, sum": lambda: nn.EmbeddingBag(11, 4, mode="sum", sparse=True),
    "bag, mean": lambda: nn.EmbeddingBag(11, 4, mode="mean", sparse=True),
    "bag, padded": lambda: nn.EmbeddingBag(11, 4, mode="sum", padding_idx=2, sparse=True),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_training_with_sparse_gradients(device: torch.device, layer: str, optimiser: str) -> None:
    torch.manual_seed(0)
    here: Any = LAYERS[layer]()
    there: Any = copy.deepcopy(here).to(device)
    words = [torch.randint(0, 11, (3, 5)) for _ in range(4)]
    for model in (here, there):
        steps = OPTIMISERS[optimiser](model.parameters())
        for some in words:
            steps.zero_grad()
            model(some.to(model.weight.device)).square().sum().backward()
            assert model.weight.grad.layout == torch.sparse_coo
            assert model.weight.grad.device == model.weight.device
            steps.step()
    _near(there.weight, here.weight)
    _near(there.weight.grad, here.weight.grad)


def test_bags_of_all_kinds(device: torch.device) -> None:
    """Where bags begin, and weights of what is in them."""
    torch.manual_seed(0)
    weight, words = torch.randn(9, 3), torch.randint(0, 9, (8,))
    starts, shares = torch.tensor([0, 2, 2, 5]), torch.rand(8)
    found = []
    for place in (torch.device("cpu"), device):
        table, share = (one.to(place, copy=True).requires_grad_() for one in (weight, shares))
        for given in (None, share):
            made = F.embedding_bag(
                words.to(place), table, starts.to(place), mode="sum", sparse=True,
                per_sample_weights=given,
            )  # fmt: skip
            made.square().sum().backward()
        found.append((table.grad, share.grad))
    for there, here in zip(found[1], found[0], strict=True):
        _near(there, here)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_what_bags_give_for_the_backward(
    device: torch.device, mode: str, dtype: torch.dtype, last: bool
) -> None:
    """It is of other sizes on hosts than torch's rules say."""
    torch.manual_seed(0)
    here: Any = nn.EmbeddingBag(9, 3, mode=mode, sparse=True, include_last_offset=last, dtype=dtype)
    there: Any = copy.deepcopy(here).to(device)
    words, starts = torch.randint(0, 9, (8,)), torch.tensor([0, 2, 2, 8])
    for model in (here, there):
        place = model.weight.device
        model(words.to(place), starts.to(place)).square().sum().backward()
    _near(there.weight.grad, here.weight.grad)
    with torch.no_grad():
        _near(there(words.to(device), starts.to(device)), here(words, starts))


def test_gradients_accumulate_and_are_clipped(device: torch.device) -> None:
    torch.manual_seed(0)
    here: Any = nn.ModuleDict({"words": nn.Embedding(8, 4), "out": nn.Linear(4, 2)})
    there = copy.deepcopy(here).to(device)
    there["words"].sparse = True
    data = [torch.randint(0, 8, (6,)) for _ in range(3)]
    norms = []
    for model, place in ((here, "cpu"), (there, device)):
        for some in data:  # 18 rows named of 8: summed on the way
            model["out"](model["words"](some.to(place))).square().sum().backward()
        # The host has no norm of a sparse gradient, so its is a dense one.
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    _near(norms[1], norms[0])
    for one, other in zip(there.parameters(), here.parameters(), strict=True):
        assert one.grad is not None
        _near(one.grad.to_dense(), other.grad)
    optimiser = torch.optim.SGD(there.parameters(), lr=1.0)
    optimiser.zero_grad(set_to_none=False)
    gradient = there["words"].weight.grad
    assert gradient.is_sparse
    assert not gradient._nnz()


def test_a_tied_table(device: torch.device) -> None:
    """A sparse gradient and a dense one for the same parameter, in either order."""
    torch.manual_seed(0)
    weight, words = torch.randn(6, 3), torch.tensor([1, 1, 4])
    found = []
    for place in (torch.device("cpu"), device):
        table = weight.to(place, copy=True).requires_grad_()
        F.embedding(words.to(place), table, sparse=True).sum().backward()
        (table * 2).sum().backward()
        F.embedding(words.to(place), table, sparse=True).sum().backward()
        found.append(table.grad)
    _near(found[1], found[0])  # type: ignore[arg-type]


def test_scaled_gradients(device: torch.device) -> None:
    layer: Any = nn.Embedding(5, 3, sparse=True).to(device)
    before = layer.weight.detach().cpu()
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("remote", init_scale=64.0)
    scaler.scale(layer(torch.tensor([1, 1, 3], device=device)).sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    _near(layer.weight, before - torch.tensor([0.0, 2, 0, 1, 0]).unsqueeze(1))


def test_what_waits(device: torch.device) -> None:
    layer: Any = nn.Embedding(50, 3, sparse=True).to(device)
    words = torch.tensor([1, 1, 3], device=device)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = _waits()
    for _ in range(4):  # without zero_grad: gradients accumulate
        layer(words).sum().backward()
        optimiser.step()
    gradient = layer.weight.grad
    assert gradient._nnz() == 12
    assert (gradient * 2 + gradient).to_dense().shape == (50, 3)
    layer.weight.detach().sparse_mask(gradient)
    assert _waits() == before
    summed = gradient.coalesce()  # how many places differ
    assert _waits() == before + 1
    assert summed.coalesce() is summed
    assert _waits() == before + 1
    assert summed.indices().tolist() == [[1, 3]]
    assert summed.values().tolist() == [[8.0] * 3, [4.0] * 3]


def test_there_and_back(device: torch.device) -> None:
    for here in (_sparse(0), _sparse(1, (4,), (2, 3)), _sparse(2).coalesce(), _sparse(3, count=0)):
        there = here.to(device)
        assert there.device == device
        assert there.is_sparse
        for one in (there, here.to("remote"), copy.deepcopy(there)):
            back = one.cpu()
            assert back.is_coalesced() == here.is_coalesced()
            assert torch.equal(back._indices(), here._indices())
            assert torch.equal(back._values(), here._values())
        _near(there.double(), here.double())
        unpickled = pickle.loads(pickle.dumps(there))
        _near(unpickled, here)
        buffer = io.BytesIO()
        torch.save(there, buffer)
        buffer.seek(0)
        _near(torch.load(buffer, map_location=device), here)
    make: Any = torch.sparse_coo_tensor
    made = make([[0, 2], [1, 0]], [1.5, 2.0], (3, 2), device=device)
    assert repr(made) == (
        "tensor(indices=tensor([[0, 2],\n"
        "                       [1, 0]]),\n"
        "       values=tensor([1.5000, 2.0000]),\n"
        "       device='remote:0', size=(3, 2), nnz=2, layout=torch.sparse_coo)"
    )
    assert make(made._indices(), made._values()).shape == (3, 2)
    with pytest.raises(RuntimeError, match="size is inconsistent with indices"):
        make([[0, 9]], [1.0, 2.0], (3,), device=device, check_invariants=True)
    _near(torch.eye(3, device=device).to_sparse(), torch.eye(3).to_sparse())
    _near(torch.ones(3, 2, device=device).to_sparse(1), torch.ones(3, 2).to_sparse(1))


def _index(beside: Tensor, *places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=beside.device)


Case = Callable[[Tensor, Tensor, Tensor], Tensor]
OPS: Final[dict[str, Case]] = {
    "coalesce": lambda s, _t, _d: s.coalesce(),
    "indices": lambda s, _t, _d: s.coalesce().indices(),
    "values": lambda s, _t, _d: s.coalesce().values(),
    "to_dense": lambda s, _t, _d: s.to_dense(),
    "dense and sparse": lambda s, _t, d: d + s,
    "with alpha": lambda s, _t, d: torch.add(d, s, alpha=-2),
    "into a transposed one": lambda s, _t, d: d.mT.contiguous().mT.add_(s),
    "sparse and sparse": lambda s, t, _d: s + t,
    "in place": lambda s, t, _d: s.clone().add_(t),
    "out": lambda s, t, _d: torch.add(s, t, out=torch.empty_like(s)),
    "less": lambda s, t, _d: s - t,
    "less in place": lambda s, t, _d: s.clone().sub_(t, alpha=2),
    "times a number": lambda s, _t, _d: 3 * s,
    "times in place": lambda s, _t, _d: s.clone().mul_(3),
    "times a tensor of one": lambda s, _t, _d: s * torch.full((), 2, device=s.device),
    "times sparse": lambda s, t, _d: s * t,
    "times dense": lambda s, _t, d: d * s,
    "over a number": lambda s, _t, _d: s / 4,
    "over in place": lambda s, _t, _d: (s * 1.5).div_(4),
    "floored": lambda s, _t, _d: torch.floor_divide(s, 2),
    "dense mask": lambda s, _t, d: d.sparse_mask(s),
    "sparse mask": lambda s, t, _d: t.sparse_mask(s),
    "mask without elements": lambda s, _t, _d: s.sparse_mask(torch.zeros_like(s)) + s,
    "nothing masked": lambda s, _t, _d: torch.zeros_like(s).sparse_mask(s),
    "projection": lambda s, t, _d: torch.ops.aten._sparse_mask_projection(t, s),
    "projection of sums": lambda s, t, _d: torch.ops.aten._sparse_mask_projection(t, s, True),
    "negated": lambda s, _t, _d: -s,
    "absolute": lambda s, _t, _d: s.abs(),
    "power": lambda s, _t, _d: s**2,
    "sum": lambda s, _t, _d: s.sum(),
    "sum of an axis": lambda s, _t, _d: torch.sparse.sum(s, 0),
    "zeros": lambda s, _t, _d: torch.zeros_like(s),
    "zeros in place": lambda s, _t, _d: s.clone().zero_(),
    "zeros and sparse": lambda s, _t, _d: torch.zeros_like(s) + s,
    "joined": lambda s, t, _d: torch.cat([s, t]),
    "transposed": lambda s, _t, _d: s.transpose(0, s.sparse_dim() - 1),
    "an axis more": lambda s, _t, _d: s.unsqueeze(0),
    "picked": lambda s, _t, _d: s.index_select(0, torch.tensor([2, 0, 2], device=s.device)),
    "picked last": lambda s, _t, _d: s.index_select(-1, torch.tensor([1, 1], device=s.device)),
    "picked from the end": lambda s, _t, _d: s.index_select(0, _index(s, -1, 1, -4, -1)),
    "picked nothing": lambda s, _t, _d: s.index_select(0, _index(s)),
    "picked of the second": lambda s, _t, _d: s.index_select(1, _index(s, 1, -1, 1)),
    "one of": lambda s, _t, _d: s[1],
    "part of": lambda s, _t, _d: s.narrow_copy(0, 1, 2),
    "copied": lambda s, t, _d: s.clone().copy_(t),
    "made of parts": lambda s, _t, _d: s.new(s._indices(), s._values(), s.size()),
}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "matrix": {},
    "rows": {"shape": (6,), "dense": (3,)},
    "blocks": {"shape": (4, 5), "dense": (2,)},
    "one": {"count": 1},
    "none": {"count": 0},
    "int64": {"dtype": torch.int64},
    "bfloat16": {"dtype": torch.bfloat16},
    "complex64": {"dtype": torch.complex64},
}
REFUSED: Final = {
    "floored": ["complex64"],
    "picked of the second": ["rows"],  # -1 of an axis that is dense
}
"""What the host itself refuses."""


@pytest.mark.parametrize("op", OPS)
def test_ops(device: torch.device, op: str) -> None:
    refused = []
    for name, kind in KINDS.items():
        one, two = _sparse(0, **kind), _sparse(1, **kind)
        dense = torch.randn(one.shape, generator=torch.Generator().manual_seed(2)).to(one.dtype)
        try:
            here = OPS[op](one, two, dense.clone())
        except RuntimeError:  # by the host itself
            refused.append(name)
            continue
        _near(OPS[op](one.to(device), two.to(device), dense.to(device)), here)
    assert refused == REFUSED.get(op, [])


FUNCTIONS: Final[dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]] = {
    "add": (lambda d, s: d + s, (torch.randn(4, 5), _sparse(0))),
    "add sparse": (lambda s, t: s + t, (_sparse(0), _sparse(1))),
    "mul": (lambda s, t: s * t, (_sparse(0).coalesce(), _sparse(1).coalesce())),
    "mul dense": (lambda s, d: s * d, (_sparse(0), torch.randn(4, 5))),
    "matmul": (torch.sparse.mm, (_sparse(0), torch.randn(5, 3))),
    "matmul, dense first": (lambda d, s: d @ s, (torch.randn(3, 4), _sparse(0))),
    "matmul, both": (torch.sparse.mm, (_sparse(0), _sparse(1, (5, 3)))),
    "bmm": (torch.bmm, (_sparse(0, (2, 3, 4)), torch.randn(2, 4, 3))),
    "to_dense": (lambda s: s.to_dense(), (_sparse(0),)),
    "to_sparse": (lambda d: d.to_sparse(), (torch.randn(3, 4),)),
    "values": (lambda s: s.coalesce().values(), (_sparse(0),)),
    **{
        f"sum over {axes}": (partial(torch.sparse.sum, dim=axes), (_sparse(0, dense=(2,)),))
        for count in (1, 2, 3)
        for axes in itertools.combinations(range(3), count)
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(device: torch.device, name: str) -> None:
    function, arguments = FUNCTIONS[name]
    found: list[list[Tensor | None]] = []
    for place in (torch.device("cpu"), device):
        given = [one.to(place, copy=True).requires_grad_() for one in arguments]
        made = function(*given)
        dense = made if made.layout == torch.strided else made.to_dense()
        weights = torch.arange(1.0, dense.numel() + 1, device=place).view(dense.shape)
        (dense * weights).sum().backward()
        found.append([one.grad for one in given])
    for here, there in zip(*found, strict=True):
        assert here is not None
        assert there is not None
        _near(there, here)


def test_one_record_for_a_step(device: torch.device) -> None:
    torch.manual_seed(0)
    here: Any = nn.Embedding(7, 3, sparse=True)
    there = copy.deepcopy(here).to(device)
    words = torch.tensor([1, 1, 3])

    def stepped(model: Any) -> Callable[[Tensor], Tensor]:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(some: Tensor) -> Tensor:
            optimiser.zero_grad()
            loss: Tensor = model(some).square().mean()
            loss.backward()
            optimiser.step()
            return loss

        return step

    captured = gpuremote.torch.capture(stepped(there))
    plain = stepped(here)
    for _ in range(5):
        _near(captured(words.to(device)), plain(words))
    assert captured.replays
    _near(there.weight, here.weight)
    _near(there.weight.grad, here.weight.grad)
    with pytest.raises(UnsupportedOp, match="takes no sparse tensors"):
        gpuremote.torch.capture(lambda one: one + 1)(_sparse(0).to(device))
    gives = gpuremote.torch.capture(
        lambda some: torch.autograd.grad(there(some).sum(), there.weight)[0]
    )
    with pytest.raises(UnsupportedOp, match="gives a sparse tensor"):
        list(map(gives, [words.to(device)] * 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model(device: torch.device) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    here = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    there = copy.deepcopy(here).to(device)
    compiled: Any = torch.compile(there, backend="gpuremote")
    words = torch.tensor([1, 1, 3])
    for _ in range(3):
        here.zero_grad()
        there.zero_grad()
        here(words).square().sum().backward()
        compiled(words.to(device)).square().sum().backward()
        for one, other in zip(there.parameters(), here.parameters(), strict=True):
            _near(one.grad, other.grad)  # type: ignore[arg-type]


def test_moving_a_module_with_gradients(device: torch.device) -> None:
    layer: Any = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1, 1, 3])).sum().backward()
    before = layer.weight.grad.clone()
    layer.to(device)
    _near(layer.weight.grad, before)
    layer.cpu()
    assert layer.weight.grad.device.type == "cpu"
    torch.testing.assert_close(layer.weight.grad.to_dense(), before.to_dense())


def test_results_share_no_memory(device: torch.device) -> None:
    one = _sparse(0).to(device)
    for made in (torch.zeros_like(one) + one, one + torch.zeros_like(one), one * 1, one / 1):
        made._values().zero_()
        made._indices().zero_()
    _near(one, _sparse(0))


def test_what_is_dropped_is_freed(device: torch.device) -> None:
    def step() -> None:
        made = (_sparse(0).to(device) + _sparse(1).to(device)).coalesce()
        assert made.indices().device == made.values().device == device

    step()
    held = len(HELD)
    step()
    assert len(HELD) == held


def test_what_is_wrong(device: torch.device) -> None:
    one, dense = _sparse(0).to(device), torch.ones(4, 5, device=device)
    with pytest.raises(RuntimeError, match="same size"):
        torch.ones(5, 5, device=device) + one
    with pytest.raises(RuntimeError, match="add\\(sparse, dense\\) is not supported"):
        one + dense
    with pytest.raises(RuntimeError, match="Can't convert result type"):
        torch.ones(4, 5, dtype=torch.int64, device=device).add_(one)
    with pytest.raises(RuntimeError, match="requires a scalar"):
        one / dense
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(4, 5).to(device) + _sparse(0)
    with pytest.raises(NotImplementedError, match="_sparse_softmax"):
        torch.sparse.softmax(one, 1)


WRONG: Final[dict[str, Case]] = {
    "float of integers": lambda _s, i, _d: torch.add(i, i, alpha=1.5),
    "whole float of integers": lambda _s, i, _d: torch.sub(i, i, alpha=2.0),
    "float, of none": lambda _s, i, _d: torch.add(i, torch.zeros_like(i), alpha=1.5),
    "float, dense": lambda _s, i, d: torch.add(d.long(), i, alpha=1.5),
    "float, less": lambda _s, i, d: torch.sub(d.long(), i, alpha=1.5),
    "complex": lambda s, _i, _d: torch.add(s, s, alpha=2j),
    "bool": lambda s, _i, _d: torch.add(s, s, alpha=True),
    "bool, less": lambda s, _i, _d: torch.sub(s, s, alpha=True),
    "two of bool": lambda _s, i, _d: i.bool() - i.bool(),
    "one of bool": lambda _s, i, _d: i - i.bool(),
    "axis": lambda s, _i, _d: s.index_select(5, _index(s, 1)),
    "axis from the end": lambda s, _i, _d: s.index_select(-3, _index(s, 1)),
    "no axis": lambda s, _i, _d: s.sum().to_sparse().index_select(0, _index(s, 0)),
    "index without axes": lambda s, _i, _d: s.index_select(0, _index(s, 1)[0]),
    "index of two": lambda s, _i, _d: s.index_select(0, _index(s, 1).unsqueeze(0)),
    "index of int32": lambda s, _i, _d: s.index_select(0, _index(s, 1).int()),
    "index of floats": lambda s, _i, _d: s.index_select(1, _index(s, 1).float()),
}
"""Refused where it is called, in torch's words."""


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses(device: torch.device, name: str) -> None:
    given = _sparse(0), _sparse(1, dtype=torch.int64), torch.ones(4, 5)
    with pytest.raises((RuntimeError, IndexError)) as here:
        WRONG[name](*given)
    with pytest.raises(here.type) as there:
        WRONG[name](*(one.to(device) for one in given))
    assert str(there.value) == str(here.value)


def test_numbers_in_place(device: torch.device) -> None:
    """Of integers torch takes a float there, and cuts it off."""
    here = _sparse(0, dtype=torch.int64)
    there = here.to(device)
    for whole in (2.0, True):
        _near(there.clone().add_(there, alpha=whole), here.clone().add_(here, alpha=whole))
    _near(there.clone().sub_(there, alpha=2.0), here.clone().sub_(here, alpha=2.0))
    for one in (there, there.to_dense()):
        with pytest.raises(RuntimeError, match="must not be a floating point number"):
            one.add_(there, alpha=1.5)


def test_indices_that_are_too_large_touch_nothing(device: torch.device) -> None:
    """What is out of bounds is an error of the server's op, and the session goes on."""
    wrong = torch.sparse_coo_tensor(
        torch.tensor([[0, 99]], device=device),
        torch.ones(2, 3, device=device),
        (4, 3),
        check_invariants=False,
    )
    with pytest.raises(RuntimeError, match="index"):
        wrong.to_dense().sum().item()
    assert torch.ones(2, device=device).sum().item() == 2


@pytest.mark.parametrize("index", [4, -5])
@pytest.mark.parametrize("count", [7, 0])
def test_indices_that_pick_beyond_an_axis(device: torch.device, index: int, count: int) -> None:
    here = _sparse(0, count=count)
    with pytest.raises(IndexError, match="out of range"):
        here.index_select(0, _index(here, 0, index))
    there = here.to(device)
    with pytest.raises(IndexError, match=r"out of range.*aten::index_select"):
        there.index_select(0, _index(there, 0, index)).to_dense().sum().item()
    assert torch.ones(2, device=device).sum().item() == 2


def test_many_picked_of_many(device: torch.device) -> None:
    """An axis longer than any memory, and no table of indices times elements (20 GB here)."""
    count, length = 200_000, 1 << 50
    places = torch.arange(count).flip(0) * (length // count)
    here = torch.sparse_coo_tensor(places[None], torch.arange(float(count)), (length,))
    index = torch.cat((places[::4], places[::4] - length))
    wanted = here.index_select(0, index).coalesce()
    found = here.to(device).index_select(0, index.to(device)).cpu().coalesce()
    assert torch.equal(found.indices(), wanted.indices())
    assert torch.equal(found.values(), wanted.values())
