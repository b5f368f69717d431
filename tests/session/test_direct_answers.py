"""An array that is there is sent as soon as it is asked for; nobody is woken who does not wait."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.server.answers import SENT_AT_ONCE
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Failure, Slot, Storage
from gpuremote.wire.batch import Op, fixed_record
from gpuremote.wire.caps import INLINE_PAYLOAD
from gpuremote.wire.frames import NUMBER, Kind

NBYTES = 4 * INLINE_PAYLOAD
ARRAY = 7


class Bench:
    """A session with one array, too large to travel in a message, and no client."""

    def __init__(self) -> None:
        self.woken = 0
        self.session = WorkerSession(NumpyBackend(), 1 << 26, self.wake)
        self.slot = self.session._table[ARRAY] = Slot()

    def wake(self) -> None:
        self.woken += 1

    def fill(self, nbytes: int = NBYTES) -> None:
        session = self.session
        meta = session.metas.get((nbytes,), np.dtype("u1"), 0)
        self.slot.fill(np.zeros(nbytes, "u1"), meta, Storage(session.quota, nbytes))

    def get(self, times: int = 1) -> None:
        """The client asks for it."""
        session = self.session
        body = NUMBER.pack(session.peer.turn) + times * fixed_record(Op.GET, ARRAY)
        session.on_message(Kind.BATCH, 0, memoryview(body))

    @property
    def sent(self) -> int:
        return self.session.peer.bulk_in_flight

    @property
    def waiting(self) -> int:
        return len(self.session.default.queue)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_array_that_is_there(bench: Bench) -> None:
    bench.fill()
    bench.get()
    assert (bench.sent, bench.waiting) == (1, 0)
    assert bench.slot.storage is not None
    assert bench.slot.storage.outgoing == 1


def test_what_is_still_to_come(bench: Bench) -> None:
    bench.get()
    assert (bench.sent, bench.waiting) == (0, 1)
    bench.fill()
    bench.session.run_default()
    assert (bench.sent, bench.waiting) == (1, 0)


def test_what_came_before_comes_first(bench: Bench) -> None:
    bench.fill()
    order: list[int] = []
    bench.session.default.queue.append((1, lambda number: order.append(bench.sent), ()))
    bench.get()
    assert (bench.sent, bench.waiting) == (0, 2)
    bench.session.run_default()
    assert (bench.sent, bench.waiting, order) == (1, 0, [0])


def test_one_at_a_time(bench: Bench) -> None:
    """Whoever takes them in has the session's lock."""
    bench.fill()
    bench.get(3)
    assert (bench.sent, bench.waiting) == (1, 2)
    bench.session.run_default()
    assert (bench.sent, bench.waiting) == (3, 0)


def test_a_large_array_takes_its_turn(bench: Bench) -> None:
    bench.fill(SENT_AT_ONCE + 1)
    bench.get()
    assert (bench.sent, bench.waiting) == (0, 1)


def test_a_client_without_credit(bench: Bench) -> None:
    bench.fill()
    bench.session.peer.credit = 0
    bench.get()
    assert (bench.sent, bench.waiting) == (0, 1)


def test_what_failed_is_told(bench: Bench) -> None:
    bench.slot.poison(Failure(3, 1, "why", "add"))
    bench.get()
    bench.session.run_default()
    assert (bench.sent, bench.waiting) == (0, 0)
    (_, kind, *_, body) = bench.session.peer.kept()[0]
    assert kind == Kind.FAILURE
    assert b"why" in body


def test_nobody_is_woken_in_vain(bench: Bench) -> None:
    bench.session.ordering.stir()
    assert bench.woken == 0
    bench.get()  # of what is still to come
    bench.session.ordering.stir()
    assert bench.woken == 1


def test_what_a_stream_leaves_over_is_sent_by_the_main_thread(bench: Bench) -> None:
    """Its answer may be more than the kernel takes."""
    session, ordering = bench.session, bench.session.ordering
    body = NUMBER.pack(session.peer.turn) + fixed_record(Op.STREAM_NEW, 1, 0)
    session.on_message(Kind.BATCH, 0, memoryview(body))
    stream = ordering.streams[1]
    done = threading.Event()
    stream.queue.append((9, lambda _: done.set(), ()))
    stream.wake()
    assert done.wait(5.0)
    deadline = time.monotonic() + 5.0
    while not bench.woken:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    stream.close()
    stream._thread.join(5.0)


def test_whoever_holds_credit_back_looks_again(bench: Bench) -> None:
    bench.session.peer.held = True
    bench.session.ordering.stir()
    assert bench.woken == 1
