"""A server that has memory for an upload like the one before: nobody else's is ever used for it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote._speed import NATIVE, native
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.client.blocking import Session
from gpuremote.errors import DeadlineExceeded, OutOfDeviceMemory
from gpuremote.server.arrivals import IN_A_LOOP, READY, Prepared
from gpuremote.server.session import WorkerSession
from gpuremote.testing.servers import RunningServer
from gpuremote.transport.base import Region
from gpuremote.transport.tcp import pair
from gpuremote.wire.batch import Op, blob_record, fixed_record, free_record
from gpuremote.wire.frames import HEADER, NUMBER, Kind, pack_info

MIB = 1 << 20
in_c = pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")


class Loop:
    """Both ends of a connection in this process: a session, and messages as a client sends them."""

    def __init__(self, memory: int = 1 << 30) -> None:
        self.backend = NumpyBackend()
        self.session = WorkerSession(self.backend, memory, lambda: None)
        self.here, self.there = pair()
        self.session.peer.connection = self.there
        self.seq = 0
        self.number = 1
        self.made = 0
        blocks: Any = self.backend._blocks
        empty = blocks.empty

        def counted(*arguments: Any) -> Any:
            self.made += 1
            return empty(*arguments)

        blocks.empty = counted

    def send(self, kind: Kind, body: bytes, regions: list[Region] | None = None) -> None:
        self.seq += 1
        self.here.send(HEADER.pack(kind, 0, 0, 0, self.seq, 0) + body, regions or [])
        while self.here.pending_output:
            self.take()
            self.here.flush()

    def take(self) -> None:
        while self.session.peer.take(self.there, 0.0):
            pass

    def put(self, host: Any, *freed: int, keep: bool = False, at_once: bool = False) -> int:
        """As a client does; its number. ``at_once``: the server sees the record and the payload's
        beginning at the same time."""
        blob = [list(host.shape), host.dtype.str.lstrip("<|="), 0, *([True] if keep else [])]
        records = b"".join(free_record([handle]) for handle in freed)
        body = NUMBER.pack(self.number) + records + blob_record(Op.PUT, blob=pack_info(blob))
        number = self.number + len(freed)
        self.number = number + 1
        self.send(Kind.BATCH, body)
        if not at_once:
            self.take()
        self.send(Kind.PAYLOAD, NUMBER.pack(number), [Region(host)])
        self.take()
        return number

    def value(self, number: int) -> Any:
        return self.session._table[number].value

    def close(self) -> None:
        self.here.abort()
        self.there.abort()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def array(k: int, size: int = MIB) -> Any:
    return np.full(size, k, np.uint8)


@in_c
def test_a_loop_makes_memory_for_what_it_has_at_a_time(loop: Loop) -> None:
    kept = [loop.put(array(0))]
    for k in range(1, 30):
        number = loop.put(array(k), *kept[:-1])
        assert loop.value(number).min() == loop.value(number).max() == k
        kept = [*kept[-1:], number]
    assert IN_A_LOOP <= loop.made <= IN_A_LOOP + 1
    assert loop.session.quota.used == 2 * MIB
    assert not loop.session._arriving


@in_c
@pytest.mark.parametrize(
    "how", ["the array", "a view of it", "a buffer", "a transfer", "an op that waits"]
)
def test_memory_that_somebody_has_is_not_used(loop: Loop, how: str) -> None:
    held: list[Any] = []
    last: list[int] = []
    for k in range(40):
        number = loop.put(array(k), *last)
        value = loop.value(number)
        match how:
            case "the array":
                held.append((k, value))
            case "a view of it":
                held.append((k, value[5:100]))
            case "a buffer":
                held.append((k, np.frombuffer(memoryview(value)[7:9], np.uint8)))
            case "a transfer":
                held.append((k, np.frombuffer(loop.backend.send_view(value)[0], np.uint8)))
            case _:
                held.append((k, loop.session._table[number]))
        del value
        last = [number]
    for k, what in held:
        found = what.value if how == "an op that waits" else what
        assert found.min() == found.max() == k


@in_c
def test_of_what_is_larger_no_memory_is_kept(loop: Loop) -> None:
    """It is made when it is announced."""
    last: list[int] = []
    for k in range(6):
        last = [loop.put(array(k, READY + 1), *last)]
        assert loop.value(last[0]).min() == loop.value(last[0]).max() == k
    ready = loop.session.peer.ready
    assert isinstance(ready, Prepared)
    assert ready.memory is None
    assert loop.made == 6
    assert loop.session.quota.used == READY + 1
    assert not loop.session._arriving


@in_c
def test_what_is_kept_for_others_has_no_memory_ready(loop: Loop) -> None:
    last: list[int] = []
    for k in range(4):
        last = [loop.put(array(k), *last, keep=True)]
        assert loop.value(last[0]).max() == k
    assert loop.session.peer.ready is None


@in_c
@pytest.mark.parametrize("size", [MIB, READY + 1])
def test_arrays_that_are_all_kept(loop: Loop, size: int) -> None:
    """Batches without a free, and then one with many: other sizes than the server reckoned with."""
    numbers = [loop.put(array(k, size)) for k in range(9)]
    numbers.append(loop.put(array(9, size), *numbers[:5]))
    for k, number in enumerate(numbers[5:], 5):
        assert loop.value(number).min() == loop.value(number).max() == k
    assert loop.session.quota.used == 5 * size


@in_c
@pytest.mark.parametrize("freed", [0, 1, 2])
@pytest.mark.parametrize("size", [MIB, READY + 1])
def test_the_head_of_the_payload_comes_with_the_record(loop: Loop, size: int, freed: int) -> None:
    """Received together where the batch is as long as the one before, and nothing behind it."""
    numbers = [loop.put(array(k, size), at_once=True) for k in range(8 * freed + 1)]
    copied = loop.there.stats.payload_copied
    for k in range(8):
        numbers.append(loop.put(array(k, size), *numbers[:freed], at_once=True))
        del numbers[:freed]
        assert loop.value(numbers[-1]).min() == loop.value(numbers[-1]).max() == k
        if k == 1:
            copied = loop.there.stats.payload_copied
    assert loop.there.stats.payload_copied == copied
    assert not loop.session._arriving


@in_c
def test_others_are_under_way_when_a_head_comes_with_a_record(loop: Loop) -> None:
    for k in range(3):
        last = loop.put(array(k))
    slow, host = loop.number, array(7, 2 * MIB)
    blob = [[2 * MIB], "u1", 0]
    loop.number += 1
    loop.send(Kind.BATCH, NUMBER.pack(slow) + blob_record(Op.PUT, blob=pack_info(blob)))
    loop.take()
    loop.seq += 1
    header = HEADER.pack(Kind.PAYLOAD, 0, 0, 0, loop.seq, 0) + NUMBER.pack(slow)
    loop.here.send(header, [Region(host)])  # some of it is in the kernel, the rest is not
    for k in range(3, 6):
        last = loop.put(array(k), last, at_once=True)
        assert loop.value(last).min() == loop.value(last).max() == k
    assert loop.value(slow).min() == loop.value(slow).max() == 7


@in_c
def test_another_upload_is_announced_and_cancelled_between(loop: Loop) -> None:
    """What is ready stays that of the array it was made for."""
    for k in range(3):
        loop.put(array(k))
    other = loop.number
    blob = [[2 * MIB], "u1", 0]
    body = NUMBER.pack(other) + blob_record(Op.PUT, blob=pack_info(blob))
    loop.number += 1
    loop.send(Kind.BATCH, body)
    loop.take()
    loop.send(Kind.BATCH, NUMBER.pack(loop.number) + fixed_record(Op.CANCEL, other))
    loop.number += 1
    loop.take()
    kept = [loop.put(array(k)) for k in range(10, 20)]
    for k, number in enumerate(kept, 10):
        assert loop.value(number).shape == (MIB,)
        assert loop.value(number).min() == loop.value(number).max() == k
    number = loop.put(array(5, 2 * MIB))
    assert loop.value(number).shape == (2 * MIB,)


@in_c
def test_an_upload_of_another_kind_that_comes_late(loop: Loop) -> None:
    """What a batch ended with says nothing of bytes that were announced before."""
    for _ in range(4):
        late, host = loop.number, array(1, 2 * MIB)
        body = NUMBER.pack(late)
        for each in (host, array(2)):
            blob = [list(each.shape), "u1", 0]
            body += blob_record(Op.PUT, blob=pack_info(blob))
        loop.number += 2
        loop.send(Kind.BATCH, body)
        loop.send(Kind.PAYLOAD, NUMBER.pack(late), [Region(host)])
        loop.take()
        loop.send(Kind.PAYLOAD, NUMBER.pack(late + 1), [Region(array(2))])
        loop.take()
        assert loop.value(late).nbytes == 2 * MIB
        assert loop.value(late).max() == 1
        assert loop.value(late + 1).nbytes == MIB
        assert loop.value(late + 1).min() == 2
        number = loop.put(array(3))
        assert loop.value(number).min() == 3


@in_c
def test_it_is_given_back(loop: Loop) -> None:
    loop.put(array(1))
    assert loop.session.peer.ready is not None
    loop.session.ready.drop()
    assert loop.session.peer.ready is None
    number = loop.put(array(2))
    assert loop.value(number).max() == 2


@in_c
def test_there_is_room_or_there_is_none() -> None:
    loop = Loop(2 * MIB + 1)
    try:
        last: list[int] = []
        for k in range(20):
            number = loop.put(array(k), *last[-2:-1])
            last.append(number)
            assert loop.value(number).max() == k
        refused = loop.put(array(1))
        assert loop.session._table[refused].failure is not None
        assert loop.session.quota.used == 2 * MIB
        assert loop.value(loop.put(array(9), *last[-2:])).max() == 9
    finally:
        loop.close()


# -- with a server -----------------------------------------------------------------------------


@pytest.fixture
def session(server: RunningServer) -> Iterator[Session]:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp&memory=64MiB") as session:
        yield session


def test_arrays_stay_what_they_are(session: Session) -> None:
    device, host = session.devices[0], array(0)
    kept: list[tuple[int, Any]] = []
    for k in range(120):
        host[:] = k
        last = device.put(host)
        if k % 9 == 0:
            kept.append((k, last))
        elif k % 9 == 4:
            kept.append((k, last[10:20]))
        elif k % 9 == 7:
            last += np.uint8(1)
            kept.append((k + 1, last.reshape(1024, -1)[3:]))
    for k, remote in kept:
        found = remote.get()
        assert found.min() == found.max() == k


def test_uploads_that_run_out_of_time(session: Session) -> None:
    device = session.devices[0]
    for k in range(20):
        device.put(array(k))
        with pytest.raises(DeadlineExceeded):
            device.put(array(k), timeout=0)
        assert device.put(array(k)).max().item() == k
    assert session.stats().reconnects <= 20


def test_no_room_comes_and_goes(session: Session) -> None:
    device = session.devices[0]
    kept = [device.put(array(k)) for k in range(64)]
    with pytest.raises(OutOfDeviceMemory):
        device.put(array(64))
    assert [int(remote[0].item()) for remote in kept] == list(range(len(kept)))
    del kept[::2]
    assert device.put(array(7)).max().item() == 7
    assert session.stats().round_trips["put"] == 66


def test_connections_that_break_between(session: Session) -> None:
    device, core = session.devices[0], session._core
    kept = []
    for k in range(30):
        kept.append(device.put(array(k)))
        if k % 5 == 3:
            connection = core.peer.connection
            assert connection is not None
            connection.abort()
    assert [int(remote.max().item()) for remote in kept] == list(range(30))


def test_threads_that_upload_the_same_shape(session: Session) -> None:
    device = session.devices[0]
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for k in range(40):
                remote = device.put(array(seed + k))
                assert remote.max().item() == remote.min().item() == seed + k
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(50 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_threads_that_have_the_kernel_take_no_more(session: Session) -> None:
    """What one of them has to leave over is under way when another one sends."""
    device, failed = session.devices[0], []
    interval = sys.getswitchinterval()

    def work(seed: int, size: int, times: int) -> None:
        try:
            for k in range(times):
                remote = device.put(array((seed + k) % 251, size))
                if k % 8 == 0:
                    found = remote.get()
                    assert found.min() == found.max() == (seed + k) % 251
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k, 12 * MIB, 40)) for k in range(2)]
    threads += [threading.Thread(target=work, args=(k, 350_000 + k, 300)) for k in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert session.stats().reconnects == 0
