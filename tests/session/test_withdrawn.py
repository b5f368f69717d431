"""Uploads through shared memory that are dropped before anything uses them: the server need not be
told where they lie, and the memory of one is used for the next."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client.issuing import NEVER
from gpuremote.client.uploading import STAGED
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import BlockingSide, Side

SIZE = 100_000
COUNT = 6 * STAGED


@pytest.fixture
def shared(side: Side, server: RunningServer) -> Iterator[Any]:
    with side.session(f"{server.url}?transport=shm") as session:
        yield session


@pytest.fixture
def device(side: Side, shared: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a session that has seen such an array, and sends nothing by itself."""
    device = shared.devices[0]
    kept = [side.do(device.put(np.zeros(SIZE, np.int32))) for _ in range(2 * STAGED)]
    side.do(shared.synchronize())
    del kept
    side.do(shared.synchronize())
    if isinstance(side, BlockingSide):
        monkeypatch.setattr(shared._core.driver, "send_rest", lambda: False)
    return device


def others(side: Side, device: Any) -> None:
    """Uploads that would come to lie where others did, if they may."""
    kept: Any = None
    for k in range(STAGED):
        kept = side.do(device.put(np.full(SIZE, 1000 + k, np.int32)))
    del kept


def test_the_server_is_told_of_the_last_ones(side: Side, shared: Any, device: Any) -> None:
    before, arena = shared.stats(), shared._core.peer.connection.describe()["arena_bytes"]
    kept: Any = None
    for k in range(COUNT):
        kept = side.do(device.put(np.full(SIZE, k, np.int32)))
    assert int(side.do(kept.max().item())) == int(side.do(kept.min().item())) == COUNT - 1
    after = shared.stats()
    withdrawn = after.withdrawn - before.withdrawn
    if isinstance(side, BlockingSide):  # in a loop batches go out in between, with what is there
        assert withdrawn == COUNT - 2  # the op came before the last one but one was given back
        assert shared._core.peer.connection.describe()["arena_bytes"] == arena
    assert after.payload_sent - before.payload_sent == (COUNT - withdrawn) * 4 * SIZE
    del kept
    side.do(shared.synchronize())
    assert shared.stats().freed - before.freed >= COUNT
    assert side.do(shared.server_stats())["memory_used"] == 0


def test_those_that_are_kept_are_not_touched(side: Side, shared: Any, device: Any) -> None:
    kept = []
    for k in range(COUNT):
        array = side.do(device.put(np.full(SIZE, k, np.int32)))
        if k % 3 == 0:
            kept.append((k, array))
        del array
    assert all(int(side.do(one.sum().item())) == k * SIZE for k, one in kept)


def _sum(array: Any, _: Any, __: Any) -> Any:
    return array.sum()


def _write(array: Any, _: Any, made: Any) -> Any:
    made += array
    return made.sum()


def _copy(array: Any, session: Any, _: Any) -> Any:
    return array.copy_to(session.devices[0]).sum()


def _view(array: Any, _: Any, __: Any) -> Any:
    return array[: SIZE // 2].sum() * 2


@pytest.mark.parametrize("use", [_sum, _write, _copy, _view])
def test_what_an_op_uses_stays(
    side: Side, shared: Any, device: Any, use: Callable[[Any, Any, Any], Any]
) -> None:
    made = device.zeros(SIZE, np.int32)
    results = []
    for k in range(1, STAGED):
        shared._core.flush_after = NEVER  # nothing of what follows goes out because it is time
        array = side.do(device.put(np.full(SIZE, k, np.int32)))
        result = use(array, shared, made)
        results.append(side.do(result) if hasattr(result, "__await__") else result)
        del array, result
        others(side, device)
    expected = [k * SIZE for k in range(1, STAGED)]
    if use is _write:
        expected = list(np.cumsum(expected))
    assert [int(side.do(result.item())) for result in results] == expected


@pytest.mark.parametrize("copied", [False, True])
def test_an_op_in_the_middle_of_an_upload(
    side: Side, shared: Any, device: Any, copied: bool
) -> None:
    """As a finaliser issues one, which the collector calls wherever it likes."""
    core = shared._core
    told, results = core.on_buffered, []
    kept = [side.do(device.put(np.full(SIZE, 7, np.int32)))]

    def issue() -> None:
        core.on_buffered = told
        array = kept.pop()
        results.append(array.copy_to(device) if copied else array + 0)

    core._told, core.on_buffered = False, issue
    second = side.do(device.put(np.full(SIZE, 8, np.int32)))
    assert len(results) == 1
    others(side, device)
    result = side.do(results[0]) if hasattr(results[0], "__await__") else results[0]
    assert int(side.do(result.max().item())) == 7
    assert int(side.do(second.max().item())) == 8


def test_one_that_was_used_before_the_next_upload(side: Side, shared: Any, device: Any) -> None:
    core = shared._core
    core.flush_after = NEVER
    first = side.do(device.put(np.full(SIZE, 7, np.int32)))
    result = first.max()
    core.flush_after = NEVER
    second = side.do(device.put(np.full(SIZE, 8, np.int32)))
    del first
    others(side, device)
    assert int(side.do(result.item())) == 7
    assert int(side.do(second.max().item())) == 8


def test_the_record_of_one_that_is_withdrawn_was_not_sent(
    side: Side, shared: Any, device: Any
) -> None:
    """Where it was, a server over TCP may be waiting for its bytes."""
    core = shared._core
    before, core.flush_after = shared.stats().withdrawn, NEVER
    array = side.do(device.put(np.full(SIZE, 7, np.int32)))
    staged, core._staged = core._staged, []
    core.flush()
    core._staged, core.flush_after = staged, NEVER
    del array
    last = side.do(device.put(np.full(SIZE, 8, np.int32)))
    assert int(side.do(last.max().item())) == 8
    assert shared.stats().withdrawn == before


@pytest.mark.parametrize("nbytes", [1 << 20, 64 << 20])
def test_large_ones_go_round_two_blocks(server: RunningServer, nbytes: int) -> None:
    """What sends what a program has left (client.tail) leaves it alone while it uploads."""
    with gpuremote.connect_sync(f"{server.url}?transport=shm") as session:
        device, host = session.devices[0], np.zeros(nbytes, np.uint8)
        kept: Any = None
        for k in range(24):
            host[0] = k
            kept = device.put(host)
        assert session.stats().withdrawn >= 12
        connection: Any = session._core.peer.connection
        arena = connection.describe()["arena_bytes"]
        assert arena <= 4 * nbytes + (8 << 20)
        assert int(kept[0].item()) == 23


def test_a_record_of_another_kind_keeps_what_was_there(
    side: Side, shared: Any, device: Any
) -> None:
    """Which arrays an op uses is not looked up: whatever was uploaded before it stays."""
    before, shared._core.flush_after = shared.stats().withdrawn, NEVER
    array = side.do(device.put(np.ones(SIZE, np.int32)))
    zeros = device.zeros(3)
    del array
    last = side.do(device.put(np.ones(SIZE, np.int32)))
    assert int(side.do(last.sum().item())) == SIZE
    assert shared.stats().withdrawn == before
    del zeros


def test_one_for_which_there_is_no_room_is_told_all_the_same(
    side: Side, server: RunningServer
) -> None:
    with side.session(f"{server.url}?transport=shm&memory={4 << 20}") as session:
        device = session.devices[0]
        for nbytes in (1 << 20, 5 << 20, 1 << 20):
            side.do(device.put(np.ones(nbytes, np.uint8)))
        with pytest.raises(OutOfDeviceMemory):
            side.do(session.synchronize())
        assert side.do(session.server_stats())["memory_used"] == 0


def test_memory_that_the_program_sees_is_not_used_again(
    side: Side, shared: Any, device: Any
) -> None:
    """Of ``session.empty``: given away, and read-only, but there as long as the program has it."""
    made = []
    for k in range(STAGED):
        local = shared.empty(SIZE, np.int32)
        local[:] = k
        side.do(device.put(local))
        others(side, device)
        made.append(local)
    assert [(int(one.min()), int(one.max())) for one in made] == [(k, k) for k in range(STAGED)]


def test_the_connection_breaks_in_between(side: Side, shared: Any, device: Any) -> None:
    kept = []
    for k in range(4 * STAGED):
        array = side.do(device.put(np.full(SIZE, k, np.int32)))
        if k % STAGED == 3:
            kept.append((k, array))
        if k % STAGED == 5:
            shared._core.peer.connection.abort()
        del array
    assert all(int(side.do(one.max().item())) == k for k, one in kept)
    side.do(shared.synchronize())
    del kept
    side.do(shared.synchronize())
    assert side.do(shared.server_stats())["memory_used"] == 0


def test_while_somebody_looks_at_what_is_sent_nothing_is_withdrawn(server: RunningServer) -> None:
    with gpuremote.connect_sync(f"{server.url}?transport=shm") as session:
        device, core = session.devices[0], session._core
        host = np.ones(SIZE, np.int32)
        device.put(host)
        session.synchronize()
        before = session.stats().withdrawn
        core.watch(lambda _: None, set())
        for _ in range(STAGED):
            device.put(host)
        session.synchronize()
        core.watch(None, None)
        assert session.stats().withdrawn == before


class Finaliser:
    """Garbage that only the collector finds, and that uses an array then."""

    def __init__(self, array: Any, results: list[Any]) -> None:
        self.array, self.results, self.me = array, results, self

    def __del__(self) -> None:
        device = self.array.device
        self.results.append(self.array.copy_to(device))


def test_the_collector_comes_anywhere_in_an_upload(server: RunningServer) -> None:
    with gpuremote.connect_sync(f"{server.url}?transport=shm") as session:
        device, core = session.devices[0], session._core
        host = np.full(SIZE, 8, np.int32)
        for _ in range(2):
            device.put(host)
        session.synchronize()
        before = gc.get_threshold()
        for threshold in range(1, 60):
            results: list[Any] = []
            gc.collect()
            gc.disable()
            core.flush_after = NEVER
            Finaliser(device.put(np.full(SIZE, 7, np.int32)), results)
            try:
                gc.set_threshold(threshold, 1000, 1000)
                gc.enable()
                second = device.put(host)
                gc.disable()
                gc.collect()
            finally:
                gc.set_threshold(*before)
                gc.enable()
            kept: Any = None
            for k in range(STAGED):
                kept = device.put(np.full(SIZE, 1000 + k, np.int32))
            assert [int(one.max().item()) for one in results] == [7]
            assert int(second.max().item()) == 8
            del kept, second
