"""The NumPy backend against plain NumPy, and what it offers beside running plans."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.errors import (
    IndexOutOfBounds,
    InternalError,
    InvalidBuffer,
    LinearAlgebraError,
    OpFailed,
    OutOfDeviceMemory,
    ShapeError,
    UnsupportedOp,
)
from gpuremote.ops.catalogue import CATALOGUE, OpSpec, find
from gpuremote.ops.plan import Plan, define
from tests.backend.execution import check
from tests.ops.case import METAS
from tests.ops.cases import CASES


@pytest.fixture
def backend() -> NumpyBackend:
    return NumpyBackend()


def plan_of(name: str, *operands: Any, **params: Any) -> Plan:
    kinds = [o if isinstance(o, str) else METAS.get(o.shape, o.dtype, 0) for o in operands]
    return define(1, find(name), kinds, params, 0, METAS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_runs_like_numpy(name: str, backend: NumpyBackend) -> None:
    check(name, backend, lambda x: x, lambda x: x)


def test_results_without_axes_are_arrays(backend: NumpyBackend) -> None:
    x = np.arange(3.0)
    for name, operands in [("sum", (x,)), ("matmul", (x, x)), ("norm", (x,)), ("argmax", (x,))]:
        (found,) = backend.compile(plan_of(name, *operands))(operands) or ()
        assert type(found) is np.ndarray
        assert found.shape == ()
    (found,) = backend.compile(plan_of("getitem", x, "i", index=("i",)))([x, -1]) or ()
    assert type(found) is np.ndarray
    assert np.shares_memory(found, x)


def test_weak_scalars_are_weak(backend: NumpyBackend) -> None:
    x = np.ones(2, "f4")
    cases: list[tuple[str, Any, str]] = [
        ("f", 0.1, "f4"),
        ("i", 3, "f4"),
        ("c", 1j, "c8"),
        ("b", True, "f4"),
        ("f8", np.float64(0.1), "f8"),
        ("f4", np.float32(0.1), "f4"),
        ("f2", np.float16(1), "f4"),
    ]
    for code, value, dtype in cases:
        plan = plan_of("multiply", x, code)
        (found,) = backend.compile(plan)([x, value]) or ()
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found, x * value)


def test_overhead_of_a_compiled_plan(backend: NumpyBackend) -> None:
    """Less than half a microsecond over NumPy's own call (machines differ: twice that here)."""
    x = np.ones(8, "f4")
    run = backend.compile(plan_of("add", x, x))
    arguments = [x, x]

    def best(function: Any, *args: Any) -> float:
        def once() -> float:
            started = time.perf_counter()
            for _ in range(2000):
                function(*args)
            return (time.perf_counter() - started) / 2000

        return min(once() for _ in range(15))

    assert best(run, arguments) - best(np.add, x, x) < 1e-6


def test_random_numbers(backend: NumpyBackend) -> None:
    plan = plan_of("random_uniform", "i", shape=(1000,), dtype="f4")
    run = backend.compile(plan)
    (a,), (b,), (c,) = run([1]) or (), run([1]) or (), run([2]) or ()
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert 0 <= a.min() < 0.1 < 0.9 < a.max() < 1
    normal = backend.compile(plan_of("random_normal", "i", shape=(10_000,)))
    (x,) = normal([7]) or ()
    assert abs(float(x.mean())) < 0.1
    assert abs(float(x.std()) - 1) < 0.1


def test_a_range_longer_than_declared_is_not_allocated(backend: NumpyBackend) -> None:
    run = backend.compile(plan_of("arange", "i", "i", "i", length=3))
    with pytest.raises(ShapeError, match="declared"):
        run([0, 1 << 62, 1])


def test_views_and_writes(backend: NumpyBackend) -> None:
    x = np.zeros((3, 4), "f4")
    (row,) = backend.compile(plan_of("getitem", x, "i", index=("i",)))([x, 1]) or ()
    assert backend.compile(plan_of("fill_", row, "f"))([row, 2.0]) is None
    assert backend.compile(plan_of("add_", x, "i"))([x, 1]) is None
    assert x[1].tolist() == [3] * 4
    (imag,) = backend.compile(plan_of("imag", x))([x]) or ()
    imag[0, 0] = 1  # Not NumPy's read-only zeros.
    # Overlapping parts of one array.
    y = np.arange(5)
    set_rest = plan_of("setitem", y, y[:-1], "i", index=("s100",))
    backend.compile(set_rest)([y, y[:-1], 1])
    assert y.tolist() == [0, 0, 1, 2, 3]


def test_advanced_indexing_never_gives_a_view(backend: NumpyBackend) -> None:
    x, i = np.arange(6.0).reshape(2, 3), np.array(1)
    (found,) = backend.compile(plan_of("getitem_advanced", x, i, index=("a",)))([x, i]) or ()
    assert found.tolist() == [3, 4, 5]
    assert not np.shares_memory(found, x)


def test_errors_are_translated(backend: NumpyBackend) -> None:
    assert isinstance(backend.translate_error(np.linalg.LinAlgError("x")), LinearAlgebraError)
    assert isinstance(backend.translate_error(IndexError("x")), IndexOutOfBounds)
    assert isinstance(backend.translate_error(MemoryError()), OutOfDeviceMemory)
    failed = backend.translate_error(OverflowError("too big"))
    assert isinstance(failed, OpFailed)
    assert failed.message == "OverflowError: too big"
    ours = ShapeError("x")
    assert backend.translate_error(ours) is ours
    x = np.zeros((2, 2))
    with pytest.raises(np.linalg.LinAlgError):
        backend.compile(plan_of("inv", x))([x])


def test_an_op_that_the_backend_lacks(backend: NumpyBackend) -> None:
    spec = OpSpec("quantum", CATALOGUE["sin"].infer)
    x = METAS.get((2,), np.dtype("f4"), 0)
    with pytest.raises(UnsupportedOp, match="backend numpy lacks this op"):
        backend.compile(define(1, spec, [x], {}, 0, METAS))


def test_results_that_break_the_promise() -> None:
    """With a namespace that is not trusted: another dtype is cast, another shape is a bug."""
    backend = NumpyBackend()
    backend.exact = False
    x = np.ones(3, "f4")
    plan = plan_of("add", x, x)
    lying: Any = type("Namespace", (), {"asarray": staticmethod(np.asarray)})()
    lying.add = lambda a, b: np.add(a, b, dtype="f8")
    backend.xp = lying
    (found,) = backend.compile(plan)([x, x]) or ()
    assert found.dtype == np.float32
    lying.add = lambda a, b: np.add(a, b)[:2]
    with pytest.raises(InternalError, match=r"\(2,\) instead of \(3,\)"):
        backend.compile(plan)([x, x])
    del lying.add
    with pytest.raises(UnsupportedOp):
        backend.compile(plan)


def test_devices() -> None:
    assert [d.index for d in NumpyBackend(3).devices()] == [0, 1, 2]
    (device,) = NumpyBackend().devices()
    assert device.kind == "cpu"
    assert device.memory_bytes > 1 << 20
    assert NumpyBackend.probe() == (True, f"NumPy {np.__version__}")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", ["b1", "f2", "c16"])
def test_bytes_in_and_out(backend: NumpyBackend, shape: tuple[int, ...], dtype: str) -> None:
    source = np.ones(shape, dtype)
    array = backend.empty(shape, np.dtype(dtype), 0)
    view = backend.receive_view(array)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, source.nbytes)
    view[:] = source.tobytes()
    backend.received(array, view)
    np.testing.assert_array_equal(array, source)
    sent, private = backend.send_view(array)
    assert not private
    assert (sent.format, sent.ndim, bytes(sent)) == ("B", 1, source.tobytes())


def test_what_is_not_contiguous(backend: NumpyBackend) -> None:
    x = np.arange(6, dtype="i2").reshape(2, 3)
    sent, private = backend.send_view(x.T)
    assert private
    assert bytes(sent) == x.T.tobytes()
    read_only = np.broadcast_to(np.int8(1), (2, 2))
    assert backend.send_view(read_only)[1]
    for array in (x.T, read_only):
        with pytest.raises(InvalidBuffer):
            backend.receive_view(array)


def test_storage_of_views(backend: NumpyBackend) -> None:
    x = np.zeros((4, 4))
    assert backend.storage_of(x[1:].T[None]) is backend.storage_of(x) is x
    assert backend.storage_of(x.copy()) is not x
    buffer = bytearray(8)
    one, two = np.frombuffer(buffer, "u1"), np.frombuffer(buffer, "u1")[2:]
    assert backend.storage_of(one) is not None
    assert backend.storage_of(two[1:]) is backend.storage_of(two)
    assert backend.storage_of(backend.copy_to_device(x, 0)) is not x


def test_streams_and_events(backend: NumpyBackend) -> None:
    stream = backend.create_stream(0)
    with backend.activate(stream):
        assert np.divide(np.ones(1), 0).tolist() == [np.inf]  # No warning.
        start = backend.record(stream)
        time.sleep(0.002)
        end = backend.record(None)
        backend.wait(stream, start)
    assert backend.reached(end)
    elapsed = backend.elapsed(start, end)
    assert elapsed is not None
    assert elapsed >= 2
    backend.synchronize_event(end)
    backend.synchronize(stream)
