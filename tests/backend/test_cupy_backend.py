"""The CuPy backend over a double of CuPy: no CUDA device is needed, and none is tested."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuremote.backend.cupy_backend import CupyBackend
from gpuremote.backend.kernels import MAKERS
from gpuremote.errors import InvalidBuffer, LinearAlgebraError
from gpuremote.ops.catalogue import find
from gpuremote.ops.plan import define
from tests.backend.cupy_double import CupyDouble
from tests.backend.execution import check, planned
from tests.ops.case import METAS
from tests.ops.cases import CASES


@pytest.fixture
def cupy() -> CupyDouble:
    return CupyDouble(devices=2)


@pytest.fixture
def backend(cupy: CupyDouble) -> CupyBackend:
    return CupyBackend(cupy=cupy)


@pytest.mark.parametrize("name", sorted(CASES))
def test_runs_like_numpy(name: str) -> None:
    double = CupyDouble()
    check(name, CupyBackend(cupy=double), double.upload, lambda x: x.host, every=3)


def test_devices(cupy: CupyDouble, backend: CupyBackend) -> None:
    first, second = backend.devices()
    assert (first.index, first.kind, first.name, first.memory_bytes) == (
        0,
        "cuda",
        "double 0",
        1 << 30,
    )
    assert second.name == "double 1"
    assert len(CupyBackend(1, cupy=cupy).devices()) == 1
    assert len(CupyBackend(9, cupy=cupy).devices()) == 2


def test_a_plan_runs_on_its_device(cupy: CupyDouble, backend: CupyBackend) -> None:
    x = backend.empty((3,), np.dtype("f4"), 1)
    assert x.device.id == 1
    x.host[:] = 2
    meta = METAS.get((3,), np.dtype("f4"), 1)
    run = backend.compile(define(1, find("add"), [meta, "f"], {}, 1, METAS))
    (y,) = run([x, 1.0]) or ()
    assert y.device.id == 1
    assert y.host.tolist() == [3, 3, 3]
    made = backend.compile(define(1, find("zeros"), [], {"shape": (2,)}, 1, METAS))([])
    assert made is not None
    assert made[0].device.id == 1
    assert cupy.current == [0]
    wrong = backend.compile(define(1, find("add"), [meta, "f"], {}, 0, METAS))
    with pytest.raises(ValueError, match="device 1"):
        wrong([x, 1.0])


def test_copy_to_another_device(cupy: CupyDouble, backend: CupyBackend) -> None:
    x = cupy.upload(np.arange(3))
    y = backend.copy_to_device(x, 1)
    assert (y.device.id, y.host.tolist()) == (1, [0, 1, 2])
    assert backend.storage_of(y) is not backend.storage_of(x)


def test_bytes_in_are_staged_until_the_device_has_them(
    cupy: CupyDouble, backend: CupyBackend
) -> None:
    array = backend.empty((2, 3), np.dtype("i4"), 0)
    array.host[:] = -1
    view = backend.receive_view(array)
    assert (view.format, view.nbytes, len(cupy.pinned)) == ("B", 24, 1)
    view[:] = np.arange(6, dtype="i4").tobytes()
    backend.received(array, view)
    assert array.host.max() == -1  # The device has not come to it...
    assert len(backend._in_flight) == 1  # ...so the staging is still held.
    other = backend.receive_view(array)
    assert len(backend._in_flight) == 1
    plan = define(1, find("add"), [METAS.get((2, 3), np.dtype("i4"), 0), "i"], {}, 0, METAS)
    (y,) = backend.compile(plan)([array, 1]) or ()
    assert y.host.tolist() == [[1, 2, 3], [4, 5, 6]]  # Ops come behind the upload.
    assert backend.receive_view(array) is not other
    assert not backend._in_flight


def test_bytes_out(cupy: CupyDouble, backend: CupyBackend) -> None:
    x = np.arange(6, dtype="i2").reshape(2, 3)
    for host in (x, np.array(3.5), np.zeros((0, 2), "f4"), np.array([True])):
        view, private = backend.send_view(cupy.upload(host))
        assert private
        assert bytes(view) == host.tobytes()
    view, _ = backend.send_view(cupy.adopt(x.T))
    assert bytes(view) == x.T.tobytes()


def test_empty_arrays_and_wrong_layouts(cupy: CupyDouble, backend: CupyBackend) -> None:
    array = backend.empty((0, 3), np.dtype("f4"), 0)
    view = backend.receive_view(array)
    assert view.nbytes == 0
    backend.received(array, view)
    with pytest.raises(InvalidBuffer):
        backend.receive_view(cupy.adopt(np.zeros((2, 3)).T))


def test_streams(cupy: CupyDouble, backend: CupyBackend) -> None:
    stream = backend.create_stream(1)
    assert stream[1].non_blocking
    with backend.activate(stream):
        assert cupy.current[-1] == 1
        assert cupy.streams[-1] is stream[1]
        start = backend.record(stream)
    with backend.activate(None):
        assert cupy.streams[-1] is cupy.cuda.Stream.null
    assert not backend.reached(start)
    assert backend.elapsed(start, start) is None
    backend.wait(None, start)
    assert cupy.cuda.Stream.null.waited == [*start, *start]  # One wait per device.
    end = backend.record(stream)
    backend.synchronize(stream)
    assert backend.reached(start)
    assert backend.reached(end)
    assert backend.elapsed(start, end) == 1.5
    backend.synchronize_event(end)
    assert end[0].synchronized == 1
    everywhere = backend.record(None)
    assert len(everywhere) == 2
    assert not backend.reached(everywhere)
    backend.synchronize(None)
    assert backend.reached(everywhere)


def test_events_without_a_common_clock(cupy: CupyDouble, backend: CupyBackend) -> None:
    def broken(start: Any, end: Any) -> float:
        raise RuntimeError("cudaErrorInvalidResourceHandle")

    first = backend.record(None)
    backend.synchronize(None)
    cupy.cuda.get_elapsed_time = broken
    assert backend.elapsed(first, first) is None


def test_errors(backend: CupyBackend) -> None:
    assert isinstance(backend.translate_error(np.linalg.LinAlgError("x")), LinearAlgebraError)


def test_probe_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert CupyBackend.probe() == (False, "CuPy can't be imported: No module named 'cupy'")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (2, (True, "CuPy double, 2 devices")),
        (0, (False, "CuPy double finds no CUDA device")),
        (RuntimeError("no driver"), (False, "CuPy double finds no CUDA driver: no driver")),
    ],
)
def test_probe(monkeypatch: pytest.MonkeyPatch, count: Any, expected: tuple[bool, str]) -> None:
    def device_count() -> int:
        if isinstance(count, Exception):
            raise count
        return int(count)

    runtime = SimpleNamespace(getDeviceCount=device_count)
    found = SimpleNamespace(__version__="double", cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(importlib, "import_module", lambda _name: found)
    assert CupyBackend.probe() == expected


def test_real_cupy_has_every_function() -> None:
    """Where CuPy is installed, with a device or not: the kernels name nothing that is missing."""
    real = pytest.importorskip("cupy")
    for name, cases in CASES.items():
        for case in cases():
            plan = planned(name, case)
            if plan is not None:
                MAKERS[name](real, plan)


def test_real_cupy_runs_like_numpy() -> None:
    real = pytest.importorskip("cupy")
    available, reason = CupyBackend.probe()
    if not available:
        pytest.skip(reason)
    # Vectors of a decomposition may differ in sign, and what the seed means differs.
    vague = {"svd", "eigh", "qr", "qr_r", "random_uniform", "random_normal"}
    for name in CASES:
        check(name, CupyBackend(), real.asarray, real.asnumpy, same_values=name not in vague)
