"""Recording ops: the part in C and its twin in Python write the same, and lose nothing."""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gpuremote._speed import NATIVE, native
from gpuremote.client import recording
from gpuremote.client.issuing import NEVER
from gpuremote.client.origin import OWN, take
from gpuremote.ops.catalogue import find
from gpuremote.ops.meta import MetaTable
from gpuremote.ops.plan import define

PYTHON = (recording.PythonRecorder, recording.PythonHandle, recording.python_known)
IN_C = (recording.Recorder, recording.Handle, recording.known)

Known = Callable[..., Any]


class Parts:
    """A recorder that sends nothing, its arrays, and ``known``."""

    def __init__(self, recorder: Any, handle: Any, known: Known) -> None:
        class Made(recorder):  # type: ignore[misc]
            def __init__(self) -> None:
                self.lock = threading.RLock()
                self.dropped: deque[int] = deque()
                self.plans: dict[Any, Any] = {}
                self.on_buffered = None
                self.writes = 0.0
                self.flush_after = NEVER
                self._buffer = bytearray()
                self._origins: list[Any] = []
                self._next = 5
                self._last = 0
                self._named = 0
                self._full = 1 << 20
                self._own = OWN
                self._oldest = 0
                self._depth = 2
                self._special = False
                self._told = False
                self.called: list[str] = []
                self.metas = MetaTable()

            def _prepare(self) -> None:
                self.called.append("prepare")

            def _follow_up(self) -> None:
                self.called.append("follow up")

            def _flush_by_time(self) -> None:
                self.called.append("flush")

            def flush(self) -> None:
                self.called.append("full")

            def _renewed(self, plan: Any) -> bytes:
                return b"\x07\x00\x00\x00"

            def _take_origin(self, number: int, op: object, frame: Any) -> Any:
                return take(number, op, frame, self._depth)

        class Array(handle):  # type: ignore[misc]
            """As those of a session, and with attributes."""

        self.known = known
        self.make: Any = Made
        self.array: Any = Array
        self.core: Any = Made()

    def new(self, core: Any = None) -> Any:
        core = self.core if core is None else core
        return self.array(core, 900, core.metas.get((2, 3), np.dtype("f4"), 0))

    def plan(self, name: str, *operands: Any, ident: int = 77) -> Any:
        spec, core = find(name), self.core
        metas = [x if isinstance(x, str) else x._meta for x in operands]
        made = define(ident, spec, metas, {}, 0, core.metas)
        core.plans[(spec, *metas)] = made
        return made

    def call(self, name: str, *operands: Any) -> Any:
        return self.known(find(name), sys._getframe(0), *operands)


@pytest.fixture(
    params=[
        pytest.param(PYTHON, id="Python"),
        pytest.param(
            IN_C, id="C", marks=pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")
        ),
    ]
)
def parts(request: pytest.FixtureRequest) -> Parts:
    return Parts(*request.param)


def test_a_record_is_appended(parts: Parts) -> None:
    core = parts.core
    told: list[int] = []
    core.on_buffered = lambda: told.append(len(core._buffer))
    assert core._append(b"abc") == 5
    assert core._append(b"", "put") == 6
    assert core._append(b"de", "put") == 7
    assert core._buffer == b"abcde"
    assert (core._next, core._last, core._named) == (8, 7, 2)
    here = test_a_record_is_appended.__code__
    assert [origin[:3] for origin in core._origins] == [(6, "put", here), (7, "put", here)]
    assert all(len(origin) == 6 for origin in core._origins)
    assert (told, core._told, core.called) == ([3], True, [])
    core._full = 6
    core._special = True
    core._append(b"f")
    assert core.called == ["prepare", "full"]
    core._full = 1 << 20
    core.flush_after = 0
    core._append(b"g")
    assert core.called == ["prepare", "full", "prepare", "flush"]
    assert told == [3]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_an_origin_is_the_program_s(parts: Parts, depth: int) -> None:
    """Frames of the package are left out."""
    parts.core._depth = depth
    inside: dict[str, Any] = {}
    source = "def put(core): return core._append(b'x', 'put')"
    exec(compile(source, f"{OWN}client/device.py", "exec"), inside)
    inside["put"](parts.core)
    (origin,) = parts.core._origins
    assert origin[:2] == (5, "put")
    assert len(origin) == 2 + 2 * depth
    if depth:
        assert origin[2] is test_an_origin_is_the_program_s.__code__
    inside["put"](parts.core)
    assert parts.core._last == 6


def test_a_record_that_can_t_be_appended_lets_go_of_the_lock(parts: Parts) -> None:
    core = parts.core

    def fails() -> None:
        raise KeyError("of the hook")

    core.on_buffered = fails
    with pytest.raises(KeyError, match="hook"):
        core._append(b"abc", "put")
    assert core._buffer == b"abc"
    free: list[bool] = []
    thread = threading.Thread(target=lambda: free.append(core.lock.acquire(timeout=5)))
    thread.start()
    thread.join()
    assert free == [True]


def test_ops_become_records(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    y = parts.array(core, 1 << 40, x._meta)
    expected, number = b"", 5
    cases = [
        ("add", (x, y), (900, 1 << 40), "x"),
        ("multiply", (x, 2.5), (900, 2.5), "f"),
        ("multiply", (x, -(1 << 63)), (900, -(1 << 63)), "i"),
        ("negative", (x,), (900,), ""),
    ]
    for ident, (name, operands, fields, kind) in enumerate(cases, 10):
        keys = [x, *([] if not kind else [y if kind == "x" else kind])]
        plan = parts.plan(name, *keys, ident=ident)
        found = parts.call(name, *operands)
        assert type(found) is parts.array
        assert (found._core, found._id, found._meta) == (core, number, plan.result)
        expected += plan.pack(plan.id, *fields)
        number += 1
        assert core._buffer == expected
        assert core._next == number
        origin = core._origins[-1]
        assert origin[:3] == (number - 1, plan, Parts.call.__code__)
        assert origin[4] is test_ops_become_records.__code__
        assert len(origin) == 6
        assert all(type(offset) is int and offset > 0 for offset in origin[3::2])
    assert core.writes == 0
    assert not core.called


def test_in_place(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    plan = parts.plan("add_", x, x)
    assert parts.call("add_", x, x) is x
    assert core._buffer == plan.pack(plan.id, 900, 900)
    assert (core.writes, core._next) == (1, 6)


def test_what_is_not_known_issues_nothing(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    assert parts.call("add", x, x) is None  # no plan yet
    for operand in (x, "f", "i"):
        parts.plan("add", x, operand)
    other = parts.new(parts.make())

    class Subclass(parts.array):  # type: ignore[misc, name-defined]
        pass

    for operand in (1 << 63, True, None, "1", np.float64(1), other, Subclass(core, 1, x._meta)):
        assert parts.call("add", x, operand) is None
    assert not core._buffer
    assert not core._origins
    assert core._next == 5


def test_handles_are_given_back_once(parts: Parts) -> None:
    core = parts.core
    x = parts.new()
    parts.plan("negative", x)
    found = parts.call("negative", x)
    del found
    assert list(core.dropped) == [5]
    x.itself = x
    del x
    gc.collect()
    assert list(core.dropped) == [5, 900]


def test_a_lent_handle_is_not_given_back(parts: Parts) -> None:
    class Lent(parts.array):  # type: ignore[misc, name-defined]
        def __del__(self) -> None:
            pass

    core = parts.core
    x = Lent(core, 1, None)
    del x
    x = Lent(core, 2, None)
    x.itself = x
    del x
    gc.collect()
    assert not core.dropped


def test_handles_that_change_places(parts: Parts) -> None:
    core = parts.core
    x, y = parts.array(core, 1, None), parts.array(core, 2, None)
    x._id, y._id = y._id, x._id
    del x
    assert list(core.dropped) == [2]
    del y
    assert list(core.dropped) == [2, 1]


def test_what_is_special_is_seen_to(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    parts.plan("negative", x)
    told: list[int] = []
    core.on_buffered = lambda: told.append(1)
    parts.call("negative", x)
    parts.call("negative", x)
    assert (told, core._told) == ([1], True)
    core._special = True
    parts.call("negative", x)
    assert core.called == ["prepare", "follow up"]
    core._special, core.flush_after = False, 0
    parts.call("negative", x)
    assert core.called[2:] == ["flush"]


def test_a_plan_that_was_forgotten_is_sent_again(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    plan = parts.plan("negative", x)
    core._oldest = 78
    parts.call("negative", x)
    assert core._buffer == b"\x07\x00\x00\x00" + plan.pack(plan.id, 900)[4:]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_as_many_frames_as_wanted(parts: Parts, depth: int) -> None:
    x, core = parts.new(), parts.core
    core._depth = depth
    parts.plan("negative", x)
    parts.call("negative", x)
    assert len(core._origins[0]) == 2 + 2 * depth


def test_a_failure_leaves_nothing_behind(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    parts.plan("negative", x)

    class Failing(parts.make):  # type: ignore[misc, name-defined]
        def _prepare(self) -> None:
            raise KeyboardInterrupt

    failing = Failing()
    failing.plans, failing.metas, failing._special = core.plans, core.metas, True
    y = parts.new(failing)
    with pytest.raises(KeyboardInterrupt):
        parts.call("negative", y)
    assert not failing._buffer
    assert not failing._origins
    assert failing._next == 5
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(failing.lock.acquire, False).result()
        pool.submit(failing.lock.release).result()


def test_finalisers_may_issue(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    plan = parts.plan("negative", x)

    class Ghost:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            parts.call("negative", x)

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(200):
            Ghost()
            parts.call("negative", x)
    finally:
        gc.set_threshold(*before)
    gc.collect()
    numbers = [origin[0] for origin in core._origins]
    assert sorted(numbers) == list(range(5, core._next))
    assert core._next == 405
    assert core._buffer == 400 * plan.pack(plan.id, 900)
    assert sorted(core.dropped) == sorted(numbers)


def test_issue_refuses_what_is_no_record(parts: Parts) -> None:
    x, core = parts.new(), parts.core
    plan = parts.plan("negative", x)
    for bad in [(plan, "text", sys._getframe()), (None, b"12345678", sys._getframe())]:
        with pytest.raises((TypeError, AttributeError)):
            core.issue(*bad)
    assert core._next == 5
    assert core.issue(plan, plan.pack(plan.id, 900), sys._getframe()) == 5
