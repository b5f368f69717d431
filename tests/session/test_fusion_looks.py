"""How often a queue is looked at for chains: a few times per call, whatever the program."""

from __future__ import annotations

from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuremote.backend.fused import Chain, Fused
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.ops.catalogue import find
from gpuremote.ops.plan import define
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Slot, Storage
from gpuremote.server.streams import Stream, StreamThread
from tests.session.test_fusion import Failing, floats

Array = npt.NDArray[Any]

MiB: Final = 1 << 20
N: Final = MiB // 8
NEVER: Final = (1 << 63) - 1


class Queue:
    """Calls in the queue of a session in this process, on arrays of 256 KiB."""

    def __init__(self, backend: NumpyBackend | None = None, memory: int = 1 << 30) -> None:
        self.session = WorkerSession(backend or NumpyBackend(), memory)
        self._meta = self.session.metas.get((N // 4,), np.dtype(np.float64), 0)
        self._ops: dict[str, Any] = {}
        self.number = 0

    def array(self, seed: int) -> Slot:
        slot = Slot()
        storage = Storage(self.session.quota, self._meta.nbytes)
        slot.fill(floats(seed, N // 4), self._meta, storage)
        return slot

    def call(self, name: str, *operands: Slot) -> Slot:
        """What the op makes, or what it writes to in place."""
        op = self._ops.get(name)
        if op is None:
            session, metas = self.session, [self._meta] * len(operands)
            plan = define(64 + len(self._ops), find(name), metas, {}, 0, session.metas)
            op = self._ops[name] = session.fusion.executable(plan, session.backend.compile(plan))
        outs = [] if op.writes else [Slot()]
        self.number += 1
        item = (self.number, op.run, (self.session, op, list(operands), outs))
        self.session.default.queue.append(item)
        return outs[0] if outs else operands[0]

    def second_stream(self) -> None:
        """One with nothing to do, which might wait for results all the same."""
        self.session.streams[1] = cast(StreamThread, Stream(1, 0, None, {}, lambda: None))

    def run(self) -> tuple[int, float]:
        """How many ops ran in runs, and how often a call was looked at."""
        with np.errstate(all="ignore"):
            assert self.session.default.run_ready()
        assert self.session.ops_executed == self.number
        return self.session.fusion.ops, self.session.fusion.looks / self.number


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("arrays", [1, 32])
def test_looks_at_ops_without_a_link(arrays: int, streams: int, keep: bool) -> None:
    """Each on an array that was there before."""
    queue = Queue()
    if streams == 2:
        queue.second_stream()
    xs = [queue.array(k) for k in range(arrays)]
    out, kept = xs[0], []
    for k in range(1000):
        out = queue.call("abs", xs[k % arrays])
        if keep:
            kept.append(out)
    fused, looks = queue.run()
    assert fused == 0
    assert looks <= 1.1
    assert out.value.tobytes() == np.abs(xs[999 % arrays].value).tobytes()


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("streams", [1, 2])
def test_looks_at_results_that_are_kept(streams: int, every: int) -> None:
    queue = Queue()
    if streams == 2:
        queue.second_stream()
    x, kept = queue.array(1), []
    y = x
    for k in range(1000):
        y = queue.call("subtract", y, x)
        if k % every == 0:
            kept.append(y)
    fused, looks = queue.run()
    assert looks <= (1.1 if streams == 1 else 5)
    if streams == 1 or every > 1:
        assert fused >= 990
    host = x.value
    for k in range(1000):
        host = host - x.value
        if k % every == 0:
            assert kept[k // every].value.tobytes() == host.tobytes()


def test_looks_at_results_that_are_kept_by_turns() -> None:
    """One of a run of its own, then one behind another."""
    queue = Queue()
    queue.second_stream()
    x, kept = queue.array(1), []
    y = x
    for _ in range(400):
        y = queue.call("add", y, x)
        kept.append(y)
        y = queue.call("add", queue.call("add", y, x), x)
        kept.append(y)
    _, looks = queue.run()
    assert looks <= 6


@pytest.mark.parametrize("length", [1, 2, 3, 8, 40])
def test_looks_at_chains_that_something_else_breaks(length: int) -> None:
    queue = Queue()
    x = queue.array(1)
    y, sums = x, []
    for _ in range(800 // length):
        for _ in range(length):
            y = queue.call("multiply", y, x)
        sums.append(queue.call("sum", y))
    fused, looks = queue.run()
    assert looks <= 2
    assert fused == (queue.number - len(sums) if length > 1 else 0)


def test_looks_at_a_chain() -> None:
    queue = Queue()
    x = queue.array(1)
    y = x
    for _ in range(500):
        y = queue.call("add", y, x)
        y = queue.call("square", y)
        y = queue.call("sqrt", y)
    assert queue.run() == (1500, 1.0)


def test_looks_at_sums_of_two() -> None:
    """Two ops without a link for each that has one."""
    queue = Queue()
    xs = [queue.array(k) for k in range(32)]
    for k in range(400):
        queue.call("add", queue.call("abs", xs[k % 32]), queue.call("abs", xs[(k + 1) % 32]))
    fused, looks = queue.run()
    assert fused >= 1190
    assert looks <= 1.1


@pytest.mark.parametrize("loose", [3, 10, 100])
def test_looks_at_chains_between_ops_without_a_link(loose: int) -> None:
    """What has no link before a chain does not keep it from being a run."""
    queue = Queue()
    x = queue.array(1)
    for _ in range(10):
        for _ in range(loose):
            y = queue.call("abs", x)
        for _ in range(50):
            y = queue.call("add", y, x)
    fused, looks = queue.run()
    assert fused >= 10 * 45
    assert looks <= 1.5


def test_looks_where_blocks_run_out() -> None:
    """More results at a time than there are blocks for: runs end before."""
    queue = Queue()
    x = queue.array(1)
    for _ in range(20):
        parts = [queue.call("add", x, x)]
        for _ in range(30):
            parts.append(queue.call("add", parts[-1], x))
        total = parts[0]
        for part in parts[1:]:
            total = queue.call("add", total, part)
        del parts, part
    _, looks = queue.run()
    assert looks <= 6


def test_looks_where_memory_runs_out() -> None:
    """There is room for one or two results more, and each op but the first of two frees one."""
    count = 300
    queue = Queue(memory=(count + 2) * MiB // 4)
    xs, kept = [queue.array(k) for k in range(count)], []
    y = xs[0]
    for x in xs:
        y = queue.call("multiply", queue.call("add", y, x), x)
        kept.append(y)
    del xs, x, y
    _, looks = queue.run()
    assert looks <= 5
    assert all(slot.failure is None for slot in kept)


class Refusing(NumpyBackend):
    def fuse(self, chain: Chain) -> Fused | None:
        return None


@pytest.mark.parametrize("backend", [Refusing, Failing])
def test_looks_where_there_are_no_programs(backend: type[NumpyBackend]) -> None:
    queue = Queue(backend())
    x = queue.array(1)
    y = x
    for _ in range(1000):
        y = queue.call("add", y, x)
    assert queue.run() == (0, 1.0)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12),
            st.integers(1, 40),
        ),
        min_size=1,
        max_size=3,
    ),
    streams=st.integers(1, 2),
    memory=st.sampled_from([2 * MiB, 1 << 30]),
)
def test_looks_at_any_program(
    parts: list[tuple[list[tuple[int, bool]], int]], streams: int, memory: int
) -> None:
    """Patterns again and again: beside what the first look sees, no more than a few for each."""
    queue = Queue(memory=memory)
    if streams == 2:
        queue.second_stream()
    x = queue.array(1)
    y, older, kept = x, x, []
    for pattern, times in parts:
        for action, keep in pattern * times:
            older, before = y, older
            match action:
                case 0:
                    y = queue.call("abs", x)
                case 1 | 2:
                    y = queue.call("maximum", y, x)
                case 3:
                    y = queue.call("minimum", y, before)
                case 4:
                    queue.call("sum", y)
                case 5:
                    y = queue.call("maximum_", queue.call("abs", y), x)
            if keep:
                kept.append(y)
    queue.session.default.run_ready()
    assert not queue.session.default.queue
    assert queue.session.fusion.looks <= 512 + 8 * queue.number
