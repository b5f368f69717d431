"""Payloads whose receiver copies right behind the sender, told by a counter beside the memory."""

from __future__ import annotations

import array
import mmap
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from gpuremote._speed import native
from gpuremote.errors import ConnectionLost, ProtocolError
from gpuremote.memory import shared
from gpuremote.memory.host import copy_bytes
from gpuremote.testing.driving import Ends, place
from gpuremote.transport import shm
from gpuremote.transport._filling import Fill
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.shm import ShmConnection
from tests.transport.test_shm import MIB, frame, shared_body


class Led:
    """A receiver whose sender is played by hand: 1 MiB in one block, of which it says how much is
    there in the counter, or in frames."""

    def __init__(self, size: int = MIB) -> None:
        self.raw, ours = socket.socketpair()
        side, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = ShmConnection(ours, side, blocking=True)
        self.size = size
        fd = shared._new_segment(shared.PAGE + size)
        self.memory = mmap.mmap(fd, shared.PAGE + size)
        rights = array.array("i", [fd])
        self.theirs.sendmsg(
            [struct.pack("<IQI", 0, size, 1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        os.close(fd)
        self.data = random.Random(size).randbytes(size)
        self.target = bytearray(size)
        self.done: list[object] = []

    def begin(self, segment: int = shm.LED) -> Incoming:
        self.raw.sendall(frame(shm.SHARED, shared_body(self.size, (segment, 0, 0), 0), 3))
        incoming = self.connection.receive(1.0)
        assert incoming is not None
        incoming.into([memoryview(self.target)], self.done.append)
        return incoming

    def write(self, count: int) -> None:
        self.memory[shared.PAGE : shared.PAGE + count] = self.data[:count]

    def count(self, number: int) -> None:
        at = shared.PAGE // 2
        self.memory[at : at + 4] = struct.pack("<I", number)

    def say(self, count: int) -> None:
        self.raw.sendall(frame(shm.FILLED, struct.pack("<Q", count), 3))
        assert self.connection.receive(1.0) is None
        steps = 0
        while self.connection.due() is not None:
            assert self.connection.receive(0.0) is None
            steps += 1
        assert steps < 10, "it goes on looking where nothing comes"

    def close(self) -> None:
        self.connection.abort()
        self.raw.close()
        self.theirs.close()
        self.memory.close()


@pytest.fixture
def led() -> Iterator[Led]:
    found = Led()
    yield found
    found.close()


def test_a_receiver_follows_the_counter(led: Led) -> None:
    """What is there when it is told of the payload is in place at once, where the part in C is."""
    led.write(MIB // 2)
    led.count(MIB // 2)
    incoming = led.begin()
    followed = MIB // 2 if native is not None else 0
    assert incoming.received == followed
    assert led.connection.due() is None  # nothing to be done before the sender says more
    led.write(MIB)
    led.count(MIB)
    led.say(MIB // 2 + 1)
    assert incoming.received == (MIB if native is not None else MIB // 2 + 1)
    assert len(led.done) == (native is not None)
    led.say(MIB)
    assert len(led.done) == 1
    assert led.target == led.data


@pytest.mark.parametrize("segment", [0, shm.LED])
def test_a_sender_that_counts_nothing(led: Led, segment: int) -> None:
    """One without the part in C, or one that is stopped: its frames say the same."""
    led.count(0 if segment else MIB)
    incoming = led.begin(segment)
    assert incoming.received == 0
    led.write(MIB)
    for count in (1, 4096, MIB - 1):
        led.say(count)
        assert incoming.received == count
        assert led.target == led.data[:count] + bytes(MIB - count)
        assert not led.done
    led.say(MIB)
    assert led.target == led.data
    assert len(led.done) == 1


@pytest.mark.parametrize("lie", [MIB + 1, 0xFFFFFFFF])
def test_a_counter_that_lies(led: Led, lie: int) -> None:
    """No more than the payload is copied, whatever stands there; frames that lie end it."""
    led.write(MIB)
    led.count(lie)
    incoming = led.begin()
    assert incoming.received == (MIB if native is not None else 0)
    assert led.connection.stats.payload_received == incoming.received  # whoever says so
    led.count(0)
    led.say(MIB)
    assert led.target == led.data
    assert len(led.done) == 1
    led.raw.sendall(frame(shm.FILLED, struct.pack("<Q", MIB), 3))
    with pytest.raises(ProtocolError):
        led.connection.receive(1.0)


def test_a_payload_that_is_dropped_while_it_is_led(led: Led) -> None:
    led.write(MIB // 2)
    led.count(MIB // 2)
    incoming = led.begin()
    incoming.discard(led.done.append)
    found = bytes(led.target)
    led.write(MIB)
    led.count(MIB)
    led.say(MIB)
    assert led.target == found
    assert len(led.done) == 1


@pytest.mark.parametrize("size", [MIB // 4, MIB, 5 * MIB + 3, 40 * MIB + 1])
@pytest.mark.parametrize("blocking", [True, False])
def test_payloads_that_are_led_come_whole(size: int, blocking: bool) -> None:
    here, there = shm.pair(blocking=blocking)
    ends = Ends(here, there)
    payload = random.Random(size).randbytes(size)
    for turn in range(4):  # the blocks, and their counters, are used again
        here.send(b"%d" % turn, [Region(payload)])
        here.send(b"behind")
        incoming = ends.receive(there)
        assert place(ends, incoming) == [payload]
        assert bytes(ends.receive(there).header) == b"behind"
    assert there.stats.payload_received == here.stats.payload_sent == 4 * size
    assert here.stats.extra["copied_in"] == there.stats.extra["copied_out"] == 4 * size
    here.abort()
    there.abort()


@pytest.mark.skipif(native is None, reason="only the part in C looks at the counter")
def test_a_counter_that_crawls(led: Led) -> None:
    """A sender that is slow for harm's sake keeps the receiver for milliseconds."""
    over = threading.Event()

    def crawl() -> None:
        number = 0
        while not over.is_set():
            led.count(number := number + 1)

    led.write(MIB)
    crawling = threading.Thread(target=crawl)
    crawling.start()
    try:
        incoming = led.begin()
        assert incoming.received < MIB
    finally:
        over.set()
        crawling.join()
    led.say(MIB)
    assert led.target == led.data


@pytest.mark.parametrize("segment", [0, shm.LED])
def test_an_interruption_behind_a_copy(
    led: Led, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before anybody knows what was copied: it is copied again."""

    def interrupted(target: memoryview, source: memoryview) -> None:
        monkeypatch.setattr(where, copy_bytes)
        copy_bytes(target, source)
        raise KeyboardInterrupt

    where = "gpuremote.transport._loan.copy_bytes"
    incoming = led.begin(segment)
    led.write(MIB)
    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        led.say(MIB // 2)
    assert incoming.received == 0


def test_a_sender_without_room_is_not_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for room may drop a segment, which is said first: what follows goes out all the
    same."""
    here, there = shm.pair()
    ends = Ends(here, there)
    payload = random.Random(0).randbytes(MIB)

    def take(_: int) -> None:
        here._drop(7)

    monkeypatch.setattr(here._arena, "take", take)
    here.send(b"header", [Region(payload)])
    assert here.stats.bytes_sent > 0
    incoming = ends.receive(there)
    assert place(ends, incoming) == [payload]
    here.abort()
    there.abort()


def test_an_abort_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread: the sender hears that the connection is gone."""
    here, there = shm.pair()
    original = Fill.copy

    def copy(fill: Fill, limit: int) -> int:
        thread = threading.Thread(target=here.abort)
        thread.start()
        thread.join()
        return original(fill, limit)

    monkeypatch.setattr(Fill, "copy", copy)
    with pytest.raises(ConnectionLost):
        here.send(b"header", [Region(bytes(5 * MIB))])
    there.abort()
