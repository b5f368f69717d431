"""A remote device in programs as they are written for any other."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpuremote.torch
from gpuremote.errors import OpError
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.torch._storages import HELD
from tests.pytorch.device import remote_device

Tensor = torch.Tensor
REMOTE: Any = torch.get_device_module("remote")


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


def _stats() -> Any:
    return _homes.home().session.stats()


def _near(there: Tensor, here: Tensor) -> None:
    assert there.device.type == "remote"
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-4, atol=1e-5)


def _twin(model: nn.Module, device: torch.device) -> nn.Module:
    return copy.deepcopy(model).to(device)


def test_there_and_back(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8):
        here = (torch.arange(24).reshape(2, 3, 4) % 3).to(dtype)
        for one in (here, here.permute(2, 0, 1), here[:, ::2], here[1], here[0, 0, 0], here[:0]):
            there = one.to(device)
            assert there.shape == one.shape
            assert there.dtype == dtype
            assert torch.equal(there.cpu(), one)
            wider = torch.complex128 if dtype.is_complex else torch.float64
            assert torch.equal(there.to("cpu", wider), one.to(wider))


def test_ops_wait_for_nothing(device: torch.device) -> None:
    x = torch.ones(8, 8).to(device)
    before = sum(_stats().round_trips.values())
    y = x
    for _ in range(100):
        y = torch.relu(y @ x / 8 + 1.5).view(64)[:].reshape(8, 8)
    assert sum(_stats().round_trips.values()) == before
    assert y.sum().item() > 0
    assert sum(_stats().round_trips.values()) == before + 1


def test_a_second_time_nothing_is_planned(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 1)).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.randn(4, 6).to(device)

    def step() -> None:
        optimiser.zero_grad()
        model(data).square().mean().backward()
        optimiser.step()

    for _ in range(3):
        step()
    plans, ops = _stats().plans, _stats().ops
    waits = sum(_stats().round_trips.values())
    for _ in range(5):
        step()
    assert _stats().plans == plans
    assert _stats().ops > ops
    assert sum(_stats().round_trips.values()) == waits


def test_views_share_memory_and_send_nothing(device: torch.device) -> None:
    x = torch.arange(12.0).reshape(3, 4).to(device)
    ops = _stats().ops
    row, turned, window = x[1], x.t(), x[:, 1:3]
    expanded = x[0].expand(5, 4)
    assert _stats().ops == ops
    row += 10
    window.mul_(2)
    assert turned[0].tolist() == [0, 14, 8]
    assert turned[1].tolist() == [2, 30, 18]
    assert expanded.sum().item() == 5 * (0 + 2 + 4 + 3)
    assert row.data_ptr() == x.data_ptr() + 16
    assert row.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_what_is_dropped_is_freed(device: torch.device) -> None:
    kept = torch.ones(1000).to(device)
    view = kept[10:]
    del kept
    gc.collect()
    REMOTE.synchronize()
    held, before = len(HELD), _stats().freed
    for _ in range(50):
        view + 1
    REMOTE.synchronize()
    assert len(HELD) == held
    assert _stats().freed - before >= 49  # the last one goes with the next batch
    assert view.sum().item() == 990


def test_threads(device: torch.device) -> None:
    """Several issue at a time, each with ops that are new to all."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for k in range(1, 6):
                x = torch.full((k, number), 2.0, device=device, requires_grad=True)
                (x * x).sum().backward()
                assert x.grad is not None
                assert x.grad.sum().item() == 4 * k * number
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 + number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_gradients_come_in_the_thread_that_asks(device: torch.device) -> None:
    """With what the program has there: its stack, for errors and profiles."""
    seen: list[int] = []
    x = torch.ones(3, device=device, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(threading.get_ident()))
    y.sum().backward()
    assert seen == [threading.get_ident()]
    z = torch.eye(3, device=device, requires_grad=True)
    z.register_hook(lambda gradient: torch.linalg.cholesky(-gradient))
    z.trace().backward()
    with pytest.raises(OpError, match=r"(?s)issued at:.*autograd/graph.py"):
        z.grad.cpu()  # type: ignore[union-attr]


def test_inference_mode(device: torch.device) -> None:
    with torch.inference_mode():
        x = torch.ones(3, 7).to(device)
        assert (F.layer_norm(x * 2, (7,)) + 1).sum().item() == pytest.approx(21)


def test_training_is_that_of_the_host(device: torch.device) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    there = _twin(here, device)
    data, target = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    losses: list[list[float]] = []
    for model, place in ((here, torch.device("cpu")), (there, device)):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        found = []
        for _ in range(5):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(data.to(place)), target.to(place))
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for one, other in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        _near(one, other)


def test_moving_a_module_keeps_what_is_tied(device: torch.device) -> None:
    model: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    weight = model["a"].weight
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model.to(device)
    assert model["a"].weight is model["b"].weight is weight
    model["a"].weight.sum().backward()
    before = model["b"].weight.detach().cpu()
    optimiser.step()
    _near(model["b"].weight, before - 1)


def test_copies_of_all_kinds(device: torch.device) -> None:
    model = nn.Linear(3, 2).to(device)
    twin = copy.deepcopy(model)
    assert twin.weight.data_ptr() != model.weight.data_ptr()
    _near(twin.weight, model.weight.detach().cpu())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location="cpu")
    assert torch.equal(loaded["weight"], model.weight.detach().cpu())
    buffer.seek(0)
    again = torch.load(buffer, map_location=device)
    _near(again["weight"], loaded["weight"])
    unpickled = pickle.loads(pickle.dumps(model.weight.detach()))
    _near(unpickled, loaded["weight"])


def test_in_place_and_out(device: torch.device) -> None:
    x, out = torch.arange(6.0).to(device), torch.empty(0).to(device)
    result = torch.add(x, 1, out=out)
    assert result is out
    assert out.tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(RuntimeError, match=r"shape|size"):
        x.add_(torch.ones(7).to(device))
    x[x > 3] = -1
    assert x.tolist() == [0, 1, 2, 3, -1, -1]
    x.index_put_((torch.tensor([0, 2]),), torch.tensor(9.0))
    assert x.tolist() == [9, 1, 9, 3, -1, -1]
    x.resize_(8)
    assert x[:6].tolist() == [9, 1, 9, 3, -1, -1]
    x.set_(out)  # type: ignore[call-overload]
    assert x.tolist() == [1, 2, 3, 4, 5, 6]
    x.unsqueeze_(0).t_()
    assert x.shape == (6, 1)


def test_shapes_that_depend_on_values(device: torch.device) -> None:
    x = torch.tensor([0, 3, 0, 5, 3]).to(device)
    assert x.nonzero().tolist() == [[1], [3], [4]]
    assert x[x > 0].tolist() == [3, 5, 3]
    assert torch.unique(x).tolist() == [0, 3, 5]
    assert x.repeat_interleave(torch.tensor([1, 0, 2, 0, 1]).to(device)).tolist() == [0, 0, 0, 3]


def test_promotion(device: torch.device) -> None:
    x, n = torch.ones(2).to(device), torch.ones(2, dtype=torch.int32).to(device)
    cases: list[tuple[Tensor, torch.dtype]] = [
        (n + 1.5, torch.float32),
        (n + True, torch.int32),
        (n + torch.tensor(1.5, dtype=torch.float64), torch.float64),
        (x + torch.tensor(1.5, dtype=torch.float64), torch.float32),
        (x + n, torch.float32),
        (x + 1j, torch.complex64),
        (n / 2, torch.float32),
    ]
    for found, dtype in cases:
        assert found.dtype == dtype
        found.cpu()


def test_tensors_of_two_devices_do_not_mix(device: torch.device) -> None:
    x, host = torch.ones(3).to(device), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"same device.*remote:0 and cpu"):
        x + host
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, host])
    with pytest.raises(RuntimeError, match=r"remote:1"):  # there is none
        torch.ones(3).to("remote:1")
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]


def test_the_default_dtype(device: torch.device) -> None:
    """What numbers become in an op with integers; both ends have to agree, each time."""
    x = torch.arange(3).to(device)
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            for found in (x * 0.5, x / 2, torch.sqrt(x), torch.ones(2, device=device)):
                assert found.dtype == found.cpu().dtype == dtype
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_conjugate_that_was_saved(device: torch.device) -> None:
    z = torch.randn(4, dtype=torch.complex64)
    file = io.BytesIO()
    torch.save(z.conj(), file)
    z.to(device).clone()
    file.seek(0)
    found = torch.load(file, map_location="remote")
    torch.testing.assert_close(found.cpu(), z.conj().resolve_conj())
    torch.testing.assert_close(z.to(device).clone().cpu(), z)


def test_set_beyond_the_storage(device: torch.device) -> None:
    storage = torch.ones(2).to(device).untyped_storage()
    with pytest.raises(RuntimeError, match="400 bytes of a remote storage of 8"):
        torch.empty(0).to(device).set_(storage, 0, (100,), (1,))
    assert torch.empty(0).to(device).set_(storage, 1, (1,), (1,)).tolist() == [1]


def test_an_error_names_the_line(device: torch.device) -> None:
    singular = torch.zeros(3, 3).to(device)
    torch.linalg.cholesky_ex(singular, check_errors=False)
    made = torch.linalg.cholesky(singular)  # the line that is to be named
    with pytest.raises(RuntimeError, match="cholesky") as caught:
        made.sum().item()
    assert "test_an_error_names_the_line" in str(caught.value)
    assert isinstance(caught.value, OpError)
    assert torch.ones(2).to(device).sum().item() == 2  # the session goes on


def test_random_numbers(device: torch.device) -> None:
    torch.manual_seed(7)
    there = torch.randn(5, device=device), torch.rand(3).to(device).bernoulli()
    torch.manual_seed(7)
    again = torch.randn(5, device=device)
    assert torch.equal(there[0].cpu(), again.cpu())
    state = REMOTE.get_rng_state()
    one = torch.randn(4, device=device)
    REMOTE.set_rng_state(state)
    assert torch.equal(torch.randn(4, device=device).cpu(), one.cpu())
    # The same numbers as of the server's device used there.
    torch.manual_seed(11)
    host = torch.randn(6)
    torch.manual_seed(11)
    assert torch.equal(torch.randn(6, device=device).cpu(), host)
    with torch.random.fork_rng(devices=[0], device_type="remote"):
        torch.manual_seed(1)
    given = torch.Generator().manual_seed(3)
    first = torch.rand(3, device=device, generator=given).cpu()
    given.manual_seed(3)
    assert torch.equal(first, torch.rand(3, device=device, generator=given).cpu())


def test_gradients_twice_and_hooks(device: torch.device) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
    seen: list[torch.Size] = []
    x.register_hook(lambda grad: seen.append(grad.shape))
    (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    _near(second, torch.tensor([6.0, 12.0, 18.0]))
    assert seen
    y = torch.utils.checkpoint.checkpoint(lambda v: torch.sin(v) * v, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
    _near(x.grad, torch.sin(x.detach().cpu()) + x.detach().cpu() * torch.cos(x.detach().cpu()))


def test_transforms(device: torch.device) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    there = x.to(device)
    _near(torch.vmap(torch.sum)(there), x.sum(1))
    _near(torch.func.grad(lambda v: (v**2).sum())(there), 2 * x)
    jvp: Any = torch.func.jvp
    value, tangent = jvp(torch.sin, (there,), (torch.ones_like(there),))
    _near(value, torch.sin(x))
    _near(tangent, torch.cos(x))
    model = nn.Linear(3, 1)
    parameters = {k: v.detach().to(device) for k, v in model.named_parameters()}
    _near(torch.func.functional_call(model, parameters, (there,)), model(x))


def test_autocast_and_scaler(device: torch.device) -> None:
    model = nn.Linear(8, 8).to(device)
    with torch.autocast("remote", torch.bfloat16):
        made = model(torch.ones(2, 8).to(device))
        assert made.dtype == torch.bfloat16
        assert F.softmax(made, -1).dtype == torch.float32
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("remote")
    scaler.scale(model(torch.ones(2, 8).to(device)).sum()).backward()
    scaler.step(optimiser)
    scaler.update()


def test_layers(device: torch.device) -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 20, (2, 7))
    layers: list[tuple[nn.Module, Tensor]] = [
        (nn.LSTM(4, 5, batch_first=True), torch.randn(2, 7, 4)),
        (nn.GRU(4, 5), torch.randn(7, 2, 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), torch.randn(2, 5, 8)),
        (nn.MultiheadAttention(8, 2), torch.randn(3, 2, 8)),
        (nn.Embedding(20, 6), words),
        (nn.EmbeddingBag(20, 6), words),
        (nn.ConvTranspose2d(2, 3, 3), torch.randn(1, 2, 5, 5)),
        (nn.MaxPool2d(2), torch.randn(1, 2, 6, 6)),
        (nn.GroupNorm(2, 4), torch.randn(2, 4, 3)),
    ]
    for layer, data in layers:
        for mode in (True, False):
            layer.train(mode)
            there, moved = _twin(layer, device), data.to(device)
            if moved.is_floating_point():
                moved.requires_grad_()
            several = isinstance(layer, nn.MultiheadAttention)
            here = layer(data, data, data) if several else layer(data)
            made = there(moved, moved, moved) if several else there(moved)
            _near(_first(made), _first(here))
            if mode:
                _first(made).sum().backward()


def _first(made: Any) -> Tensor:
    found: Tensor = made if isinstance(made, Tensor) else made[0]
    return found


def test_print(device: torch.device) -> None:
    numbers = torch.randn(3, 4).to(device)
    waits = sum(_stats().round_trips.values())
    assert "device='remote:0'" in repr(numbers)
    assert sum(_stats().round_trips.values()) == waits + 1
    assert "..." in repr(torch.zeros(2000).to(device))
    assert (
        repr(torch.tensor([1.5, 2.5]).to(device)) == "tensor([1.5000, 2.5000], device='remote:0')"
    )
    gpuremote.torch.register()  # once more does nothing


def test_conjugates(device: torch.device) -> None:
    """Views that only say that they are conjugated, on either side."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 3, dtype=torch.complex64), torch.randn(2, 3, dtype=torch.complex64)
    x, y = a.to(device), b.to(device)
    _near(x.conj() @ x, a.conj() @ a)
    _near(x.mH + 1, a.mH + 1)
    _near(x.conj().imag * 2, a.conj().imag * 2)
    _near(x.conj(), a.conj())
    factors, pivots = torch.linalg.lu_factor(a)
    there = torch.linalg.lu_solve(factors.to(device), pivots.to(device), y, left=False)
    _near(there, torch.linalg.lu_solve(factors, pivots, b, left=False))


def test_views_that_name_more_than_there_can_be(device: torch.device) -> None:
    x = torch.ones(1, device=device)
    with pytest.raises(OpError, match="lengths, strides and offsets have to be below"):
        _ = x.expand(1 << 50) + 1
    assert (x + 1).item() == 2  # nothing is lost
