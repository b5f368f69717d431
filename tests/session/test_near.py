"""Arrays that lie in memory of this process: read from there, and never too early or too late."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client.core import MAX_NEAR
from gpuremote.client.stats import SessionStats
from gpuremote.errors import OutOfDeviceMemory, SessionClosed
from gpuremote.testing.servers import RunningServer

SIZE = 100_000
"""Elements of an array that does not travel inside a message."""


@pytest.fixture
def shared(server: RunningServer) -> Iterator[Any]:
    with gpuremote.connect_sync(f"{server.url}?transport=shm") as session:
        yield session


def asked(session: Any) -> int:
    stats: SessionStats = session.stats()
    return stats.round_trips["get"]


def test_the_server_is_asked_once(shared: Any) -> None:
    device = shared.devices[0]
    host = np.arange(SIZE)
    array, local = device.put(host), shared.empty(SIZE, np.int64)
    local[:] = host
    given = device.put(local)
    for one in (array, given):
        before = asked(shared)
        for _ in range(5):
            assert np.array_equal(one.get(), host)
        other = bytearray(host.nbytes)
        one.get(out=other)
        assert other == host.tobytes()
        assert asked(shared) == before + 1
    # What ops made lies elsewhere.
    made, before = array + 1, asked(shared)
    for _ in range(3):
        assert np.array_equal(made.get(), host + 1)
    assert asked(shared) == before + 3


def test_it_waits_for_what_writes_to_it(shared: Any) -> None:
    device = shared.devices[0]
    array = device.put(np.zeros(SIZE))
    other = device.put(np.zeros(SIZE))
    part = array[10:20]
    assert array.get().sum() == other.get().sum() == 0
    for turn in range(1, 60):
        array += 1
        assert array.get().min() == turn
        assert array.get().max() == turn
    array[5] = -1
    assert array.get()[5] == -1
    part *= 0
    expected = array.get()
    before = asked(shared)
    assert np.array_equal(array.get(), expected)
    assert asked(shared) == before
    assert other.get().max() == 0


def test_it_is_not_held_up_by_what_only_reads_it(shared: Any) -> None:
    """A get does not wait for ops that were issued before it and change nothing."""
    device = shared.devices[0]
    host = np.arange(float(SIZE))
    array = device.put(host)
    array.get()
    result = array
    for _ in range(50):
        result = result * 1.0 + array
    before = asked(shared)
    assert np.array_equal(array.get(), host)
    assert asked(shared) == before
    assert np.array_equal(result.get(), host * 51)


@pytest.mark.parametrize("seed", range(6))
def test_as_numpy_whatever_happens(shared: Any, seed: int) -> None:
    """Arrays that come and go, so that their memory is used again, change and are asked for."""
    chance = random.Random(seed)
    device = shared.devices[0]
    pairs: list[tuple[Any, Any]] = []
    for step in range(250):
        what = chance.random()
        if what < 0.2 or not pairs:
            host = np.full(chance.choice((SIZE, SIZE, 2 * SIZE)), float(step))
            if chance.random() < 0.3:
                local = shared.empty(host.shape, host.dtype)
                local[:] = host
                pairs.append((device.put(local), host))
            else:
                pairs.append((device.put(host), host))
        elif what < 0.3:
            del pairs[chance.randrange(len(pairs))]
        elif what < 0.4:
            array, host = chance.choice(pairs)
            at = chance.randrange(SIZE)
            array[at] = step
            host[at] = step
        elif what < 0.5:
            k = chance.randrange(len(pairs))
            array, host = pairs[k]
            array += 1
            pairs[k] = (array, host + 1)
        elif what < 0.6:
            array, host = chance.choice(pairs)
            pairs.append((array + step, host + step))
        else:
            array, host = chance.choice(pairs)
            assert np.array_equal(array.get(), host), (seed, step)
    for array, host in pairs:
        assert np.array_equal(array.get(), host)
        assert np.array_equal(array.get(), host)


def test_over_another_connection(shared: Any) -> None:
    """The memory of the one before is not the array's any more, as far as anybody knows."""
    device = shared.devices[0]
    host = np.arange(SIZE)
    array = device.put(host)
    array.get()
    core = shared._core
    place, _ = core.near_arrays[array._id]
    core.peer.connection.abort()
    before = asked(shared)
    assert np.array_equal(array.get(), host)
    assert asked(shared) == before + 1
    others = [device.put(np.full(SIZE, k)) for k in range(20)]
    assert [int(other.get()[0]) for other in others] == list(range(20))
    core.note_near(array._id, place, core.writes)  # by a thread that was slow
    assert np.array_equal(array.get(), host)
    array += 1
    assert np.array_equal(array.get(), host + 1)


def test_what_is_known_has_a_bound(shared: Any) -> None:
    device = shared.devices[0]
    host = np.zeros(SIZE, np.uint8)
    arrays = []
    for k in range(MAX_NEAR + 20):
        host[0] = k % 251
        arrays.append(device.put(host))
        arrays[-1].get()
    assert len(shared._core.near_arrays) <= MAX_NEAR
    assert [int(array.get()[0]) for array in arrays] == [k % 251 for k in range(len(arrays))]


def test_what_failed_and_what_is_over(server: RunningServer) -> None:
    with gpuremote.connect_sync(f"{server.url}?transport=shm&memory={4 << 20}") as session:
        device = session.devices[0]
        array, refused = device.put(np.ones(SIZE)), device.put(np.ones((9, SIZE)))
        array.get()
        for _ in range(2):
            with pytest.raises(OutOfDeviceMemory):
                refused.get()
        broken = array + refused
        with pytest.raises(OutOfDeviceMemory):
            broken.get()
        assert array.get().min() == 1
        session.close(raise_failures=False)
        with pytest.raises(SessionClosed):
            array.get()
