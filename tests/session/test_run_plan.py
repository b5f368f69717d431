"""Running one call: the part in C does what Python does, and leaves the rest to it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from gpuremote._speed import native
from gpuremote.backend.array_namespace import python_single, single
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.ops.catalogue import find
from gpuremote.ops.plan import define
from gpuremote.server.execute import Executable, python_run_plan, run_plan
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import (
    Failure,
    PythonStorage,
    PythonTally,
    Quota,
    Slot,
    Storage,
    Tally,
)
from gpuremote.server.streams import Stream

RUNS = [pytest.param(python_run_plan, id="python")]
COUNTS = [pytest.param(PythonTally, id="python")]
if native is not None:
    RUNS.append(pytest.param(native.run_plan, id="native"))
    COUNTS.append(pytest.param(native.Tally, id="native"))


class Bench:
    """A session whose calls are run by hand, and what it was told of failures."""

    def __init__(self, run: Callable[..., object], limit: int = 1 << 20) -> None:
        self.run = run
        self.session = WorkerSession(NumpyBackend(), limit)
        self.told: list[tuple[int, str, str]] = []
        self.session.failed = self.failed  # type: ignore[method-assign]
        self.plans = 64

    def failed(self, number: int, op: str, error: Exception) -> Failure:
        known = self.session.backend.translate_error(error)
        self.told.append((number, op, type(known).__name__))
        return Failure.of(number, op, known)

    def slot(self, value: Any) -> Slot:
        array = np.asarray(value)
        slot = Slot()
        meta = self.session.metas.get(array.shape, array.dtype, 0)
        slot.fill(array, meta, Storage(self.session.quota, meta.nbytes))
        return slot

    def plan(self, op: str, operands: Sequence[Any], **params: Any) -> Executable:
        self.plans += 1
        kinds: list[Any] = [o.meta if isinstance(o, Slot) else o for o in operands]
        plan = define(self.plans, find(op), kinds, params, 0, self.session.metas)
        return Executable(plan, self.session.backend.compile(plan))

    def call(self, plan: Executable, operands: list[Any]) -> tuple[object, list[Slot]]:
        outs = [Slot() for _ in range(plan.n_out)]
        return self.run(7, self.session, plan, operands, outs), outs


@pytest.fixture(params=RUNS)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_a_new_array(bench: Bench) -> None:
    x = bench.slot([1.0, 2.0])
    plan = bench.plan("add", [x, x])
    used = bench.session.quota.used
    answer, (out,) = bench.call(plan, [x, x])
    assert answer is None
    assert out.value.tolist() == [2, 4]
    assert out.meta is plan.simple
    assert out.storage is not None
    assert out.storage.nbytes == 16
    assert bench.session.quota.used == used + 16
    assert bench.session.ops_executed == 1
    del out
    assert bench.session.quota.used == used
    assert not bench.told


def test_a_number(bench: Bench) -> None:
    x = bench.slot([1.0, 2.0])
    answer, (out,) = bench.call(bench.plan("add", [x, "f"]), [x, 0.5])
    assert (answer, out.value.tolist()) == (None, [1.5, 2.5])


def test_one_that_is_not_there_yet(bench: Bench) -> None:
    x, later = bench.slot([1.0]), Slot()
    plan = bench.plan("add", [x, x])
    answer, (out,) = bench.call(plan, [x, later])
    assert answer is later
    assert out.pending
    assert bench.session.ops_executed == 0


def test_one_that_failed(bench: Bench) -> None:
    x, bad = bench.slot([1.0]), Slot()
    failure = Failure(3, 1, "it went wrong", "svd")
    bad.poison(failure)
    answer, (out,) = bench.call(bench.plan("add", [x, x]), [bad, x])
    assert answer is None
    assert out.failure is failure
    assert not bench.told


def test_one_that_is_something_else(bench: Bench) -> None:
    x, y = bench.slot([1.0]), bench.slot([1, 2])
    _, (out,) = bench.call(bench.plan("add", [x, x]), [x, y])
    assert bench.told == [(7, "add", "ShapeError")]
    assert out.failure is not None
    assert bench.session.ops_executed == 1


def test_an_equal_meta_of_another_table(bench: Bench) -> None:
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])
    bench.session.metas._table.clear()
    y = bench.slot([2.0])
    assert y.meta is not x.meta
    _, (out,) = bench.call(plan, [x, y])
    assert out.value.tolist() == [3]


def test_no_room(bench: Bench) -> None:
    x = bench.slot(np.zeros(1 << 13))
    plan = bench.plan("add", [x, x])
    bench.session.quota.limit = 1 << 16
    spared: list[int] = []
    bench.session.quota.spare = spared.append
    _, (out,) = bench.call(plan, [x, x])
    assert bench.told == [(7, "add", "OutOfDeviceMemory")]
    assert spared == [1 << 16]
    assert out.value is None
    assert bench.session.quota.used == 1 << 16


def test_it_raises(bench: Bench) -> None:
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])
    used = bench.session.quota.used

    def fail(_: Sequence[Any]) -> Any:
        raise FloatingPointError("no")

    plan.function = fail
    _, (out,) = bench.call(plan, [x, x])
    assert bench.told == [(7, "add", "OpFailed")]
    assert out.failure is not None
    gc.collect()
    assert bench.session.quota.used == used


@pytest.mark.parametrize(
    "make", [python_single] if native is None else [python_single, native.Single]
)
def test_a_kernel_that_gives_the_result(bench: Bench, make: Any) -> None:
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])
    assert isinstance(plan.function, type(single(np.add, True)))
    plan.function = make(np.subtract, True)
    assert plan.function([x.value, 3.0])[0].tolist() == [-2]
    assert plan.function((x.value, 3.0))[0].tolist() == [-2]
    _, (out,) = bench.call(plan, [x, x])
    assert out.value.tolist() == [0]
    plan.function = make(lambda *_: 1 // 0, True)
    bench.call(plan, [x, x])
    assert bench.told == [(7, "add", "OpFailed")]
    with pytest.raises(TypeError):
        make(np.add, True)(3)


@pytest.mark.skipif(native is None, reason="the part in C does that")
class TestInTheirPlace:
    """Results of elementwise ops in the place of operands that nothing can name any more."""

    SIZE = 1 << 13

    @pytest.fixture
    def bench(self) -> Bench:
        return Bench(native.run_plan)

    def made(self, bench: Bench) -> Slot:
        """What an op made, so that its memory is its own."""
        zeros = bench.slot(np.zeros(self.SIZE))
        _, (out,) = bench.call(bench.plan("add", [zeros, "f"]), [zeros, 1.0])
        return out

    def test_the_last_use(self, bench: Bench) -> None:
        operands: list[Any] = [self.made(bench), 0.5]
        value = operands[0].value
        used, peak = bench.session.quota.used, bench.session.quota.peak
        plan = bench.plan("multiply", [operands[0], "f"])
        place = id(value)
        del value
        _, (out,) = bench.call(plan, operands)
        assert id(out.value) == place
        assert out.value[0] == 0.5
        operands.clear()
        assert (bench.session.quota.used, bench.session.quota.peak) == (used, peak)
        del out
        assert bench.session.quota.used == used - 8 * self.SIZE

    def test_twice_the_same(self, bench: Bench) -> None:
        operands: list[Any] = 2 * [self.made(bench)]
        plan, place = bench.plan("add", operands), id(operands[0].value)
        _, (out,) = bench.call(plan, operands)
        assert id(out.value) == place
        assert out.value[0] == 2

    def test_the_second_operand(self, bench: Bench) -> None:
        held = self.made(bench)
        operands: list[Any] = [held, self.made(bench)]
        plan, place = bench.plan("subtract", operands), id(operands[1].value)
        _, (out,) = bench.call(plan, operands)
        assert id(out.value) == place
        assert held.value[0] == 1
        assert out.value[0] == 0

    def test_a_chain_needs_one_array(self, bench: Bench) -> None:
        operands: list[Any] = [self.made(bench)]
        plan = bench.plan("sqrt", operands)
        quota = bench.session.quota
        used, quota.limit = quota.used, quota.used
        for _ in range(20):
            _, operands = bench.call(plan, operands)
        assert quota.used == used
        assert not bench.told

    @pytest.mark.parametrize(
        "why", ["slot", "value", "view", "bytes", "storage", "outgoing", "base", "readonly"]
    )
    def test_what_is_still_needed(self, bench: Bench, why: str) -> None:
        operands: list[Any] = [self.made(bench), 0.5]
        slot = operands[0]
        plan = bench.plan("multiply", [slot, "f"])
        if why == "outgoing":
            slot.storage.outgoing += 1
        elif why == "base":
            slot.fill(slot.value[:], slot.meta, slot.storage)
        elif why == "readonly":
            slot.value.flags.writeable = False
        held = {
            "slot": slot,
            "value": slot.value,
            "view": slot.value[::2],
            "bytes": memoryview(slot.value),
            "storage": slot.storage,
        }.get(why)
        place = slot.value.ctypes.data
        del slot
        _, (out,) = bench.call(plan, operands)
        assert out.value.ctypes.data != place
        assert operands[0].value[0] == 1
        assert not bench.told
        del held

    def test_another_dtype_or_shape(self, bench: Bench) -> None:
        operands: list[Any] = [self.made(bench)]
        place = operands[0].value.ctypes.data
        _, (out,) = bench.call(bench.plan("isnan", operands), operands)
        assert out.value.dtype == bool
        wide: list[Any] = [self.made(bench), bench.slot(np.ones((2, self.SIZE)))]
        _, (out,) = bench.call(bench.plan("add", wide), wide)
        assert out.value.shape == (2, self.SIZE)
        assert operands[0].value.ctypes.data == place

    def test_no_ufunc_of_whole_arrays(self, bench: Bench) -> None:
        square = bench.slot(np.ones((128, 128)))
        _, operands = bench.call(bench.plan("add", [square, "f"]), [square, 0.0])
        operands = 2 * operands
        _, (out,) = bench.call(bench.plan("matmul", operands), operands)
        assert out.value[0, 0] == 128

    def test_it_raises(self, bench: Bench) -> None:
        operands: list[Any] = [self.made(bench), 0.5]
        plan = bench.plan("multiply", [operands[0], "f"])
        plan.function = native.Single(lambda *_: 1 // 0, True)
        used = bench.session.quota.used
        _, (out,) = bench.call(plan, operands)
        assert bench.told == [(7, "multiply", "OpFailed")]
        assert out.failure is not None
        operands.clear()
        assert bench.session.quota.used == used - 8 * self.SIZE


def test_an_interrupt_is_no_failure(bench: Bench) -> None:
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])

    def interrupt(_: Sequence[Any]) -> Any:
        raise KeyboardInterrupt

    plan.function = interrupt
    with pytest.raises(KeyboardInterrupt):
        bench.call(plan, [x, x])
    assert not bench.told


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros(1, np.float32)])
def test_a_result_that_is_not_what_was_declared(bench: Bench, wrong: Any) -> None:
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])
    plan.function = lambda _: (wrong,)
    bench.call(plan, [x, x])
    assert bench.told == [(7, "add", "InternalError")]


def test_an_equal_dtype(bench: Bench) -> None:
    """NumPy makes another object for what it reads from elsewhere."""
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])
    other = np.zeros(1, np.dtype("f8", copy=True, metadata={"a": 1}))
    plan.function = lambda _: (other,)
    _, (out,) = bench.call(plan, [x, x])
    assert out.value is other


def test_results_that_are_not_one(bench: Bench) -> None:
    x = bench.slot([1.0])
    plan = bench.plan("add", [x, x])
    plan.function = lambda _: (x.value, x.value)
    bench.call(plan, [x, x])
    assert len(bench.told) == 1


def test_in_place_views_several_and_scratch(bench: Bench) -> None:
    x = bench.slot(np.arange(4.0))
    bench.call(bench.plan("add_", [x, "f"]), [x, 1.0])
    assert x.value.tolist() == [1, 2, 3, 4]
    _, (view,) = bench.call(bench.plan("reshape", [x], shape=[2, 2]), [x])
    assert view.storage is x.storage
    square = bench.slot(np.eye(2))
    _, outs = bench.call(bench.plan("slogdet", [square]), [square])
    assert [out.value.tolist() for out in outs] == [1, 0]
    _, (out,) = bench.call(bench.plan("sort", [x]), [x])
    assert out.value.tolist() == [1, 2, 3, 4]
    assert bench.session.ops_executed == 4
    assert not bench.told


def test_who_waits_for_the_last_call_is_woken() -> None:
    """Another stream may find the result missing while it is made."""
    bench = Bench(python_run_plan)
    stream, woken = bench.session.default, []
    other = Stream(1, 0, None, stream.waiting, lambda: woken.append(1))
    x = bench.slot([1.0])
    plan, out = bench.plan("add", [x, x]), Slot()

    def slowly(*values: Any) -> Any:
        stream.waiting[other] = out
        return np.add(*values)

    plan.function = single(slowly, False)
    stream.queue.append((1, run_plan, (bench.session, plan, [x, x], [out])))
    assert stream.run_ready()
    assert out.value.tolist() == [2]
    assert woken
    assert not stream.waiting


@pytest.mark.parametrize("kind", COUNTS)
def test_counting(kind: type[PythonTally]) -> None:
    tally = kind(100)
    assert tally.count(60)
    assert not tally.count(41)
    assert tally.count(40)
    assert not tally.count(1 << 70)
    tally.release(50)
    assert (tally.used, tally.peak, tally.limit) == (50, 100, 100)
    tally.limit = 10
    assert not tally.count(0)
    tally.limit = 1 << 62
    assert tally.count(1 << 61)
    assert not tally.count(1 << 62)


def test_what_is_loaded() -> None:
    expected = (PythonTally, PythonStorage) if native is None else (native.Tally, native.Storage)
    assert (Tally, Storage) == expected


def test_a_storage() -> None:
    quota = Quota(100)
    storage = Storage(quota, 60)
    with pytest.raises(OutOfDeviceMemory, match="60 of 100 bytes are in use"):
        Storage(quota, 41)
    assert (quota.used, storage.outgoing) == (60, 0)
    storage.outgoing += 1
    assert storage.outgoing == 1
    parts = storage.split([10, 20])
    assert [part.nbytes for part in parts] == [10, 20]
    assert storage.nbytes == 30
    del storage
    assert quota.used == 30
    del parts
    assert quota.used == 0


def test_a_storage_that_room_is_made_for() -> None:
    quota = Quota(100)
    held = [Storage(quota, 80)]
    quota.spare = lambda missing: held.clear()
    assert Storage(quota, 50).nbytes == 50
    assert quota.used == 0


def test_a_circle_of_a_quota_is_collected() -> None:
    """A session that ends without a word: its arrays lead to the quota, and that to it."""

    class Owner:
        storage: Any

        def spare(self, missing: int) -> None:
            pass

    def leave() -> weakref.ref[Owner]:
        quota, owner = Quota(100), Owner()
        owner.storage = Storage(quota, 10)
        quota.spare = owner.spare
        return weakref.ref(owner)

    left = leave()
    gc.collect()
    assert left() is None
