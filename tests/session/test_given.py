"""Memory that both ends have: who may write to it, and for how long."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpuremote.client.blocking_driver import BlockingDriver
from gpuremote.client.uploading import STAGED
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import BlockingSide, Side

SIZE = 300_000


@pytest.fixture
def shared(side: Side, server: RunningServer) -> Iterator[Any]:
    with side.session(f"{server.url}?transport=shm") as session:
        yield session


def test_an_array_that_is_put_whole_is_given_away(side: Side, shared: Any) -> None:
    device = shared.devices[0]
    for shape in ((SIZE,), (SIZE // 10, 10), (10, 10, SIZE // 100)):
        local = shared.empty(shape, np.float32)
        local[:] = 1
        remote = side.do(device.put(local))
        assert not local.flags.writeable
        remote += 1
        side.do(shared.synchronize())
        assert local.min() == local.max() == 2  # it is the device's own memory
    assert shared._core.peer.connection.stats.extra["copied_in"] == 0


def test_other_ways_to_the_same_memory_are_copied(side: Side, shared: Any) -> None:
    """Whoever could still write to it must not reach the device's array."""
    device = shared.devices[0]
    local = shared.empty(SIZE, np.float32)
    local[:] = 1
    remotes = [
        side.do(device.put(local.view())),
        side.do(device.put(local[:])),
        side.do(device.put(local.reshape(-1, 10))),
        *side.do(device.put_many([local, local])),
    ]
    assert local.flags.writeable
    local[:] = 7
    remotes[0] += 1
    side.do(shared.synchronize())
    assert [side.do(remote.sum().item()) / SIZE for remote in remotes] == [2, 1, 1, 1, 1]


def test_many_uploads_without_a_wait(side: Side, shared: Any) -> None:
    """More than may be on their way at a time."""
    device = shared.devices[0]
    host = np.ones(20_000, np.uint8)
    last: Any = None
    for _ in range(1100):
        last = side.do(device.put(host))
    assert side.do(last.sum().item()) == 20_000


def test_the_server_is_told_of_several_uploads_at_a_time(
    side: Side, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How far the program gets before what it left is sent for it depends on the machine.
    monkeypatch.setattr(BlockingDriver, "send_rest", lambda _: False)
    device = shared.devices[0]
    side.do(shared.synchronize())
    host = np.arange(20_000, dtype=np.int64)
    before = shared.stats()
    remotes = [side.do(device.put(host * k)) for k in range(STAGED)]
    told = shared.stats().messages_sent - before.messages_sent
    side.do(shared.synchronize())
    after = shared.stats()
    assert told <= (0 if isinstance(side, BlockingSide) else 2 * STAGED)
    assert after.payload_sent - before.payload_sent == STAGED * host.nbytes
    assert [int(side.do(remote[1].item())) for remote in remotes] == list(range(STAGED))
    if isinstance(side, BlockingSide):
        # The records, what says where the bytes are, and an acknowledgement of what has come.
        assert after.messages_sent - before.messages_sent <= 3
        kept = [side.do(device.put(host)) for _ in range(4 * STAGED)]
        assert shared.stats().messages_sent - after.messages_sent >= 2 * 3
        del kept


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_one_that_does_not_fit_leaves_the_others(
    side: Side, server: RunningServer, transport: str
) -> None:
    """Uploads of which the server is told at a time have nothing to do with one another; also
    where that comes over another transport, as the first one broke meanwhile."""
    query = f"transport={transport}&memory={4 << 20}"
    with side.session(f"{server.url}?{query}") as session:
        device, core = session.devices[0], session._core
        hosts = [np.full(size, k, np.uint8) for k, size in enumerate((SIZE, 5 << 20, SIZE), 1)]
        metas = [core.metas.get(host.shape, host.dtype, 0) for host in hosts]
        numbers = [
            core.put_staged(meta, host.data) for meta, host in zip(metas, hosts, strict=True)
        ]
        arrays = [device._array_type(core, *of) for of in zip(numbers, metas, strict=True)]
        assert side.do(arrays[0].sum().item()) == SIZE
        assert side.do(arrays[2].sum().item()) == 3 * SIZE
        with pytest.raises(OutOfDeviceMemory):
            side.do(arrays[1].get())
        del arrays
        with contextlib.suppress(OutOfDeviceMemory):
            side.do(session.synchronize())


def test_memory_that_nobody_waits_for_is_free_at_once(side: Side, server: RunningServer) -> None:
    """Of uploads that the program drops only the latest counts, told or not."""
    with side.session(f"{server.url}?transport=shm&memory={4 << 20}") as session:
        device = session.devices[0]
        host = np.ones(1 << 20, np.uint8)
        kept: Any = None
        for k in range(100):
            host[0] = k
            kept = side.do(device.put(host))
        assert side.do(kept[0].item()) == 99
        del kept
        total = device.zeros((), np.int64)
        for _ in range(20):  # with an op that needs it
            array = side.do(device.put(host))
            total = total + array[0]
            del array
            side.do(session.synchronize())
        assert side.do(total.item()) == 20 * 99


def test_bytes_that_nobody_wants_take_no_memory(side: Side, server: RunningServer) -> None:
    """Between others they have to be received; where that takes too much, none of them is."""
    with side.session(f"{server.url}?transport=tcp&memory={8 << 20}") as session:
        device, core = session.devices[0], session._core
        large = np.zeros(80 << 20, np.uint8)
        hosts = [np.ones(SIZE, np.uint8), large]
        metas = [core.metas.get(host.shape, host.dtype, 0) for host in hosts]
        arrays = [
            device._array_type(core, core.put_staged(meta, host.data), meta)
            for meta, host in zip(metas, hosts, strict=True)
        ]
        for array in arrays:
            with pytest.raises(OutOfDeviceMemory):
                side.do(array.get())
        del arrays, array
        with contextlib.suppress(OutOfDeviceMemory):
            side.do(session.synchronize())
        assert side.do(side.do(device.put(hosts[0])).sum().item()) == SIZE


def test_an_upload_behind_a_batch_that_is_nearly_full(side: Side, shared: Any) -> None:
    device = shared.devices[0]
    small, large = np.ones(1000, np.uint8), np.full(SIZE, 7, np.uint8)
    for count in range(40, 50):
        kept = [side.do(device.put(small)) for _ in range(count)]
        remote = side.do(device.put(large))
        assert side.do(remote.get(timeout=10)).sum() == 7 * SIZE
        del kept, remote


def test_an_upload_that_nothing_follows_is_told_of_at_the_end(
    side: Side, server: RunningServer
) -> None:
    with side.session(f"{server.url}?transport=shm") as session:
        kept = side.do(session.devices[0].put(np.ones(SIZE)))
        core = session._core
    assert core.snapshot().payload_sent == 8 * SIZE
    del kept


def test_what_was_put_comes_back_as_it_was(side: Side, shared: Any) -> None:
    """It is taken from where it lies, and no op writes there before all of it has been."""
    device = shared.devices[0]
    for size in (SIZE, 90 << 20):
        host = np.arange(size, dtype=np.uint8)
        remote = side.do(device.put(host))
        part = remote[7:-7]
        for _ in range(3):
            kept = side.do(remote.get())
            some = side.do(part.get())
            remote += 1
            assert np.array_equal(kept, host)
            assert np.array_equal(some, host[7:-7])
            host += 1
        assert np.array_equal(side.do(remote.get(copy=False)), host)
        del remote, part


def test_a_child_gives_nothing_back(side: Side, shared: Any) -> None:
    """After a fork the parent still has what it had."""
    device = shared.devices[0]
    view = side.do(device.full(SIZE, 5, "u1").get(copy=False))
    kept = view[:]
    child = os.fork()
    if not child:
        try:
            del view, kept
            gc.collect()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    for k in range(20):
        side.do(device.full(SIZE, k + 10, "u1").get(copy=False))
    assert view.min() == view.max() == 5


def test_arrays_outlive_the_session(side: Side, server: RunningServer) -> None:
    with side.session(f"{server.url}?transport=shm") as session:
        local = session.empty(SIZE, np.float32)
        local[:] = 3
        view = side.do((side.do(session.devices[0].put(local)) * 2).get(copy=False))
    assert local.max() == 3
    assert view.min() == view.max() == 6
    assert not view.flags.writeable


def test_one_from_empty_that_is_no_longer_itself(side: Side, shared: Any) -> None:
    """What its memory is noted for must not be given away for another array, nor twice."""
    device = shared.devices[0]
    stats = shared._core.peer.connection.stats.extra
    reshaped = shared.empty(SIZE, np.float32)
    reshaped[:] = 1
    reshaped.shape = (10, SIZE // 10)
    assert side.do(device.put(reshaped)).shape == (10, SIZE // 10)
    twice = shared.empty(SIZE, np.float32)
    twice[:] = 2
    first = side.do(device.put(twice))
    assert stats["copied_in"] == 0
    second = side.do(device.put(twice))
    first += 1
    seen = shared.empty(SIZE, np.float32)
    seen[:] = 3
    view = seen[:5]
    third = side.do(device.put(seen))
    view[:] = 0
    found = [float(side.do(one.max().item())) for one in (first, second, third)]
    assert found == [3, 2, 3]
    assert float(side.do(third.min().item())) == 3
    assert seen.flags.writeable
    others = [shared.empty(SIZE, np.uint8) for _ in range(3)]
    assert len(shared._core.made) == 3
    del others
    assert not shared._core.made
