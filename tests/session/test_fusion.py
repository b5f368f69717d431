"""Chains of elementwise ops that the server runs as one: the same bits, failures and order as one
by one, with less memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuremote.backend.fused import Chain, Fused
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.errors import GpuRemoteError, OpFailed, OutOfDeviceMemory
from gpuremote.ops.catalogue import find
from gpuremote.ops.plan import define
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Slot, Storage
from gpuremote.testing.servers import RunningServer, device_server
from tests.faults.sides import Side, slow
from tests.session.comparing import attempt

Array = npt.NDArray[Any]

MiB: Final = 1 << 20
N: Final = MiB // 8
NEVER: Final = (1 << 63) - 1


@contextmanager
def at_once(session: Any, side: Side) -> Iterator[None]:
    """What is issued inside goes out as one batch, with the handles that were dropped."""
    core = session._core
    side.do(session.synchronize())
    core.flush_after = NEVER
    yield
    core.flush()


def counters(session: Any, side: Side) -> tuple[int, int]:
    """Ops that ran, and how many of them in runs."""
    stats = side.do(session.server_stats())
    return stats["ops"], stats["ops_fused"]


def floats(seed: int, size: int = N) -> Array:
    return np.random.default_rng(seed).standard_normal(size)


def test_a_chain_is_one_run(side: Side, session: Any, device: Any) -> None:
    hosts = floats(1), floats(2)
    x, y = (side.do(device.put(host)) for host in hosts)
    before = counters(session, side)
    with at_once(session, side):
        for _ in range(200):
            x = np.sqrt(abs(x * y)) + 1.5
    found = side.do(x.get())
    a, b = hosts
    for _ in range(200):
        a = np.sqrt(np.abs(a * b)) + 1.5
    assert found.tobytes() == a.tobytes()
    after = counters(session, side)
    assert after[0] - before[0] == 800
    assert after[1] - before[1] >= 798


def test_one_round_trip(side: Side, session: Any, device: Any) -> None:
    x = side.do(device.put(floats(1)))
    side.do(session.synchronize())
    before = session.stats()
    for _ in range(500):
        x = x * 0.5
        x = x + 1
    side.do(session.synchronize())
    after = session.stats()
    assert after.ops - before.ops == 1000
    assert after.round_trips - before.round_trips == {"synchronize": 1}
    assert counters(session, side)[1] > 0


def test_what_nobody_can_name_takes_no_memory(side: Side, fresh: Any) -> None:
    """Twenty results that are needed at the same time, of which one is wanted."""
    host = floats(3)
    x = side.do(fresh.devices[0].put(host))
    with at_once(fresh, side):
        parts = [x * k for k in range(1, 12)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        del parts, part
    expected = host * 1
    for k in range(2, 12):
        expected = expected + host * k
    assert side.do(total.get()).tobytes() == expected.tobytes()
    stats = side.do(fresh.server_stats())
    assert stats["ops_fused"] == stats["ops"] == 21
    assert stats["memory_used"] == 2 * MiB
    assert stats["memory_peak"] <= 2 * MiB


def test_what_is_named_is_there(side: Side, session: Any, device: Any) -> None:
    """Each one that is kept, each that is asked for, and each that only a later op needs."""
    host = floats(4)
    x = side.do(device.put(host))
    with at_once(session, side):
        a = x + 1
        b = a * 2
        c = np.exp(b / 50)
        total = c.sum()
        d = c - b
        del b, c
    assert side.do(d.get()).tobytes() == (np.exp((host + 1) * 2 / 50) - (host + 1) * 2).tobytes()
    assert side.do(a.get()).tobytes() == (host + 1).tobytes()
    assert side.do(total.item()) == pytest.approx(np.exp((host + 1) * 2 / 50).sum())


def test_gets_in_between(side: Side, session: Any, device: Any) -> None:
    """A large one is sent from the array's own memory, which ops in place may not write to yet."""
    host = floats(5, 8 * N)
    x = side.do(device.put(host))
    y = device.zeros(8 * N)
    side.do(session.synchronize())
    for _ in range(4):
        y += x
        y *= 0.5
        half = side.do(y.get())
        y += 1
        y *= x
        expected = half + 1
        expected *= host
        assert side.do(y.get()).tobytes() == expected.tobytes()


def test_in_place(side: Side, session: Any, device: Any) -> None:
    hosts = floats(6), floats(7)
    x, y = (side.do(device.put(host)) for host in hosts)
    before = counters(session, side)
    with at_once(session, side):
        early = x + 0.25
        x *= y
        x += early
        t = x * 2
        t -= y
        t *= t
        x -= t
        y += 1
    a, b = (host.copy() for host in hosts)
    first = a + 0.25
    a *= b
    a += first
    u = a * 2
    u -= b
    u *= u
    a -= u
    b += 1
    for remote, host in ((x, a), (y, b), (early, first), (t, u)):
        assert side.do(remote.get()).tobytes() == host.tobytes()
    assert counters(session, side)[1] - before[1] >= 7


@pytest.mark.parametrize("shift", [1, 1000, 70_000])
def test_views_that_overlap(side: Side, session: Any, device: Any, shift: int) -> None:
    """Written through one and read through the other: NumPy copies first, so blocks may not do."""
    host = floats(8, 4 * N)
    for forward in (True, False):
        x = side.do(device.put(host))
        here = host.copy()
        parts = [x[shift:], x[:-shift]][:: 1 if forward else -1]
        local = [here[shift:], here[:-shift]][:: 1 if forward else -1]
        with at_once(session, side):
            for a, b in (parts,):
                c = b + 1
                a += b
                a *= 0.5
                d = b * c
                a += d
                a -= x[5]
        for a, b in (local,):
            c = b + 1
            a += b
            a *= 0.5
            d = b * c
            a += d
            a -= here[5].copy()
        assert side.do(x.get()).tobytes() == here.tobytes(), (shift, forward)


def test_one_that_fails(side: Side, session: Any, device: Any) -> None:
    """It is named, it and what depends on it have no values, and everything else has."""
    host = np.arange(4 * N, dtype=np.int64) % 7
    x = side.do(device.put(host))
    before = counters(session, side)
    with at_once(session, side):
        good = (x + 1) * 3
        minus = x - 5
        bad = good**minus
        worse = (bad + 1) * 2
        other = good - minus
    with pytest.raises(OpFailed, match="negative integer") as caught:
        side.do(worse.get())
    assert caught.value.op == "power"
    assert "test_fusion.py" in (caught.value.origin or "")
    with pytest.raises(OpFailed):
        side.do(bad.get())
    assert side.do(good.get()).tobytes() == ((host + 1) * 3).tobytes()
    assert side.do(minus.get()).tobytes() == (host - 5).tobytes()
    assert side.do(other.get()).tobytes() == ((host + 1) * 3 - (host - 5)).tobytes()
    assert counters(session, side)[0] - before[0] == 5  # what depends on it did not run


def test_one_that_fails_among_ops_in_place(side: Side, session: Any, device: Any) -> None:
    host = np.arange(4 * N, dtype=np.int64) % 7
    x = side.do(device.put(host))
    y = side.do(device.put(host))
    with at_once(session, side):
        y += x
        y *= x
        bad = x ** (x - 5)
        y -= x
        y *= x
        x += bad
    expected = host.copy()
    for other in (np.add, np.multiply, np.subtract, np.multiply):
        other(expected, host, out=expected)
    assert side.do(y.get()).tobytes() == expected.tobytes()
    with pytest.raises(OpFailed):
        side.do(x.get())


def test_operands_that_failed(side: Side, session: Any, device: Any) -> None:
    x = side.do(device.put(np.arange(4 * N)))
    with at_once(session, side):
        bad = x ** (x - 5)
        for _ in range(5):
            bad = bad + x
        good = x
        for _ in range(5):
            good = good + x
    with pytest.raises(OpFailed):
        side.do(bad.get())
    assert side.do(good[-1].item()) == 6 * (4 * N - 1)


def test_uploads_that_come_later(side: Side, session: Any, device: Any) -> None:
    """An array that is still on its way, or made by another stream, ends a run."""
    host = floats(9, 4 * N)
    x = side.do(device.put(host))
    y = side.do(device.put(host))  # over shared memory the bytes come after the ops
    z = x + 1
    z = z * y
    z = z - x
    assert side.do(z.get()).tobytes() == ((host + 1) * host - host).tobytes()
    stream = device.stream()
    with stream:
        late = slow(device, 2_000_000)[: 4 * N] * 0 + 3
    z = x + 1
    z = z * late
    z = z - x
    assert side.do(z.get()).tobytes() == ((host + 1) * 3.0 - host).tobytes()


def test_two_streams(side: Side, session: Any, device: Any) -> None:
    """Chains in both; each uses what the other made."""
    host = floats(10, 2 * N)
    first, second = device.stream(), device.stream()
    x = side.do(device.put(host))
    side.do(session.synchronize())
    before = counters(session, side)
    for _ in range(20):
        with at_once(session, side):
            with first:
                a = x * 0.5
                a = a + 1
                a = a * a
                a = a + x
            done = first.record()
            second.wait(done)
            with second:
                b = a - 1
                b = b * 2
                b = b + a
                b = b * 0.25
            with first:
                a = a * 3
                a = a + 1
        u = host * 0.5 + 1
        u = u * u + host
        v = ((u - 1) * 2 + u) * 0.25
        u = u * 3 + 1
        side.do(session.synchronize())
        assert side.do(a.get()).tobytes() == u.tobytes()
        assert side.do(b.get()).tobytes() == v.tobytes()
    assert counters(session, side)[1] > before[1]


@pytest.fixture
def tight(side: Side, server: RunningServer) -> Iterator[Any]:
    with side.session(f"{server.url}?memory=4MiB") as opened:
        yield opened


def test_a_limit_that_one_by_one_would_not_fit(side: Side, tight: Any) -> None:
    x = side.do(tight.devices[0].put(floats(11)))
    with at_once(tight, side):
        parts = [x * k for k in range(1, 9)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        del parts, part
    expected = floats(11) * 1
    for k in range(2, 9):
        expected = expected + floats(11) * k
    assert side.do(total.get()).tobytes() == expected.tobytes()


def test_a_limit_that_is_too_small(side: Side, tight: Any) -> None:
    """What fits is there, what does not fit is named, and its memory is free again."""
    host = floats(12)
    x = side.do(tight.devices[0].put(host))
    held = side.do(tight.server_stats())["memory_used"]
    with at_once(tight, side):
        kept = [x]
        for _ in range(5):
            kept.append(kept[-1] * 0.5 + 1)
        last = kept[-1] + 1
    expected = host
    for k in (1, 2):
        expected = expected * 0.5 + 1
        assert side.do(kept[k].get()).tobytes() == expected.tobytes()
    with pytest.raises(OutOfDeviceMemory) as caught:
        side.do(last.get())
    assert caught.value.op in ("add", "multiply")
    del kept, last, caught
    side.do(tight.synchronize())
    assert side.do(tight.server_stats())["memory_used"] == held


def test_memory_comes_back_as_the_ops_go(side: Side, tight: Any) -> None:
    """Each op's operand makes room for the next result: together they would not fit."""
    host = floats(13)
    a, b = (side.do(tight.devices[0].put(host)) for _ in range(2))
    with at_once(tight, side):
        c = a + b
        d = c * b
        del b
        e = d + c
        del d
        f = e * 2
        del e
        g = f + a
        del a
    assert side.do(c.get()).tobytes() == (host + host).tobytes()
    wanted = ((host + host) * host + (host + host)) * 2
    assert side.do(f.get()).tobytes() == wanted.tobytes()
    assert side.do(g.get()).tobytes() == (wanted + host).tobytes()


class Failing(NumpyBackend):
    """Its programs fail half way, for no reason that an op would have."""

    def fuse(self, chain: Chain) -> Fused | None:
        def fail(inputs: Sequence[Any], results: Sequence[Any]) -> None:
            raise MemoryError("nothing left")

        return fail


@pytest.mark.parametrize("inplace", [False, True])
def test_a_program_that_fails(inplace: bool) -> None:
    """Its ops run one by one after all; not where some have written to what was there before."""
    session = WorkerSession(Failing(), 1 << 30)
    host = floats(15)
    meta = session.metas.get(host.shape, host.dtype, 0)
    name = "add_" if inplace else "add"
    plan = define(64, find(name), [meta, meta], {}, 0, session.metas)
    op = session.fusion.executable(plan, session.backend.compile(plan))
    x = Slot()
    x.fill(host.copy(), meta, Storage(session.quota, meta.nbytes))
    value, made = x, []
    for number in range(1, 4):
        outs = [] if inplace else [Slot()]
        session.default.queue.append((number, op.run, (session, op, [value, value], outs)))
        value = x if inplace else outs[0]
        made += outs
    assert session.default.run_ready()
    assert session.ops_executed == 3
    if inplace:
        assert x.failure is not None
        assert (x.failure.number, x.failure.op) == (1, "add_")
    else:
        for k, slot in enumerate(made):
            assert slot.value.tobytes() == (host * 2 ** (k + 1)).tobytes()


# -- random chains ------------------------------------------------------------------------------

BINARY: Final = [np.add, np.subtract, np.multiply, np.true_divide, np.maximum, np.hypot, np.power]
UNARY: Final = [np.negative, np.sqrt, np.exp, np.sin, np.abs, np.square, np.log1p]
SCALARS: Final[list[Any]] = [2, -3, 0.5, np.float32(1.25), True]

ACTIONS: Final = [
    *(["binary"] * 5),
    *(["unary"] * 4),
    *(["scalar"] * 4),
    *(["in place"] * 2),
    *(["in place scalar"] * 2),
    "where",
    "clip",
    "astype",
    "round",
    "part",
    "drop",
    "drop",
    "drop",
    "get",
    "flush",
]
NUMBERS = st.integers(0, 99)
FAILED: Final = object()


class Both:
    """The same arrays on the device and here; a failed op's results are FAILED here."""

    def __init__(self, side: Side, session: Any, hosts: list[Array]) -> None:
        self.side, self.session = side, session
        self.here: list[Any] = [host.copy() for host in hosts]
        self.there = [side.do(session.devices[0].put(host)) for host in hosts]
        side.do(session.synchronize())
        session._core.flush_after = NEVER

    def make(self, function: Any, *places: int, extra: tuple[Any, ...] = ()) -> None:
        remote = [self.there[k] for k in places]
        local = [self.here[k] for k in places]
        shapes = [np.empty(x.shape, x.dtype) for x in remote]
        if any(x.nbytes > 4 * MiB for x in shapes):
            return
        try:
            made = function(*remote, *extra)
        except (GpuRemoteError, TypeError):
            return  # refused before anything is sent
        if any(x is FAILED for x in local):
            self.here.append(FAILED)
        else:
            found, error = attempt(lambda: function(*local, *extra))
            self.here.append(found if error is None else FAILED)
        self.there.append(made)

    def change(self, function: Any, k: int, *others: Any) -> None:
        """In place; views of what can no longer be relied on are no test."""
        target = self.here[k]
        remote = [self.there[o] if type(o) is Place else o for o in others]
        local = [self.here[o] if type(o) is Place else o for o in others]
        if target is FAILED or any(x is FAILED for x in local):
            return
        kept = target.copy()
        _, error = attempt(lambda: function(target, *local, out=target))
        if error is not None:
            target[...] = kept
            return
        inplace = {np.add: "__iadd__", np.multiply: "__imul__", np.subtract: "__isub__"}[function]
        getattr(self.there[k], inplace)(*remote)

    def step(self, action: str, a: int, b: int, c: int) -> None:
        count = len(self.here)
        i, j = Place(a % count), Place(b % count)
        if self.there[i].shape != self.there[j].shape:
            j = i
        match action:
            case "binary":
                self.make(BINARY[c % len(BINARY)], i, j)
            case "unary":
                self.make(UNARY[c % len(UNARY)], i)
            case "scalar":
                scalar = SCALARS[b % len(SCALARS)]
                function = BINARY[c % len(BINARY)]
                if a % 3:
                    self.make(function, i, extra=(scalar,))
                else:
                    self.make(lambda x: function(scalar, x), i)
            case "in place":
                self.change((np.add, np.multiply)[c % 2], i, j)
            case "in place scalar":
                self.change((np.subtract, np.multiply)[c % 2], i, SCALARS[b % 3])
            case "where":
                self.make(lambda x, y: np.where(x > 0, x, y), i, j)
            case "clip":
                self.make(lambda x: np.clip(x, 1, 3), i)
            case "astype":
                self.make(lambda x: x.astype(("f4", "f8", "c8")[c % 3]), i)
            case "round":
                self.make(lambda x: np.round(x, 1), i)
            case "part":
                cut = (slice(1, None), slice(None, -1), slice(None, None, 2))[c % 3]
                self.make(lambda x: x[cut], i)
            case "drop" if count > 2:
                del self.here[i], self.there[i]
            case "get":
                self.check(i)
            case "flush":
                self.session._core.flush()

    def check(self, k: int) -> None:
        if self.here[k] is FAILED:
            with pytest.raises(OpFailed):
                self.side.do(self.there[k].get())
            return
        found = self.side.do(self.there[k].get())
        wanted = np.ascontiguousarray(self.here[k])
        other = np.flatnonzero(
            (found.view("u1") != wanted.view("u1")).reshape(-1, wanted.itemsize).any(1)
        )
        # Not the bytes themselves: of what differs in a MiB, pytest makes a text for minutes.
        assert not other.size, f"{other.size} {wanted.dtype}, from {other[0]} on"


class Place(int):
    """Of an array."""


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtypes=st.lists(st.sampled_from(["f4", "f8", "i4", "i8", "c8", "u1"]), min_size=2, max_size=3),
    size=st.sampled_from([N, N + 1, 3 * N // 2 + 17]),
    steps=st.lists(
        st.tuples(st.sampled_from(ACTIONS), NUMBERS, NUMBERS, NUMBERS), min_size=4, max_size=40
    ),
)
def test_random_chains(
    side: Side,
    session: Any,
    dtypes: list[str],
    size: int,
    steps: list[tuple[str, int, int, int]],
) -> None:
    chance = np.random.default_rng(len(steps))
    hosts = [(chance.standard_normal(size) * 5).astype(dtype) for dtype in dtypes]
    both = Both(side, session, hosts)
    try:
        with np.errstate(all="ignore"):
            for step in steps:
                both.step(*step)
            for k in range(len(both.here)):
                both.check(k)
    finally:
        session._core.flush()
        while True:
            try:
                side.do(session.synchronize())
                break
            except GpuRemoteError:
                pass  # what nobody asked for


def test_it_can_be_switched_off(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUREMOTE_FUSION", "0")
    with device_server("--warm", "1") as server, side.session(server.url) as session:
        x = side.do(session.devices[0].put(floats(14)))
        for _ in range(50):
            x = x * 0.5
        assert side.do(x[0].item()) == floats(14)[0] * 0.5**50
        stats = side.do(session.server_stats())
        assert stats["ops_fused"] == 0
        assert stats["ops"] == 51
