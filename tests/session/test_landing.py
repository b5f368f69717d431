"""Arrays of a TCP session whose bytes are expected, and received before anybody looks at them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote._speed import native
from gpuremote.client.blocking import Session
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def session(server: RunningServer) -> Iterator[Session]:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp") as session:
        yield session


def landings(session: Session) -> list[tuple[int, int]]:
    """Numbers and bytes of the results that come so, from now on."""
    found: list[tuple[int, int]] = []
    core: Any = session._core
    known: Callable[[int, memoryview], bool | None] = core.on_landed

    def on_landed(number: int, view: memoryview) -> bool | None:
        found.append((number, view.nbytes))
        return known(number, view)

    core.on_landed = on_landed
    return found


@pytest.mark.skipif(native is None, reason="the twin takes no hints")
@pytest.mark.parametrize("size", [100 * KIB, MIB, 5 * MIB + 3])
def test_a_result_lands(session: Session, size: int) -> None:
    found = landings(session)
    x = session.devices[0].put(np.arange(size, dtype=np.uint8))
    out = np.empty(size, np.uint8)
    for k in range(200):
        (x + np.uint8(k)).get(out=out)
        assert np.array_equal(out, np.arange(size, dtype=np.uint8) + np.uint8(k))
        # One that the kernel hands over in parts comes the other way: on a busy machine most do.
        if k >= 3 and size in [nbytes for _, nbytes in found]:
            break
    else:
        pytest.fail("none of them landed")
    assert session.stats().payload_copied == 0


def test_sizes_by_chance(session: Session) -> None:
    """Small ones travel in messages, the others land, or come as ever behind something else."""
    chance = random.Random(7)
    device = session.devices[0]
    kept: list[tuple[Any, Any]] = []
    for _ in range(150):
        size = chance.choice([10, 50 * KIB, 66 * KIB, 300 * KIB, MIB, 3 * MIB])
        host = np.random.default_rng(size).integers(0, 255, size, np.uint8)
        match chance.randrange(4):
            case 0:
                kept.append((device.put(host), host))
            case 1:
                kept += zip(device.put_many([host, host[::2]]), [host, host[::2]], strict=True)
            case 2 if kept:
                array, known = kept[chance.randrange(len(kept))]
                kept.append((array + np.uint8(1), known + np.uint8(1)))
            case _ if kept:
                array, known = kept.pop(chance.randrange(len(kept)))
                assert np.array_equal(array.get(), known)
    for (array, known), got in zip(kept, session.get_many([a for a, _ in kept]), strict=True):
        assert np.array_equal(got, known), array


@pytest.mark.parametrize("sizes", [(0,), (MIB, 0), (0, MIB), (70 * KIB, 0, 0)])
def test_nothing_is_expected_of_an_empty_array(session: Session, sizes: tuple[int, ...]) -> None:
    hosts = [np.full((size, 1), 3, np.uint8) for size in sizes]
    arrays = session.devices[0].put_many(hosts)
    for array, host in zip(arrays, hosts, strict=True):
        assert np.array_equal(array.get(), host)
    assert session.devices[0].put(np.ones((0, 5))).get().shape == (0, 5)


def test_an_upload_that_finds_no_room_is_refused_and_the_next_one_is_not(
    server: RunningServer,
) -> None:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp&memory=8MiB") as session:
        device = session.devices[0]
        kept = device.put(np.ones(5 * MIB, np.uint8))
        with pytest.raises(OutOfDeviceMemory):
            device.put(np.ones(5 * MIB, np.uint8))
        assert np.array_equal(
            device.put((np.arange(MIB) % 7).astype(np.uint8))[:9].get(), np.arange(9) % 7
        )
        assert kept.get().min() == 1


def test_threads_that_put_and_get(session: Session) -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(25):
                size = chance.choice([70 * KIB, MIB, 2 * MIB])
                host = np.full(size, seed, np.uint8)
                got = (session.devices[0].put(host) + np.uint8(1)).get()
                assert np.array_equal(got, host + np.uint8(1))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
