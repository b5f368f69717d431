"""`gpuremote.torch` with a server on a GPU, compared with the same GPU used from here."""

from __future__ import annotations

import copy
import gc
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from gpuremote.testing.servers import device_server
from tests.gpu.machine import no_torch

if no_torch():
    pytest.skip(no_torch(), allow_module_level=True)

import torch
from torch import nn

import gpuremote.torch
from gpuremote.torch import _homes
from gpuremote.torch._tier import native
from tests.gpu.programs import Here, seeded

pytestmark = [
    pytest.mark.timeout(180),
    # torch's own, while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
needs_native = pytest.mark.skipif(native is None, reason="this needs the part in C++")
F: Final = nn.functional
REMOTE: Final[Any] = torch.get_device_module("remote")
PLACES: Final = ("cuda", "remote")
Tensor = torch.Tensor


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[_homes.Home]:
    with device_server("--backend", "torch", "--warm", "1") as server:
        gpuremote.torch.connect(f"{server.url}?connect_timeout=60")
        try:
            yield _homes.home()
        finally:
            gpuremote.torch.close()


def same(one: Tensor, other: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal, to the bit where nothing else is said: it is the same card."""
    torch.testing.assert_close(
        one.detach().cpu(), other.detach().cpu(), rtol=rtol, atol=atol, equal_nan=True
    )


def on_both(function: Callable[[str], Any]) -> tuple[Any, Any]:
    """What it gives on the card from here, and by way of the server, from the same seed."""
    found = []
    for place in PLACES:
        torch.manual_seed(17)
        found.append(function(place))
    return found[0], found[1]


def test_what_it_is(home: _homes.Home) -> None:
    assert home.kind == "cuda"
    assert torch.cuda.get_device_name() in REMOTE.get_device_name(0)
    assert REMOTE.mem_get_info(0)[1] > 1 << 30


OPS: Final[dict[str, Callable[[Tensor, Tensor], Any]]] = {
    "arithmetic": lambda x, y: x * y + x / (y.abs() + 1) - 2,
    "matmul": lambda x, y: x @ y.T,
    "addmm": lambda x, y: torch.addmm(x[:, :48], x, y[:48].T),
    "softmax": lambda x, y: torch.softmax(x, -1) + torch.log_softmax(y, 0),
    "norms": lambda x, y: F.layer_norm(x, x.shape[-1:]) + y.norm(dim=1, keepdim=True),
    "reductions": lambda x, y: x.sum(0) + y.var(1).mean() + x.logsumexp(0),
    "sort": lambda x, y: torch.sort(x, dim=1, stable=True)[0] + y.argsort(dim=0, stable=True),
    "topk": lambda x, y: x.topk(5).values + y.median(),
    "cumsum": lambda x, y: x.cumsum(1) + y.cumprod(0),
    "index": lambda x, y: x[y[:, 0] > 0].sum(0) + x[:, [3, 1, 1]].sum(),
    "gather": lambda x, y: x.gather(1, y.argmax(1, keepdim=True)),
    "nonzero": lambda x, y: torch.nonzero(x > 1),
    "unique": lambda x, y: torch.unique((x * 3).int()),
    "views": lambda x, y: x.t().contiguous()[::2, 1:] * y.flip(0).reshape(64, -1).T[::2, 1:],
    "casts": lambda x, y: (x.half() + y.half()).float() + (x.bfloat16() * 2).double(),
    "complex": lambda x, y: torch.view_as_real(torch.complex(x, y).conj() * 1j),
    "fft": lambda x, y: torch.fft.rfft(x, dim=1).abs() + torch.fft.rfft(y, dim=1).real,
    "foreach": lambda x, y: torch.stack(torch._foreach_mul([x, y], 2.0)),
    "embedding": lambda x, y: F.embedding((y.abs() * 10).long().clamp(max=63), x),
    "where": lambda x, y: torch.where(x > 0, x, y.clamp(-1, 1)),
    "pad": lambda x, y: F.pad(x, (1, 2)) + F.interpolate(y[None, None], (64, 67))[0, 0],
}


@pytest.mark.parametrize("name", OPS)
def test_ops(name: str) -> None:
    here, there = on_both(
        lambda place: OPS[name](*(torch.randn(64, 64).to(place) for _ in range(2)))
    )
    assert here.shape == there.shape
    assert here.dtype == there.dtype
    same(there, here)


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "complex64", "int64", "uint8", "bool"],
)
def test_there_and_back(dtype: str) -> None:
    x = (torch.randn(33, 7) * 4).to(getattr(torch, dtype))
    for way in (x, x.T, x[::2], x[:0], x[3, 3]):
        same(way.to("remote"), way)
        same(way.to("remote").to("cuda"), way)
        same(way.to("cuda").to("remote"), way)
        target = torch.zeros_like(way, device="remote")
        same(target.copy_(way.to("cuda")), way)
        target = torch.zeros_like(way, device="cuda")
        same(target.copy_(way.to("remote")), way)


RANDOM: Final[dict[str, Callable[[str], Tensor]]] = {
    "rand": lambda place: torch.rand(1000, device=place),
    "randn": lambda place: torch.randn(100, 77, device=place),
    "randint": lambda place: torch.randint(1000, (99,), device=place),
    "randperm": lambda place: torch.randperm(5000, device=place),
    "normal": lambda place: torch.empty(500, device=place).normal_(2, 3),
    "bernoulli": lambda place: torch.full((700,), 0.3, device=place).bernoulli(),
    "exponential": lambda place: torch.empty(700, device=place).exponential_(),
    "multinomial": lambda place: torch.ones(50, device=place).multinomial(20),
    "dropout": lambda place: F.dropout(torch.ones(5000, device=place), 0.4),
    "rrelu": lambda place: F.rrelu(-torch.ones(500, device=place), training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers(name: str) -> None:
    here, there = on_both(lambda place: torch.stack([RANDOM[name](place) for _ in range(2)]))
    same(there, here)


def test_states_of_generators() -> None:
    torch.manual_seed(5)
    torch.rand(10, device="remote")
    state = REMOTE.get_rng_state()
    first = torch.rand(10, device="remote")
    REMOTE.set_rng_state(state)
    same(torch.rand(10, device="remote"), first)
    torch.cuda.set_rng_state(state)
    same(torch.rand(10, device="cuda"), first)
    with torch.random.fork_rng(devices=[0], device_type="remote"):
        torch.manual_seed(6)
    torch.rand(10, device="cuda")
    same(torch.rand(10, device="remote").add(0), torch.rand(10, device="cuda").add(0) * 0, atol=1)


@needs_native
def test_a_generator_of_its_own() -> None:
    drawn = [
        torch.randn(50, generator=torch.Generator(place).manual_seed(9), device=place)
        for place in PLACES
    ]
    same(drawn[1], drawn[0])


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    process = Here()
    yield process
    process.close()


@pytest.mark.parametrize("lower", ["", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["picture", "words"])
def test_training(here: Here, kind: str, lower: str) -> None:
    tolerance = 2e-2 if lower else 1e-3
    wanted, found = here.run("train", kind, lower), seeded("train", "remote", kind, lower)
    for one, other in zip(found, wanted, strict=True):
        same(one, other, rtol=tolerance, atol=tolerance)


def test_scaling_gradients(here: Here) -> None:
    same(seeded("scale", "remote")[0], here.run("scale")[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["plain", "causal", "mask", "grouped", "dropout"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention(here: Here, dtype: str, way: str) -> None:
    """With the part in C++ by the kernel that torch takes here; else in plain ops."""
    if way == "dropout" and native is None:
        pytest.skip("plain ops draw other numbers")
    wanted, found = here.run("attend", way, dtype), seeded("attend", "remote", way, dtype)
    loose = 2e-5 if dtype == "float32" else 2e-2
    for one, other in zip(found, wanted, strict=True):
        same(one, other, rtol=loose, atol=loose)


@needs_native
def test_attention_is_chosen_there(home: _homes.Home) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.randn(1, 4, 64, 64, device="remote", dtype=torch.bfloat16)
    known = len(home.choices)
    for kind in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        with sdpa_kernel(kind):
            made = F.scaled_dot_product_attention(x, x, x)
            here = x.to("cuda")
            same(made, F.scaled_dot_product_attention(here, here, here), rtol=2e-2, atol=2e-2)
    assert list(home.choices.values())[known:] == [4, 2, 3, 0]


@needs_native
def test_events_and_streams() -> None:
    start, end = (torch.Event("remote:0", enable_timing=True) for _ in range(2))
    x = torch.randn(3000, 3000, device="remote")
    torch.remote.synchronize()  # type: ignore[attr-defined]
    start.record()
    y = x
    for _ in range(20):
        y = x @ x
    end.record()
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 10_000
    stream = torch.Stream("remote:0")
    with stream:
        z = y.sum()
    stream.synchronize()
    assert z.item() == pytest.approx(y.cpu().sum().item(), rel=1e-2, abs=1e3)


@needs_native
def test_pinned_uploads() -> None:
    x = torch.randn(4096, 4096).pin_memory()
    assert x.is_pinned()
    wanted = x.clone()
    y = x.to("remote", non_blocking=True)
    REMOTE.synchronize()
    x.zero_()
    same(y, wanted)


def test_a_gibibyte() -> None:
    def digest(tensor: Tensor) -> bytes:
        memory: Any = tensor.numpy()
        return hashlib.blake2b(memory).digest()

    x = torch.randint(-(2**62), 2**62, (1 << 27,))
    before = digest(x)
    y = x.to("remote")
    del x
    assert digest(y.cpu()) == digest(y.to("cuda").cpu()) == before


def test_compiled(here: Here) -> None:
    torch._dynamo.reset()
    found = seeded("fit", "remote", wrap=lambda model: torch.compile(model, backend="gpuremote"))
    same(found[0], here.run("fit")[0], rtol=1e-4, atol=1e-5)


def test_compiled_attention() -> None:
    torch._dynamo.reset()

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    compiled: Any = torch.compile(attend, backend="gpuremote")
    x = torch.randn(2, 4, 32, 16)
    for _ in range(3):
        same(compiled(x.to("remote")), attend(x.to("cuda")), rtol=1e-4, atol=1e-5)


def test_captured(here: Here) -> None:
    steps: list[Any] = []

    def wrap(step: Any) -> Any:
        steps.append(gpuremote.torch.capture(step))
        return steps[0]

    same(seeded("repeat", "remote", wrap=wrap)[0], here.run("repeat")[0], rtol=1e-3, atol=1e-5)
    assert "were one record" in str(steps[0].explain())


def test_errors() -> None:
    with pytest.raises(RuntimeError, match="positive-definite"):
        torch.linalg.cholesky(-torch.eye(3, device="remote")).cpu()
    with pytest.raises(RuntimeError, match=r"cannot be multiplied|reduction dim"):
        torch.ones(2, 3, device="remote") @ torch.ones(2, 3, device="remote")
    with pytest.raises((RuntimeError, MemoryError), match=r"memory|bytes"):
        torch.empty(1 << 44, device="remote")[:3].cpu()
    assert torch.ones(3, device="remote").sum().item() == 3


ASSERTING: Final = """
import torch, gpuremote.torch
gpuremote.torch.connect("local://?backend=torch&connect_timeout=60")
x = torch.arange(8.0, device="remote")
try:
    print(x[torch.tensor([100]).to("remote")].cpu())
except Exception as error:
    print(type(error).__name__, error)
try:
    x.sum().item()
except Exception as error:
    print("then", type(error).__name__, str(error)[:300])
try:
    gpuremote.torch.close()
except Exception as error:
    print("at the end", type(error).__name__)
gpuremote.torch.connect("local://?backend=torch&connect_timeout=60")
print("again", torch.arange(8.0, device="remote").sum().item())
gpuremote.torch.close()
"""


def test_an_assertion_of_the_card() -> None:
    """An index out of bounds ends all work of its process there, and no other's."""
    done = subprocess.run(
        [sys.executable, "-c", ASSERTING], capture_output=True, text=True, timeout=120, check=False
    )
    print(done.stdout, done.stderr[-2000:])
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "again 28.0"
    assert "device-side assert" in done.stdout or "SessionLost" in done.stdout


def test_memory_comes_back() -> None:
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512)).to("remote")
    optimiser = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimiser.zero_grad()
        model(torch.randn(256, 512, device="remote")).square().mean().backward()
        optimiser.step()

    def used() -> int:
        gc.collect()
        REMOTE.synchronize()
        return int(REMOTE.memory_allocated())

    for _ in range(3):
        step()
    before = used()
    for _ in range(200):
        step()
    assert used() == before


def test_moving_a_model_between_devices() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4))
    twin = copy.deepcopy(model).cuda()
    x = torch.randn(2, 3, 9)
    model.to("remote")(x.to("remote"))
    twin(x.cuda())
    for one, other in zip(
        model.cuda().state_dict().values(), twin.state_dict().values(), strict=True
    ):
        same(one, other, rtol=1e-4, atol=1e-5)
