"""A server with the backend CuPy: arrays on a GPU, compared with NumPy's here."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import OpError, OutOfDeviceMemory
from gpuremote.testing.servers import device_server
from tests.faults.sides import BlockingSide
from tests.gpu.machine import no_cupy
from tests.session.comparing import DTYPES, case, numbers, same

pytestmark = [
    pytest.mark.skipif(bool(no_cupy()), reason=no_cupy() or "-"),
    pytest.mark.timeout(120),  # CuPy compiles each kernel that it meets for the first time
]
GiB: Final = 1 << 30
SIDE: Final = BlockingSide()


@pytest.fixture(scope="module", params=["shm", "tcp"])
def session(request: pytest.FixtureRequest) -> Iterator[Any]:
    with (
        device_server("--backend", "cupy", "--warm", "1") as server,
        gpuremote.connect_sync(
            f"{server.url}?transport={request.param}&connect_timeout=60"
        ) as opened,
    ):
        yield opened


@pytest.fixture
def device(session: Any) -> Any:
    return session.devices[0]


def test_what_it_is(session: Any, device: Any) -> None:
    assert session.backend == "cupy"
    assert "cuda" in device.name
    assert session.memory_limit > GiB


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_there_and_back(device: Any, dtype: str) -> None:
    for shape in ((), (7,), (3, 5), (0, 4), (300, 1000)):
        with case(dtype, shape):
            host = numbers(shape, dtype)
            remote = device.put(host)
            same(SIDE, remote, host)
            same(SIDE, remote.T, host.T)


OPS: Final[list[tuple[str, Callable[[Any, Any], Any]]]] = [
    ("arithmetic", lambda x, y: (x + y) * x - y / (abs(x) + 1)),
    ("ufuncs", lambda x, y: np.exp(-abs(x)) + np.sqrt(abs(y)) + np.sin(x) * np.arctan2(x, y)),
    ("comparisons", lambda x, y: (x > y) & (x != 2) | (y <= 1)),
    ("where", lambda x, y: np.where(x > y, x, y)),
    ("matmul", lambda x, y: x @ y.T),
    ("sum", lambda x, y: x.sum(0) + y.mean(1).sum()),
    ("var", lambda x, y: np.var(x, axis=1, keepdims=True) + y.std()),
    ("minmax", lambda x, y: x.max(1) - y.min(1)),
    ("argmax", lambda x, y: np.argmax(x, axis=0)),
    ("cumsum", lambda x, y: np.cumsum(x, axis=1)),
    ("sort", lambda x, y: np.sort(x, axis=0)),
    ("concatenate", lambda x, y: np.concatenate([x, y], axis=1)),
    ("slices", lambda x, y: x[1:, ::-2] + y[:-1, ::-2]),
    ("none", lambda x, y: x[:, None, :] * y[None, :, :]),
    ("einsum-like", lambda x, y: (x[:, :, None] * y[:, None, :]).sum((0, 1))),
]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
def test_ops(device: Any, dtype: str) -> None:
    x, y = numbers((40, 41), dtype, 1), numbers((40, 41), dtype, 2)
    for name, op in OPS:
        with case(name, dtype):
            expected = op(x, y)
            found = op(device.put(x), device.put(y))
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            tolerance = 1e-4 if found.dtype.itemsize <= 4 else 1e-9
            np.testing.assert_allclose(found.get(), expected, rtol=tolerance, atol=tolerance)


def test_linear_algebra(device: Any) -> None:
    a: Any = numbers((20, 20), "float64", 3) + 20 * np.eye(20)
    x = device.put(a)
    linalg: Any = np.linalg
    np.testing.assert_allclose(linalg.inv(x).get(), np.linalg.inv(a), atol=1e-9)
    np.testing.assert_allclose(linalg.solve(x, x[0]).get(), np.linalg.solve(a, a[0]), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(x).item(), np.linalg.det(a), rtol=1e-9)
    q, r = linalg.qr(x)
    np.testing.assert_allclose((q @ r).get(), a, atol=1e-9)
    u, s, vh = linalg.svd(x)
    np.testing.assert_allclose((u * s @ vh).get(), a, atol=1e-8)
    w = linalg.eigvalsh(x @ x.T)
    np.testing.assert_allclose(w.get(), np.linalg.eigvalsh(a @ a.T), rtol=1e-8)


def test_in_place_and_assignment(device: Any) -> None:
    host = numbers((50, 60), "float32")
    x = device.put(host)
    for array in (host, x):
        array += 1
        array[3:7, ::2] = 5
        array[array > 6] *= 0.5
        array[[1, 2, 2], [0, 5, 5]] = 9
        array.T[4] -= 3
    np.testing.assert_allclose(x.get(), host, rtol=1e-6)


def test_random_numbers(device: Any) -> None:
    x = device.random_normal((1000, 1000), seed=4, dtype="f4")
    assert abs(x.mean().item()) < 0.01
    assert abs(x.std().item() - 1) < 0.01
    assert (x == device.random_normal((1000, 1000), seed=4, dtype="f4")).all().item()


def test_a_gibibyte(device: Any) -> None:
    host: Any = np.random.default_rng(0).integers(0, 1 << 62, GiB // 8, np.int64)
    before = hashlib.blake2b(host).hexdigest()
    x = device.put(host)
    assert (x ^ x[::-1]).sum().item() == np.bitwise_xor(host, host[::-1]).sum()
    host[:] = 0
    x.get(out=host)
    assert hashlib.blake2b(host).hexdigest() == before


def test_pieces_while_others_are_on_their_way(device: Any) -> None:
    hosts = [numbers((1 << 20,), "float32", seed) for seed in range(40)]
    arrays = [device.put(host) * 2 for host in hosts]
    for host, array in zip(hosts, arrays, strict=True):
        np.testing.assert_array_equal(array.get(), host * 2)


def test_streams_and_events(device: Any) -> None:
    first, second = device.stream(), device.stream()
    x = device.random_uniform((4000, 4000), 1, "f4")
    start = first.record()
    with first:
        y = x
        for _ in range(20):
            y = x @ y / 2000
    end = first.record()
    with second:
        z = x.sum()
    assert abs(z.item() / 8e6 - 1) < 0.01
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(end) < 60_000
    second.wait(end)
    with second:
        w = y + 1
    np.testing.assert_allclose((w - y).mean().item(), 1, rtol=1e-3)


def test_what_another_stream_makes_is_waited_for(device: Any) -> None:
    """No event is needed, on a device either that runs behind its host."""
    first, second = device.stream(), device.stream()
    x = device.random_uniform((6000, 6000), 1, "f4")
    expected = None
    for _ in range(5):
        with first:
            y = x
            for _ in range(8):
                y = x @ y / 3000
            y = y + 1
        with second:
            z = (y * 2).sum()
        total = (y * 2).sum()  # in the default stream
        del y
        made = [device.full((6000, 6000), 7, "f4") for _ in range(3)]  # into memory that is free
        found = (z.item(), total.item())
        del made
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        expected = expected or found[0]
        assert found[0] == pytest.approx(expected, rel=1e-5)


def test_uploads_are_there_for_other_streams(device: Any) -> None:
    stream = device.stream()
    for seed in range(20):
        host = numbers((1 << 22,), "float32", seed)
        with stream:
            assert (device.put(host) * 1).sum().item() == host.sum(dtype="f8")


def test_memory_comes_back(session: Any, device: Any) -> None:
    def used() -> int:
        gc.collect()
        session.synchronize()
        return int(session.server_stats()["memory_used"])

    before = used()
    x = None
    for _ in range(300):
        x = device.zeros((64, 1 << 20), "f4") + 1  # 150 GiB in all
    assert x is not None
    assert x[5, 5].item() == 1
    del x
    assert used() == before


def test_failures(session: Any, device: Any) -> None:
    with pytest.raises(OutOfDeviceMemory):
        device.empty(1 << 45, "u1").wait()
    limit = session.memory_limit
    with pytest.raises(OutOfDeviceMemory):
        (device.empty(limit // 2 + 4096, "u1") + 1).wait()
    with pytest.raises(OpError):
        np.linalg.cholesky(device.put(np.ones((3, 4))))
    x = device.put(np.array([1, 2, 3]))
    assert (x + 1).tolist() == [2, 3, 4]  # the session goes on


def test_several_sessions() -> None:
    with (
        device_server("--backend", "cupy", "--warm", "2") as server,
        gpuremote.connect_sync(f"{server.url}?connect_timeout=60") as one,
        gpuremote.connect_sync(f"{server.url}?connect_timeout=60") as other,
    ):
        x = one.devices[0].arange(1000.0)
        y = x.copy_to(other.devices[0])
        assert (y * 2).sum().item() == 999_000
        assert x.sum().item() == 499_500
