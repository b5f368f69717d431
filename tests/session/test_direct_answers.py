"""An array that is there is sent as soon as it is asked for; nobody is woken who does not wait."""

from __future__ import annotations

import numpy as np
import pytest

from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Failure, Slot, Storage
from gpuremote.wire.batch import Op, fixed_record
from gpuremote.wire.caps import INLINE_PAYLOAD, MAX_BULK
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

    def fill(self) -> None:
        session = self.session
        meta = session.metas.get((NBYTES,), np.dtype("u1"), 0)
        self.slot.fill(np.zeros(NBYTES, "u1"), meta, Storage(session.quota, NBYTES))

    def get(self) -> None:
        """The client asks for it."""
        session = self.session
        body = NUMBER.pack(session.peer.turn) + fixed_record(Op.GET, ARRAY)
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


@pytest.mark.parametrize("what", ["credit", "bulk"])
def test_a_client_that_does_not_read(bench: Bench, what: str) -> None:
    bench.fill()
    if what == "credit":
        bench.session.peer.credit = 0
    else:
        for _ in range(MAX_BULK):
            bench.get()
    before = bench.sent
    bench.get()
    assert (bench.sent, bench.waiting) == (before, 1)


def test_what_failed_is_told(bench: Bench) -> None:
    bench.slot.poison(Failure(3, 1, "why", "add"))
    bench.get()
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


def test_whoever_holds_credit_back_looks_again(bench: Bench) -> None:
    bench.session.peer.held = True
    bench.session.ordering.stir()
    assert bench.woken == 1
