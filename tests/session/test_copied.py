"""Uploads of copies: the program goes on at once, with its memory its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client import blocking, uploading
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer, device_server

SIZE = 1 << 17
"""Bytes: more than travel in a batch."""


@pytest.fixture
def session(server: RunningServer) -> Iterator[gpuremote.Session]:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp&dedupe=off") as session:
        yield session


def trips(session: Any) -> int:
    found: int = session.stats().round_trips.total()
    return found


def numbers(seed: int, size: int = SIZE) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def test_nothing_is_waited_for(session: gpuremote.Session) -> None:
    device = session.devices[0]
    before = trips(session)
    arrays = []
    for seed in range(40):
        host = numbers(seed)
        arrays.append(device.put_copied(host))
        host[:] = 0  # it is the program's
    assert trips(session) == before
    for seed, array in enumerate(arrays):
        assert np.array_equal(array.get(), numbers(seed))
    assert trips(session) == before + 40


def test_ops_wait_for_what_is_on_its_way(session: gpuremote.Session) -> None:
    device = session.devices[0]
    before = trips(session)
    total = sum(
        (device.put_copied(numbers(seed)).sum() for seed in range(20)), device.zeros((), "u8")
    )
    assert int(total.get()) == sum(int(numbers(seed).sum()) for seed in range(20))
    assert trips(session) == before + 1


def test_copies_have_a_bound(session: gpuremote.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the upload waits; what has arrived no longer counts."""
    monkeypatch.setattr(uploading, "COPIES", 4 * SIZE)
    device, core = session.devices[0], session._core
    host = numbers(1)
    array = device.put_copied(host)
    for _ in range(100):
        array = device.put_copied(host)
        assert core._copies <= 4 * SIZE
    assert np.array_equal(array.get(), host)
    session.synchronize()
    gc.collect()
    core.copy_of(memoryview(b"x"))
    assert core._copies <= SIZE + 1


def test_what_is_large_is_waited_for(
    session: gpuremote.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "COPIED", SIZE - 1)
    before = session.stats()
    array = session.devices[0].put_copied(numbers(1))
    after = session.stats()
    assert after.round_trips["put"] == before.round_trips["put"] + 1
    assert after.payload_copied == before.payload_copied
    assert np.array_equal(array.get(), numbers(1))


def test_where_there_is_no_room_the_next_wait_says_so() -> None:
    with (
        device_server("--memory-limit", "1MiB", "--warm", "1") as server,
        gpuremote.connect_sync(f"{server.url}?transport=tcp") as session,
    ):
        device = session.devices[0]
        array = device.put_copied(numbers(1, 2 << 20))
        with pytest.raises(OutOfDeviceMemory):
            array.get()
        there = device.put_copied(numbers(2))
        assert np.array_equal(there.get(), numbers(2))


def test_it_arrives_after_a_loss_of_the_connection(session: gpuremote.Session) -> None:
    device = session.devices[0]
    arrays = [device.put_copied(numbers(seed)) for seed in range(5)]
    connection = session._core.peer.connection
    assert connection is not None
    connection.abort()
    arrays += [device.put_copied(numbers(seed)) for seed in range(5, 10)]
    for seed, array in enumerate(arrays):
        assert np.array_equal(array.get(), numbers(seed))


def test_the_server_keeps_what_it_is_told_to() -> None:
    """The second session has it without sending it; such an upload is waited for."""
    with device_server("--warm", "1", "--content-cache", "16MiB") as server:
        url = f"{server.url}?transport=tcp&dedupe=on"
        host = numbers(3, 2 << 20)
        with gpuremote.connect_sync(url) as first:
            array = first.devices[0].put_copied(host)
            assert np.array_equal(array.get(), host)
            spared = 0
            deadline = time.monotonic() + 20
            while not spared and time.monotonic() < deadline:
                with gpuremote.connect_sync(url) as second:
                    again = second.devices[0].put_copied(host)
                    assert np.array_equal(again.get(), host)
                    spared = second.stats().payload_spared
            assert spared == host.nbytes
