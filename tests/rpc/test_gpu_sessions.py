"""A worker with the CuPy backend, over RDMA: its arrays' memory is what the card reads and writes.

CuPy, the CUDA driver and the verbs are doubles; the rest is what a worker runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpuremote.backend.cupy_backend import CupyBackend
from gpuremote.errors import ConnectionLost
from gpuremote.memory.staging import tidy
from gpuremote.server.session import WorkerSession
from gpuremote.testing.fake_cuda import FakeCuda
from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport.base import Connection, Region
from gpuremote.transport.rdma import Options
from gpuremote.transport.tcp import pair
from gpuremote.wire.batch import Op, blob_record, fixed_record
from gpuremote.wire.frames import NUMBER, Kind, pack_info
from tests.backend.cupy_double import CupyDouble
from tests.rdma.ends import LOOPBACK, connected
from tests.rpc.test_peer import End

MIB = 1 << 20


class Worker:
    """A worker's session, and the client's end of it."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.verbs = FakeVerbs(cuda=self.cuda)
        self.cupy = CupyDouble(driver=self.cuda, prompt=True)
        self.backend = CupyBackend(cupy=self.cupy, driver=self.cuda)
        self.session = WorkerSession(self.backend, 64 * MIB)
        self.client = End()
        self._next = 1

    def connect(self, kind: str) -> Connection:
        """Both over a new connection; the worker's end of it."""
        here, there = (
            pair(blocking=False)
            if kind == "tcp"
            else connected(
                blocking=False, over=LOOPBACK, provider=self.verbs, options=Options(piece=MIB)
            )
        )
        mine, theirs = self.client.peer.receipt(), self.session.peer.receipt()
        self.client.peer.attach(here, theirs)
        self.session.peer.attach(there, mine)
        return there

    def lose(self) -> None:
        for peer in self.client.peer, self.session.peer:
            peer.lost(ConnectionLost("the test says so"))

    def step(self) -> bool:
        moved = self.client.step()
        peer = self.session.peer
        connection = peer.connection
        if connection is not None:
            before = connection.stats.bytes_received
            try:
                connection.flush()
                incoming = connection.receive()
                if incoming is not None:
                    peer.dispatch(incoming, connection)
                    moved = True
            except ConnectionLost as error:
                peer.lost(error)
            moved = moved or connection.stats.bytes_received != before
        self.session.run_default()
        return moved

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(100_000):
            if condition():
                return
            self.step()
        raise AssertionError("it does not come to that")

    def put(self, data: np.ndarray[Any, Any]) -> int:
        number = self._next
        self._next += 1
        blob = pack_info([list(data.shape), data.dtype.str[1:], 0])
        self.client.peer.post(Kind.BATCH, NUMBER.pack(number) + blob_record(Op.PUT, blob=blob))
        self.client.peer.post_payload(Kind.PAYLOAD, NUMBER.pack(number), [Region(data)])
        return number

    def get(self, handle: int) -> bytes:
        count = len(self.client.payloads)
        self.ask(handle)
        self.until(lambda: len(self.client.payloads) > count)
        return self.client.payloads[-1]

    def ask(self, handle: int) -> None:
        number = self._next
        self._next += 1
        body = NUMBER.pack(number) + fixed_record(Op.GET, handle)
        self.client.peer.post(Kind.BATCH, body)

    def value(self, handle: int) -> Any:
        self.until(lambda: handle in self.session._table)
        slot = self.session._table[handle]
        self.until(lambda: not slot.pending)
        assert slot.failure is None, slot.failure
        return slot.value


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.lose()
    tidy()
    verbs, cuda = made.verbs, made.cuda
    assert (verbs.open_devices, verbs.registered) == (0, 0)
    assert (cuda.pinned, cuda.streams, cuda.events) == ({}, set(), set())


def numbers(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).standard_normal(count)


@pytest.mark.parametrize("dmabuf", [True, False], ids=["direct", "staged"])
def test_put_and_get(worker: Worker, dmabuf: bool) -> None:
    worker.cuda.dmabuf = dmabuf
    connection = worker.connect("rdma")
    data = numbers(300_001)
    handle = worker.put(data)
    assert np.array_equal(worker.value(handle).host, data)
    assert worker.get(handle) == data.tobytes()
    # CuPy has copied nothing, and host memory of the array's size was never there.
    assert not worker.cupy.pinned
    # Three pieces of a MiB at most.
    copies = worker.cuda.called("copy_in", "copy_out")
    assert copies == ([] if dmabuf else 3 * ["copy_in"] + 3 * ["copy_out"])
    way = connection.describe()["gpu_memory"]
    assert isinstance(way, list)
    assert str(way[0]).startswith("dma-buf" if dmabuf else "page-locked staging (dma-buf: ")


def test_the_stream_is_waited_for_before_its_array_is_sent(worker: Worker) -> None:
    worker.connect("rdma")
    handle = worker.put(numbers(100_000))
    array = worker.value(handle)
    null = worker.cupy.cuda.Stream.null
    worker.cupy.prompt = False
    null.give(lambda: np.copyto(array.host, 7.0))
    assert np.frombuffer(worker.get(handle)).tolist() == [7.0] * 100_000
    assert not null.queue


def test_memory_that_the_stream_still_uses_is_staged(worker: Worker) -> None:
    connection = worker.connect("rdma")
    data = numbers(100_000)
    worker.cupy.prompt = False  # nobody comes to the event behind what was queued
    handle = worker.put(data)
    assert np.array_equal(worker.value(handle).host, data)
    assert worker.cuda.called("copy_in") == ["copy_in"]
    assert not worker.cuda.called("flush_writes")
    assert connection.describe()["gpu_memory"] == ["no GPU memory was moved yet"]


def test_an_array_that_is_not_contiguous(worker: Worker) -> None:
    """It is copied on the device, and the copy counts while it is being sent."""
    worker.connect("rdma")
    data = numbers(90_000).reshape(300, 300)
    handle = worker.put(data)
    array = worker.value(handle)
    slot = worker.session._table[handle]
    assert slot.meta is not None
    assert slot.storage is not None
    slot.fill(worker.cupy.adopt(array.host.T, array), slot.meta, slot.storage)
    before = worker.session.quota.used
    worker.ask(handle)
    worker.until(lambda: worker.session.quota.used > before)
    worker.until(lambda: worker.client.payloads)
    assert worker.client.payloads[-1] == data.T.tobytes()
    worker.until(lambda: worker.session.quota.used == before)


@pytest.mark.parametrize(("first", "second"), [("rdma", "tcp"), ("tcp", "rdma"), ("rdma", "rdma")])
def test_a_put_goes_on_over_another_connection(worker: Worker, first: str, second: str) -> None:
    """What has arrived in the array stays there, what had arrived beside it is brought along."""
    worker.connect(first)
    data = numbers(2 * MIB)
    handle = worker.put(data)
    arriving = worker.session.peer.arriving
    worker.until(lambda: arriving and next(iter(arriving.values())).received)
    (half,) = arriving.values()
    assert 0 < half.received < data.nbytes
    worker.lose()
    worker.connect(second)
    assert np.array_equal(worker.value(handle).host, data)


@pytest.mark.parametrize(("first", "second"), [("rdma", "tcp"), ("tcp", "rdma"), ("rdma", "rdma")])
def test_a_get_goes_on_over_another_connection(worker: Worker, first: str, second: str) -> None:
    worker.connect(first)
    data = numbers(2 * MIB)
    handle = worker.put(data)
    worker.value(handle)
    worker.ask(handle)
    arriving = worker.client.peer.arriving
    worker.until(lambda: arriving and next(iter(arriving.values())).received)
    (half,) = arriving.values()
    assert 0 < half.received < data.nbytes
    worker.lose()
    worker.connect(second)
    worker.until(lambda: worker.client.payloads)
    assert worker.client.payloads == [data.tobytes()]


def test_an_array_is_not_written_to_while_the_card_reads_it(worker: Worker) -> None:
    worker.connect("rdma")
    handle = worker.put(numbers(100_000))
    worker.value(handle)
    storage = worker.session._table[handle].storage
    assert storage is not None
    worker.ask(handle)
    worker.until(lambda: storage.outgoing)
    worker.until(lambda: worker.client.payloads)
    worker.until(lambda: not storage.outgoing)


def test_without_a_driver_cupy_stages(worker: Worker) -> None:
    """As with ROCm: all of an array passes through host memory that CuPy has locked."""
    worker.backend._driver = None
    worker.connect("rdma")
    data = numbers(100_000)
    handle = worker.put(data)
    worker.cupy.cuda.Stream.null.synchronize()
    assert np.array_equal(worker.value(handle).host, data)
    assert worker.get(handle) == data.tobytes()
    assert len(worker.cupy.pinned) == 2
    assert not worker.cuda.calls
