"""Uploads of copies: the program goes on at once, with its memory its own."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client import blocking, uploading
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer, device_server

MiB = 1 << 20
SIZE = 1 << 17
"""Bytes: more than travel in a batch."""


@pytest.fixture
def session(server: RunningServer) -> Iterator[gpuremote.Session]:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp&dedupe=off") as session:
        yield session


def trips(session: Any) -> int:
    found: int = session.stats().round_trips.total()
    return found


def both(*functions: Callable[[], object]) -> None:
    for function in functions:
        function()


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
    core.copy_of(memoryview(b"x"), 1 << 20)
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
        device_server("--memory-limit", "4MiB", "--warm", "1") as server,
        gpuremote.connect_sync(f"{server.url}?transport=tcp") as session,
    ):
        device = session.devices[0]
        full = device.zeros(4 * MiB - 100, "u1")
        session.synchronize()  # an upload that comes with it would be there first
        for wait in (session.synchronize, full[0].item):
            array = device.put_copied(numbers(1))
            with pytest.raises(OutOfDeviceMemory):
                both(wait, session.synchronize)
            with pytest.raises(OutOfDeviceMemory):
                array.get()
            session.synchronize()  # it was said
            del array
        del full, wait
        gc.collect()  # tracebacks hold on to it
        with pytest.raises(OutOfDeviceMemory):  # more than its share: it is waited for
            device.put_copied(numbers(1, 5 * MiB))
        there = device.put_copied(numbers(2))
        assert np.array_equal(there.get(), numbers(2))


def test_copies_take_a_share_of_the_memory() -> None:
    """The server makes room when it hears of an upload, not in its turn."""
    with (
        device_server("--memory-limit", "32MiB", "--warm", "1") as server,
        gpuremote.connect_sync(f"{server.url}?transport=tcp") as session,
    ):
        device, core = session.devices[0], session._core
        for _ in range(20):
            array = device.put_copied(numbers(1, MiB))
            assert core._copies <= 2 * MiB
            assert array.get()[0] == numbers(1)[0]
        before = session.stats().round_trips["put"]
        for _ in range(3):
            device.put_copied(numbers(1, 3 * MiB))
        assert session.stats().round_trips["put"] == before + 3


def test_synchronize_waits_for_uploads_too(session: gpuremote.Session) -> None:
    """Its answer may overtake their bytes."""
    device, core = session.devices[0], session._core
    before = trips(session)
    arrays = []
    for _ in range(3):
        arrays = [device.put_copied(numbers(seed, 8 * MiB)) for seed in range(8)]
        session.synchronize(timeout=60)
        assert not core.lent
        assert core.peer.bulk_in_flight == 0
    assert trips(session) <= before + 3 + 24
    assert np.array_equal(arrays[7].get(), numbers(7, 8 * MiB))


def test_every_op_can_be_made_to_wait(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUREMOTE_DEBUG", "sync")
    with gpuremote.connect_sync(f"{server.url}?transport=tcp") as session:
        before = session.stats().round_trips["put"]
        session.devices[0].put_copied(numbers(1))
        assert session.stats().round_trips["put"] == before + 1


def test_two_threads_and_a_server_that_stands_still(session: gpuremote.Session) -> None:
    """Who waits for credit leaves the other one the lock that takes it in."""
    device = session.devices[0]
    small, large = numbers(1, 16 << 10), numbers(2, 80 << 10)
    os.kill(session.worker_pid, signal.SIGSTOP)
    again = threading.Timer(1.0, os.kill, (session.worker_pid, signal.SIGCONT))
    again.start()
    getting = threading.Thread(target=lambda: device.ones(10).get(), daemon=True)
    getting.start()
    kept = []
    try:
        for _ in range(1500):
            kept = [device.put_copied(small), device.put_copied(large)]
        assert np.array_equal(kept[1].get(), large)
    finally:
        again.join()
        getting.join(20)
    assert not getting.is_alive()


def test_many_threads_that_ask_and_upload(session: gpuremote.Session) -> None:
    device = session.devices[0]
    host = numbers(1, 20 << 10)
    wrong: list[int] = []

    def work() -> None:
        same = [np.array_equal(device.put(host).get(), host) for _ in range(150)]
        wrong.append(same.count(False))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not any(thread.is_alive() for thread in threads)
    assert sum(wrong) == 0


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
