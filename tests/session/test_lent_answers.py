"""Arrays that a worker lends to the kernel, over TCP within a host, instead of copying them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote._speed import NATIVE, native
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.client.blocking import Session
from gpuremote.errors import ConnectionLost, DeadlineExceeded
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Slot, Storage
from gpuremote.testing.servers import RunningServer
from gpuremote.transport.tcp import pair
from gpuremote.wire.batch import Op, fixed_record
from gpuremote.wire.frames import HEADER, NUMBER, Kind, encode_ack

MIB = 1 << 20
TURNS = 16
"""Answers of a size of which some are copied and some lent (native/lending.c, choosing.c); more, if
some of them come behind a pause, as on a busy machine."""
in_c = pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")


@pytest.fixture
def session(server: RunningServer) -> Iterator[Session]:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp") as session:
        yield session


def pattern(seed: int, nbytes: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def lent(session: Session) -> int:
    found: int = session.server_stats()["payload_lent"]
    return found


@pytest.mark.parametrize("nbytes", [200_000, 300_001, MIB + 1, 5 * MIB + 4097, 33 * MIB])
def test_the_same_bytes_come(session: Session, nbytes: int) -> None:
    host = pattern(nbytes, nbytes)
    array, out = session.devices[0].put(host), np.empty_like(host)
    for k in range(400):
        out[:] = 0
        array.get(out=out)
        assert np.array_equal(out, host)
        if k >= TURNS and (native is None or lent(session)):
            break
    if native is not None:
        assert 0 < lent(session) <= k * nbytes  # one of them at least was copied


def test_memory_is_used_again_behind_gets_that_were_given_up(session: Session) -> None:
    device, late = session.devices[0], 0
    for k in range(60):
        array = device.put(np.full(16 * MIB, k, np.uint8))
        try:
            array.get(timeout=0.0005 if k % 2 else 30.0)
        except DeadlineExceeded:
            late += 1
        array = device.put(np.full(16 * MIB, 100 + k, np.uint8))
        found = array.get()
        assert found.min() == found.max() == 100 + k
    assert late > 0


def test_a_client_that_takes_nothing_for_a_while(session: Session) -> None:
    """The worker goes on with what the kernel did not take when there is room again."""
    host = pattern(0, 16 * MIB)
    array, out = session.devices[0].put(host), np.empty_like(host)
    for _ in range(TURNS + 2):
        os.kill(session.worker_pid, signal.SIGSTOP)
        woken = threading.Timer(0.02, os.kill, (session.worker_pid, signal.SIGCONT))
        woken.start()
        try:
            array.get(out=out)
        finally:
            woken.join()
        assert np.array_equal(out, host)
    assert session.stats().reconnects == 0


def test_connections_that_break_in_the_middle(session: Session) -> None:
    host = pattern(0, 8 * MIB)
    array, core, over = session.devices[0].put(host), session._core, threading.Event()
    array.get()

    def breaks() -> None:
        while not over.wait(0.007):
            connection = core.peer.connection
            if connection is not None:
                connection.abort()

    thread = threading.Thread(target=breaks)
    thread.start()
    try:
        for _ in range(60):
            assert np.array_equal(array.get(), host)
    finally:
        over.set()
        thread.join()
    assert session.stats().reconnects > 0


class Bench:
    """A worker's session with one array, and the other end of its connection."""

    def __init__(self, nbytes: int) -> None:
        self.session = WorkerSession(NumpyBackend(), 1 << 30, lambda: None)
        self.here, self.there = pair()
        self.session.peer.connection = self.there
        self.storage = Storage(self.session.quota, nbytes)
        self.slot = self.session._table[7] = Slot()
        meta = self.session.metas.get((nbytes,), np.dtype("u1"), 0)
        self.slot.fill(np.zeros(nbytes, "u1"), meta, self.storage)

    def say(self, kind: Kind, seq: int, ack: int, body: bytes = b"") -> None:
        self.here.send(HEADER.pack(kind, 0, 0, 0, seq, ack) + body)

    def get(self, seq: int) -> None:
        """The client asks for the array, and has what it asked for before."""
        turn = self.session.peer.turn
        self.say(Kind.BATCH, seq, seq - 1, NUMBER.pack(turn) + fixed_record(Op.GET, 7))
        self.session.peer.take(self.there, 0.0)

    def close(self) -> None:
        self.here.abort()
        self.there.abort()


@in_c
def test_nothing_may_write_to_it_before_the_client_has_it() -> None:
    """What is lent shows what is written: so it counts as outgoing until it is acknowledged."""
    bench = Bench(128 << 10)
    try:
        shown: set[int] = set()
        seq = 0
        while shown != {1, 2}:  # copied, and lent
            seq += 1
            assert seq < 400
            bench.slot.value[:] = 1
            bench.get(seq)
            assert bench.session.peer.bulk_in_flight == bench.storage.outgoing == 1
            bench.slot.value[:] = 2  # as nobody may
            found = b""
            while len(found) < bench.slot.value.nbytes:
                found += bench.here._sock.recv(MIB)
            shown.add(found[-1])
        bench.say(Kind.ACK, 0, seq, encode_ack(1 << 20, 0, []))
        bench.session.peer.take(bench.there, 0.0)
        assert bench.session.peer.bulk_in_flight == bench.storage.outgoing == 0
    finally:
        bench.close()


@in_c
def test_it_gives_way_to_what_the_client_says() -> None:
    """Behind a call of 4 MiB; the rest goes out by and by."""
    bench = Bench(64 * MIB)

    def reads() -> None:
        buffer, says = bytearray(MIB), True
        with contextlib.suppress(OSError, ConnectionLost):  # it is over
            while bench.here._sock.recv_into(buffer):
                if says:
                    says = False
                    bench.say(Kind.PING, 0, 0)

    thread = threading.Thread(target=reads)
    thread.start()
    try:
        bench.get(1)
        assert bench.there.stats.bytes_sent < 16 * MIB
    finally:
        bench.there.abort()
        thread.join()
        bench.close()


@in_c
def test_it_gives_way_where_the_client_takes_its_time() -> None:
    """The session's lock is not kept for as long as a slow reader likes; nor are the pages."""
    slow, over = threading.Event(), threading.Event()
    size, taken = 40 * MIB, 0
    bench = Bench(size)

    def reads() -> None:
        nonlocal taken
        buffer = bytearray(64 << 10)
        while not over.wait(0.0005 if slow.is_set() else 0.0):
            with contextlib.suppress(BlockingIOError):
                taken += bench.here._sock.recv_into(buffer)

    thread = threading.Thread(target=reads)
    thread.start()
    try:
        for seq in (1, 2):  # are copied; where each comes behind a pause, that changes nothing
            bench.get(seq)
            while taken < seq * size:
                bench.there.flush()
            time.sleep(0.06)
        slow.set()
        before = bench.there.stats.bytes_sent
        bench.get(3)
        # On a busy machine this one is copied as well, as no earlier one went out in one go.
        assert bench.there.stats.bytes_sent - before < 30 * MIB
    finally:
        over.set()
        thread.join()
        bench.close()
