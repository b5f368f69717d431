"""Large payload that goes through a few blocks of shared memory, in place of a second copy."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from gpuremote import _clock
from gpuremote.errors import ConnectionLost, ProtocolError
from gpuremote.memory import shared
from gpuremote.memory.shared import PAGE
from gpuremote.testing.driving import Ends, place
from gpuremote.transport import _pieces, shm, tcp
from gpuremote.transport._outgoing import Outbox
from gpuremote.transport._pieces import BLOCKS, Window
from gpuremote.transport.base import Region
from gpuremote.transport.shm import ShmConnection
from tests.transport.test_shm import MIB, Side, frame

KIB = 1 << 10
PIECE = 64 * KIB

Pair = tuple[ShmConnection, ShmConnection]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything were smaller by a factor of 64."""
    monkeypatch.setattr(shm, "MAX_STAGED", MIB)
    monkeypatch.setattr(shm, "LEAST_PIECE", 4 * KIB)
    monkeypatch.setattr(tcp, "MAX_CHUNK", PIECE)
    monkeypatch.setattr(shared, "SLAB", PIECE)
    for module in (shm, _pieces):
        monkeypatch.setattr(module, "PIECE", PIECE)


@pytest.fixture(params=["blocking", "loop"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    here, there = shm.pair(blocking=request.param == "blocking")
    yield here, there
    here.abort()
    there.abort()


def data(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def threaded(here: ShmConnection, there: ShmConnection, source: bytes) -> bytearray:
    """Sent by one thread and received by another."""
    target, done = bytearray(len(source)), list[object]()

    def receive() -> None:
        incoming = None
        while incoming is None:
            incoming = there.receive(1.0)
        incoming.into([memoryview(target)], done.append)
        while not done:
            there.receive(1.0)

    thread = threading.Thread(target=receive)
    thread.start()
    here.send(b"header", [here.register(source)])
    while not here.flush():
        pass
    thread.join(30)
    assert done
    return target


@pytest.mark.parametrize("size", [MIB + 1, 3 * MIB, 5 * MIB + 4095, 5 * MIB + 4097])
def test_every_byte_arrives_and_a_few_blocks_are_enough(pair: Pair, size: int) -> None:
    here, there = pair
    for _ in range(3):
        assert threaded(here, there, data(size)) == data(size)
    assert here._arena.nbytes <= BLOCKS * (PIECE + PAGE)
    through = here.stats.extra["shared_sent"]
    assert 0 < through <= 3 * size
    assert there.stats.extra["shared_received"] == through
    # What is not copied here goes through the socket.
    assert here.stats.extra["copied_in"] == there.stats.extra["copied_out"] == through
    for side in pair:
        assert side.stats.payload_copied <= 3 * 64 * KIB  # came with a header
    assert here.stats.payload_sent == there.stats.payload_received == 3 * size


def test_one_that_waits_for_blocks_sends_by_the_socket_meanwhile(pair: Pair) -> None:
    here, there = pair
    source = data(8 * MIB)
    here.send(b"", [here.register(source)])
    # The other end has taken nothing yet.
    assert here.stats.extra["shared_sent"] == BLOCKS * PIECE
    assert here.pending_output
    ends = Ends(here, there)
    (target,) = place(ends, ends.receive(there))
    assert target == source
    assert BLOCKS * PIECE < here.stats.extra["shared_sent"] < 8 * MIB


def test_what_fits_takes_the_other_ways(pair: Pair) -> None:
    here, there = pair
    ends = Ends(here, there)
    parts = [data(MIB), data(MIB // 2)]
    here.send(b"", [here.register(part) for part in parts])  # two regions: more than is staged
    assert place(ends, ends.receive(there)) == parts
    assert here.stats.extra["shared_sent"] == 0
    assert threaded(here, there, data(MIB)) == data(MIB)
    assert here.stats.extra["shared_sent"] == MIB


def test_messages_come_in_between(pair: Pair) -> None:
    here, there = pair
    ends = Ends(here, there)
    source = data(8 * MIB)
    here.send(b"large", [here.register(source)])
    for number in range(20):
        here.send(b"small %d" % number)
    incoming = ends.receive(there)
    assert bytes(incoming.header) == b"large"
    target, done = bytearray(len(source)), list[object]()
    incoming.into([memoryview(target)], done.append)
    for number in range(20):
        assert bytes(ends.receive(there).header) == b"small %d" % number
    assert not done
    ends.until(lambda: done)
    assert target == source


def test_the_rest_is_dropped(pair: Pair) -> None:
    here, there = pair
    ends = Ends(here, there)
    source = data(8 * MIB)
    here.send(b"", [here.register(source)])
    incoming = ends.receive(there)
    target = bytearray(len(source))
    incoming.into([memoryview(target)])
    ends.until(lambda: incoming.received >= 2 * MIB)
    done: list[object] = []
    incoming.discard(done.append)
    before = bytes(target)
    ends.until(lambda: done)
    assert bytes(target) == before
    here.send(b"next")
    assert bytes(ends.receive(there).header) == b"next"
    # The blocks came back all the same.
    ends.until(lambda: threaded(here, there, data(2 * MIB)) == data(2 * MIB))


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_an_end_in_the_middle(pair: Pair, who: str) -> None:
    here, there = pair
    ends = Ends(here, there)
    source = data(16 * MIB)
    here.send(b"", [here.register(source)])
    incoming = ends.receive(there)
    target = bytearray(len(source))
    incoming.into([memoryview(target)])
    ends.until(lambda: incoming.received >= 2 * MIB)
    (here if who == "sender" else there).abort()
    with pytest.raises(ConnectionLost):
        ends.until(lambda: there.receive(1.0) and False)
    assert target[: incoming.received] == source[: incoming.received]
    with pytest.raises(ConnectionLost):
        ends.until(here.flush)


@pytest.mark.parametrize("ends_with", ["a piece", "a message"])
def test_the_blocks_are_let_go_of_with_the_payload(pair: Pair, ends_with: str) -> None:
    here, there = pair
    ends = Ends(here, there)
    here.send(b"", [here.register(data(8 * MIB))])
    incoming = ends.receive(there)
    done: list[object] = []
    incoming.into([memoryview(bytearray(8 * MIB))], done.append)
    while not done:
        ends.step()
        if ends_with == "a message" and here.pending_output:
            here.send(b"behind it, and in the same call as a chunk")
    ends.until(lambda: not here.pending_output)
    here._arena.collect()
    segments = here._arena._segments.values()
    assert segments
    assert not any(s.used(index) for s in segments for index in range(s.blocks))


def test_a_segment_that_is_dropped_meanwhile_is_told_of(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a frame, which the last piece must not leave behind."""
    here, there = pair
    ends = Ends(here, there)
    assert here.allocate(MIB) is not None  # and dropped at once
    monkeypatch.setattr(shared, "KEPT", 0.0)
    trim = here._arena.trim
    monkeypatch.setattr(here._arena, "trim", lambda kept=0.0: trim(0.0))
    size = MIB + PIECE
    here.send(b"", [here.register(data(size))])
    (target,) = place(ends, ends.receive(there))
    assert target == data(size)
    ends.until(lambda: not here.pending_output)
    assert not here._outbox._frames
    here.send(b"next")
    assert bytes(ends.receive(there).header) == b"next"
    assert set(there._loans._segments) == set(here._arena._segments)


def test_what_is_queued_by_the_last_step_of_a_payload_is_not_forgotten() -> None:
    outbox = Outbox()
    outbox.add_payload(b"", 0, [Region(data(10))], None)
    outbox.sent(outbox.fill()[1])
    outbox.add_payload(b"", 0, [Region(data(5 * MIB))], None)
    outbox.fill()
    outbox.sent(10)  # the OPEN is out, and nothing of the payload
    while (flow := outbox.only()) is None:
        outbox.sent(outbox.fill()[1])
    outbox.add_frame(18, 0, [b"dropped"])
    flow.left = 0
    outbox.pushed(flow)
    assert outbox.pending
    assert b"".join(outbox.fill()[0]).endswith(b"dropped")


class Played:
    """A receiver whose sender is played by hand: 1000 bytes on their way on channel 3, and one
    segment of 64 KiB."""

    def __init__(self) -> None:
        self.raw, ours = socket.socketpair()
        side, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = ShmConnection(ours, side, blocking=False)
        fd = shared._new_segment(PAGE + 64 * KIB)
        socket.send_fds(self.theirs, [struct.pack("<IQI", 0, 64 * KIB, 1)], [fd])
        os.close(fd)
        self.raw.sendall(frame(2, struct.pack("<HQ", 1, 1000) + b"header", 3))
        incoming = self.connection.receive(1.0)
        assert incoming is not None
        self.target = bytearray(1000)
        incoming.into([memoryview(self.target)])

    def close(self) -> None:
        self.connection.abort()
        self.raw.close()
        self.theirs.close()


def body(segment: int = 0, block: int = 0, offset: int = 0, size: int = 1000) -> bytes:
    return struct.pack("<IIQQ", segment, block, offset, size)


@pytest.mark.parametrize(
    "said",
    [
        frame(shm.PIECE_AT, body(), 4),
        frame(shm.PIECE_AT, body(size=0), 3),
        frame(shm.PIECE_AT, body(size=1001), 3),
        frame(shm.PIECE_AT, body(segment=1), 3),
        frame(shm.PIECE_AT, body(block=1), 3),
        frame(shm.PIECE_AT, body(offset=64 * KIB - 999), 3),
        frame(shm.PIECE_AT, body()[:-1], 3),
        frame(shm.PIECE_AT, body() + b"1", 3),
    ],
    ids=["channel", "empty", "too much", "segment", "block", "outside", "short", "long"],
)
def test_pieces_that_make_no_sense(said: bytes) -> None:
    played = Played()
    try:
        played.raw.sendall(said)
        with pytest.raises(ProtocolError):
            Ends(played.connection).until(lambda: False)
        assert not any(played.target)
    finally:
        played.close()


def test_a_window_waits_for_a_block_and_not_for_long() -> None:
    side = Side()
    window = Window(side.arena, 50_000_000)
    views = []
    for _ in range(BLOCKS):
        taken = window.take()
        assert taken is not None
        side.arena.lend(taken[1], given=False)
        views.append(side.loans.view(taken[1]))
    begin = _clock.now()
    assert window.take() is None
    assert _clock.now() - begin >= 0.05
    assert Window(side.arena, 0).take() is not None  # another one has blocks of its own
    timer = threading.Timer(0.01, views.clear)
    timer.start()
    assert window.take() is not None
    timer.join()


def test_a_window_asks_for_another_block_once() -> None:
    side = Side(limit=2 * (PIECE + PAGE))
    window = Window(side.arena, 1_000_000)
    views = []
    for _ in range(2):
        taken = window.take()
        assert taken is not None
        side.arena.lend(taken[1], given=False)
        views.append(side.loans.view(taken[1]))
    assert window.take() is None
    tried = side.arena._next
    assert window.take() is None
    assert side.arena._next == tried
    del views
    assert window.take() is not None


def test_without_room_all_of_it_goes_through_the_socket() -> None:
    here, there = shm.pair(limit=1)
    try:
        assert threaded(here, there, data(3 * MIB)) == data(3 * MIB)
        assert here.stats.extra["shared_sent"] == 0
    finally:
        here.abort()
        there.abort()
