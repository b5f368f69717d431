"""What only the part in C++ can do, on several devices of several servers; and that it and the part
in Python say the same."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpuremote.torch
from gpuremote.client.issuing import NEVER
from gpuremote.errors import OpError
from gpuremote.torch import _homes
from gpuremote.torch._storages import HELD
from gpuremote.torch._tier import native

pytestmark = pytest.mark.skipif(
    native is None, reason="this half of the suite runs the part in Python"
)
REMOTE: Any = torch.get_device_module("remote")
same = torch.testing.assert_close


@pytest.fixture(scope="module", autouse=True)
def devices() -> Iterator[None]:
    """remote:0 and remote:1 are of one server, remote:2 and remote:3 of another one."""
    gpuremote.torch.connect(*["local://?backend=torch&devices=2"] * 2)
    try:
        _homes.home(0)
        yield
    finally:
        gpuremote.torch.close()


def test_counting() -> None:
    assert REMOTE.device_count() == torch.accelerator.device_count() == 4
    assert torch.accelerator.current_accelerator() == torch.device("remote")
    with pytest.raises(RuntimeError, match="there is no device remote:4; there are 4"):
        torch.ones(2, device="remote:4")


def test_two_servers_train_one_model() -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    there = copy.deepcopy(here)
    there[:2].to("remote:0")
    there[2].to("remote:3")
    x = torch.randn(8, 6)
    both = [torch.optim.Adam(model.parameters(), lr=0.05) for model in (here, there)]
    for _ in range(5):
        for optimiser in both:
            optimiser.zero_grad()
        losses = (
            here(x).square().mean(),
            there[2](there[:2](x.to("remote:0")).to("remote:3")).square().mean(),
        )
        for loss, optimiser in zip(losses, both, strict=True):
            loss.backward()
            optimiser.step()
        same(losses[1].cpu(), losses[0])
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        same(b.detach().cpu(), a.detach())
    assert there[0].weight.device.index == 0
    assert there[2].weight.device.index == 3


@pytest.mark.parametrize("place", ["remote:0", "remote:1", "remote:2"])
def test_copies_between_devices(place: str) -> None:
    x = torch.randn(5, 3)
    there = x.to("remote:0").t()
    moved = there.to(place)
    same(moved.cpu(), x.t())
    target = torch.zeros(3, 5, device=place)
    assert target.copy_(there) is target
    same(target.cpu(), x.t())
    part = torch.zeros(3, 9, device=place)
    part[:, 2:7] = there
    same(part[:, 2:7].cpu(), x.t())
    assert part[:, :2].abs().sum().item() == 0
    z = torch.randn(4, dtype=torch.complex64)
    same(z.to("remote:0").conj().to(place).cpu(), z.conj())


@pytest.mark.parametrize("place", ["remote:0", "remote:1", "remote:2"])
def test_sparse_tensors_on_each_device(place: str) -> None:
    here = torch.nn.Embedding(6, 3, sparse=True)
    there = copy.deepcopy(here).to(place)
    words = torch.tensor([1, 1, 4])
    for layer in (here, there):
        optimiser = torch.optim.SparseAdam(list(layer.parameters()), lr=0.1)
        layer(words.to(layer.weight.device)).square().sum().backward()
        optimiser.step()
    same(there.weight.detach().cpu(), here.weight.detach())
    gradient: Any = there.weight.grad
    assert gradient.device == torch.device(place)
    summed = (gradient + gradient.clone()).coalesce()
    assert summed.device == summed.indices().device == torch.device(place)
    moved = summed.to("remote:0")
    assert moved.device == moved.values().device == torch.device("remote:0")
    same(moved.cpu().to_dense(), 2 * here.weight.grad.to_dense())  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="same device"):
        summed + gradient.to("remote:3")


def test_a_result_on_another_device() -> None:
    x = torch.ones(2, 3, device="remote:0")
    for made in (torch.zeros_like(x, device="remote:2"), x.new_full((2, 3), 0, device="remote:2")):
        assert (made.device.index, made.shape, made.sum().item()) == (2, (2, 3), 0)
    assert torch.empty_like(x, device="remote").device.index == 0


def test_a_copy_between_servers_does_not_come_here() -> None:
    x = torch.randn(1000, 100).to("remote:0")
    REMOTE.synchronize(0)
    before = _homes.home(0).session.stats().payload_received
    y = x.to("remote:2")
    REMOTE.synchronize(2)
    assert _homes.home(0).session.stats().payload_received == before
    same(y.cpu(), x.cpu())


def test_devices_do_not_mix() -> None:
    a, b = torch.ones(3, device="remote:0"), torch.ones(3, device="remote:2")
    for op in (torch.add, lambda x, y: torch.cat([x, y]), lambda x, y: x.index_put_((y,), x)):
        with pytest.raises(RuntimeError, match=r"two devices, remote:0 and remote:2"):
            op(a, b)
    same(a.cpu(), torch.ones(3))


def test_the_current_device() -> None:
    with torch.device("remote:2"):
        assert torch.ones(2).device.index == 2
    with REMOTE.device(1):
        assert torch.ones(2, device="remote").device.index == 1
        assert REMOTE.current_device() == 1
        assert torch.randn(2, device="remote").device.index == 1
    torch.accelerator.set_device_index(3)
    try:
        assert torch.ones(2).to("remote").device.index == 3
    finally:
        torch.accelerator.set_device_index(0)
    assert REMOTE.current_device() == 0


def test_a_generator_of_its_own() -> None:
    theirs, ours = torch.Generator("remote:0"), torch.Generator()
    for generator in (theirs, ours):
        generator.manual_seed(7)
    for _ in range(2):
        drawn = torch.randn(4, generator=theirs, device="remote:0")
        same(drawn.cpu(), torch.randn(4, generator=ours))
    state = theirs.get_state()
    first = torch.rand(3, generator=theirs, device="remote:0")
    theirs.set_state(state)
    same(torch.rand(3, generator=theirs, device="remote:0").cpu(), first.cpu())
    assert theirs.initial_seed() == 7
    twin = copy.deepcopy(theirs) if hasattr(theirs, "__deepcopy__") else theirs.clone_state()
    same(
        torch.rand(3, generator=twin, device="remote:0").cpu(),
        torch.rand(3, generator=theirs, device="remote:0").cpu(),
    )
    x = torch.arange(10.0, device="remote:0")
    assert x[torch.randperm(10, generator=theirs, device="remote:0")].sum().item() == 45


def test_generators_are_given_back() -> None:
    """More of them, one after the other, than a session may have at a time."""
    for _ in range(5000):
        torch.Generator("remote:1")
    drawn = torch.rand(3, generator=torch.Generator("remote:1").manual_seed(1), device="remote:1")
    same(drawn.cpu(), torch.rand(3, generator=torch.Generator().manual_seed(1)))


def test_random_numbers_of_each_device() -> None:
    torch.manual_seed(3)
    drawn = [torch.rand(2, device=f"remote:{k}").cpu() for k in (0, 2)]
    same(drawn[0], drawn[1])
    with torch.random.fork_rng(devices=[0], device_type="remote"):
        torch.manual_seed(3)
        same(torch.rand(2, device="remote:0").cpu(), drawn[0])


def test_events_and_streams() -> None:
    start, end = (torch.Event("remote:0", enable_timing=True) for _ in range(2))
    stream = torch.Stream("remote:0")
    assert stream.device_index == 0
    with stream:
        start.record()
        x = torch.randn(200, 200, device="remote:0")
        y = x @ x
        end.record()
        assert torch.accelerator.current_stream() == stream
    stream.wait_event(end)
    end.synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0
    stream.synchronize()
    assert stream.query()
    torch.accelerator.synchronize()
    assert REMOTE.current_stream(2).device_index == 2
    assert y.shape == (200, 200)


def test_waiting_raises_what_failed() -> None:
    torch.linalg.cholesky(-torch.eye(2, device="remote:2"))
    with pytest.raises(OpError, match="positive-definite"):
        torch.accelerator.synchronize(2)


def test_pinned_memory() -> None:
    x = torch.randn(300, 1000).pin_memory()
    assert x.is_pinned()
    assert x[3:].is_pinned()
    assert not torch.randn(3).is_pinned()
    values = x.clone()
    there = x.to("remote:0", non_blocking=True)
    torch.accelerator.synchronize(0)
    x.zero_()
    same(there.cpu(), values)
    there.copy_(x, non_blocking=True)
    assert there.abs().sum().item() == 0


def test_a_loader_that_pins() -> None:
    data = TensorDataset(torch.arange(40.0).reshape(20, 2))
    total = 0.0
    for (batch,) in DataLoader(data, batch_size=5, pin_memory=True):
        assert batch.is_pinned()
        total += batch.to("remote:0", non_blocking=True).sum().item()
    assert total == 780


def test_storages_without_a_tensor() -> None:
    gc.collect()
    held = len(HELD)
    storage = torch.UntypedStorage(16, device="remote:0")
    x = torch.empty(0, device="remote:0").set_(storage, 0, (4,), (1,))
    same(x.fill_(3).cpu(), torch.full((4,), 3.0))
    assert (len(storage), storage.device.index) == (16, 0)
    del storage, x
    gc.collect()
    assert len(HELD) == held


def test_data_of_another_device() -> None:
    p = nn.Parameter(torch.ones(3))
    p.data = torch.zeros(3, device="remote:0")
    assert (p.device.type, p.sum().item()) == ("remote", 0)
    p.data = torch.ones(3)
    assert (p.device.type, p.sum().item()) == ("cpu", 3)


def test_what_is_copied_keeps_its_device() -> None:
    x = torch.randn(3, device="remote:1")
    for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone()):
        assert twin.device.index == 1
        same(twin.cpu(), x.cpu())


def test_memory_as_torch_asks() -> None:
    gc.collect()
    before = torch.accelerator.memory_allocated(3)
    x = torch.zeros(1000, device="remote:3")
    assert torch.accelerator.memory_allocated(3) == before + 4000
    assert torch.accelerator.max_memory_allocated(3) >= before + 4000
    del x
    assert torch.accelerator.memory_allocated(3) == before


def test_programs_on_other_devices() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled: Any = torch.compile(twice, backend="gpuremote")
    weight = torch.ones(3, device="remote:3")
    captured = gpuremote.torch.capture(lambda x: x + weight)
    for k in range(4):
        for index in (1, 3):
            x = torch.full((3,), float(k), device=f"remote:{index}")
            found = compiled(x)
            assert (found.device.index, found.tolist()) == (index, [2 * k] * 3)
        made = captured(torch.full((3,), float(k), device="remote:3"))
        assert (made.device.index, made.tolist()) == (3, [k + 1] * 3)
    assert captured.replays == 2


def test_a_generator_of_another_device() -> None:
    generator = torch.Generator("remote:0")
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="remote:1", generator=generator).cpu()


def test_a_generator_that_ends_with_an_error() -> None:
    with pytest.raises(TypeError, match="dtype"):
        torch.randn(3, device="remote", generator=torch.Generator("remote"), dtype="x")  # type: ignore[call-overload]


def test_both_parts_write_the_same() -> None:
    """What was written in C++ is compared with what Python would have, when a call is learnt."""
    learnt, _ = native.counts()
    x = torch.randn(3, 3, device="remote:0", requires_grad=True)
    for _ in range(2):
        y = torch.nn.functional.layer_norm(x @ x + 1.5, (3,))
        y = torch.where(y > 0, y, torch.tensor(2.0)) * torch.tensor(0.5, dtype=torch.float64)
        torch.add(y, x, alpha=3).clamp(min=-1).sum().backward()
        torch._foreach_add_([x.detach(), y.detach()], 1.0)
        torch.cat([x, y], dim=1).to(torch.bfloat16).softmax(-1)
    assert native.counts()[0] > learnt + 10
    assert native.counts()[1] == []


def test_a_known_call_does_not_come_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuremote.torch._kernels import Kernel

    x = torch.randn(4, 4, device="remote:0")
    model = nn.Linear(4, 4).to("remote:0")

    def step() -> None:
        model(torch.relu(x) + 1.5).sum().backward()

    step()
    step()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("Python was asked")

    monkeypatch.setattr(Kernel, "run", never)
    step()


def test_threads() -> None:
    """Each has its place in the order of ops; none is lost."""
    x = torch.ones(4, device="remote:0")
    found: list[float] = []

    def work() -> None:
        y = x
        for k in range(500):
            y = y + 1
            if k % 100 == 0:
                y.sum().item()
        found.append(y.sum().item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2004.0] * 4


def test_plans_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """When there are too many on the server, both parts begin anew."""
    from gpuremote.wire import caps

    monkeypatch.setattr(caps, "MAX_PLANS", 64)
    cleared = len(_homes.home(0).core.plans)
    for k in range(1, 150):
        x = torch.ones(k, device="remote:0")
        assert (x + x).sum().item() == 2 * k
    assert len(_homes.home(0).core.plans) < max(64, cleared)


def test_an_error_names_the_line_also_from_here() -> None:
    x = -torch.eye(2, device="remote:0")
    for _ in range(3):  # the last ones are issued in C++
        torch.linalg.cholesky_ex(x)
        torch.linalg.cholesky(x)  # this line
        with pytest.raises(OpError, match="positive-definite") as caught:
            REMOTE.synchronize(0)
        assert "test_an_error_names_the_line_also_from_here" in str(caught.value)


def test_the_accelerator_is_known_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.accelerator.empty_cache()
        assert torch.accelerator.is_available()


def test_a_tape_that_two_threads_open() -> None:
    """Both find it closed; what the first one has written keeps its numbers."""
    core = _homes.home(0).core
    x = torch.ones(3, device="remote:0")
    for _ in range(2):  # the second time in C++
        core.flush()
        core.flush_after = NEVER
        y = x + x  # a record lies on the tape, which is open
        core._open_tape()  # as another thread does that saw it closed
        z = y + x
        assert z.tolist() == [3, 3, 3]
        assert y.tolist() == [2, 2, 2]
