"""Payload of which the receiver knows, before it comes, where it goes (``Connection.expect``)."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from gpuremote._speed import native
from gpuremote.rpc.peer import Peer
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.tcp import TcpConnection, pair
from gpuremote.wire.frames import HEADER, NUMBER, Kind, decode_ack

MIB = 1 << 20
SIZE = 100_000

needs_c = pytest.mark.skipif(native is None, reason="the twin takes no hints")


def header(seq: int = 5, ack: int = 0, number: int = 9, arg: int = 0) -> bytes:
    return HEADER.pack(Kind.PAYLOAD, 0, 0, arg, seq, ack) + NUMBER.pack(number)


class Place:
    """Memory for a payload, and what is heard of it."""

    def __init__(self, size: int = SIZE) -> None:
        self.memory = bytearray(size)
        self.view = memoryview(self.memory)
        self.data = random.Random(size).randbytes(size)
        self.done: list[Incoming] = []

    @property
    def untouched(self) -> bool:
        return not any(self.memory)


@pytest.fixture
def ends() -> Iterator[tuple[TcpConnection, TcpConnection]]:
    here, there = pair()
    yield here, there
    here.abort()
    there.abort()


def take(connection: TcpConnection) -> Incoming:
    incoming = connection.receive(1.0)
    assert incoming is not None
    return incoming


@needs_c
def test_what_is_expected_is_in_place_before_anybody_asks(
    ends: tuple[TcpConnection, TcpConnection],
) -> None:
    here, there = ends
    place = Place()
    assert there.expects
    assert there.expect(header(), place.view, b"")
    here.send(header(ack=77), [Region(place.data)])
    before = there.stats.receives
    incoming = take(there)
    assert bytes(incoming.header) == header(ack=77)
    assert (incoming.sizes, incoming.received) == ((SIZE,), SIZE)
    assert place.memory == place.data
    assert there.stats.receives - before == 2  # up to the payload, and that
    assert there.stats.payload_received == SIZE
    assert there.stats.payload_copied == 0
    incoming.into([place.view], place.done.append)
    assert place.done == [incoming]
    here.send(b"next")
    assert bytes(take(there).header) == b"next"


@needs_c
@pytest.mark.parametrize(
    "message",
    [
        (header(seq=6), [SIZE]),
        (header(number=10), [SIZE]),
        (header(arg=1), [SIZE]),
        (header() + b"more", [SIZE]),
        (header(), [SIZE - 1]),
        (header(), [SIZE // 2, SIZE // 2]),
        (header(), []),
    ],
    ids=["another seq", "number", "arg", "length", "size", "two regions", "no payload"],
)
def test_another_message_comes_as_ever(
    ends: tuple[TcpConnection, TcpConnection], message: tuple[bytes, list[int]]
) -> None:
    here, there = ends
    place = Place()
    there.expect(header(), place.view, b"")
    text, sizes = message
    data = [random.Random(size).randbytes(size) for size in sizes]
    here.send(text, [Region(part) for part in data])
    incoming = take(there)
    assert (bytes(incoming.header), incoming.sizes) == (text, tuple(sizes))
    assert place.untouched
    found = [bytearray(size) for size in sizes]
    incoming.into([memoryview(part) for part in found], place.done.append)
    while not place.done:
        there.receive(1.0)
    assert found == data
    assert place.untouched


@needs_c
@pytest.mark.parametrize("how", ["into", "elsewhere", "discard"])
@pytest.mark.parametrize("size", [SIZE, 9 * MIB])
def test_what_is_left_comes_by_and_by(how: str, size: int) -> None:
    """Of the larger one a part is here when it is looked at."""
    here, there = pair(blocking=False)
    try:
        place, other = Place(size), bytearray(size)
        there.expect(header(), place.view, b"")
        here.send(header(), [Region(place.data)])
        incoming = there.receive()
        assert incoming is not None
        begun = incoming.received
        assert begun == size if size == SIZE else 0 < begun < size
        assert place.memory[:begun] == place.data[:begun]
        if how == "discard":
            incoming.discard(place.done.append)
        else:
            incoming.into([place.view if how == "into" else memoryview(other)], place.done.append)
        while not place.done:
            here.flush()
            there.receive()
        if how == "into":
            assert place.memory == place.data
        else:
            assert other == (place.data if how == "elsewhere" else bytes(size))
            assert not any(place.memory[begun:])
        here.send(b"next")
        following = there.receive()
        assert following is not None
        assert bytes(following.header) == b"next"
    finally:
        here.abort()
        there.abort()


@needs_c
@pytest.mark.parametrize("how", ["landed", "another comes", "none is expected"])
def test_the_memory_is_let_go_of(ends: tuple[TcpConnection, TcpConnection], how: str) -> None:
    here, there = ends
    array = np.zeros(SIZE, np.uint8)
    view, gone = array.data, weakref.ref(array)
    there.expect(header(), view, b"")
    if how == "landed":
        here.send(header(), [Region(bytes(SIZE))])
        take(there).into([view])
    elif how == "another comes":
        here.send(HEADER.pack(Kind.BATCH, 0, 0, 0, 5, 0))
        take(there)
    else:
        there.expect(b"", None, b"")
    del array, view
    gc.collect()
    assert gone() is None


@needs_c
def test_a_control_message_may_come_before_it(ends: tuple[TcpConnection, TcpConnection]) -> None:
    here, there = ends
    place = Place()
    there.expect(header(), place.view, b"")
    here.send(HEADER.pack(Kind.PING, 0, 0, 1, 0, 0))
    take(there)
    here.send(header(), [Region(place.data)])
    assert take(there).received == SIZE
    assert place.memory == place.data


@needs_c
def test_an_end_in_the_middle(ends: tuple[TcpConnection, TcpConnection]) -> None:
    """Nothing says that it came, so it comes again over the next connection."""
    here, there = ends
    place = Place(4 * MIB)
    there.expect(header(), place.view, b"")
    here.send(header(), [Region(place.data)])
    threading.Timer(0.05, there.abort).start()
    incoming = there.receive(1.0)
    assert incoming is None or incoming.received < 4 * MIB


@needs_c
@pytest.mark.parametrize(
    "bad",
    [(b"short", b""), (header(), bytes(5000)), ("text", b""), (header(), "text")],
    ids=["header", "answer", "type", "type of answer"],
)
def test_hints_that_make_no_sense(
    ends: tuple[TcpConnection, TcpConnection], bad: tuple[bytes, bytes]
) -> None:
    text, answer = bad
    with pytest.raises((TypeError, ValueError), match="expect"):
        ends[1].expect(text, memoryview(bytearray(10)), answer)


@needs_c
def test_hints_that_are_of_no_use(ends: tuple[TcpConnection, TcpConnection]) -> None:
    for view in (memoryview(b""), memoryview(b"read-only"), memoryview(bytearray(8))[::2]):
        assert not ends[1].expect(header(), view, b"")


@needs_c
def test_what_came_with_what_announced_it_is_not_expected_any_more(
    ends: tuple[TcpConnection, TcpConnection],
) -> None:
    here, there = ends
    array = np.zeros(SIZE, np.uint8)
    view, gone = array.data, weakref.ref(array)
    with here.together():
        here.send(HEADER.pack(Kind.BATCH, 0, 0, 0, 4, 0))
        here.send(header(), [Region(bytes(SIZE))])
    assert HEADER.unpack(take(there).header)[0] == Kind.BATCH
    assert there.expect(header(), view, b"")
    incoming = take(there)
    done: list[object] = []
    incoming.into([view], done.append)
    while not done:
        there.receive(1.0)
    del array, view, incoming
    done.clear()
    gc.collect()
    assert gone() is None


# -- told at once ---------------------------------------------------------------------------------


class Waiting:
    """An end that expects one payload, after a message that announced it."""

    def __init__(self, place: Place, shortly: bool = True) -> None:
        self.peer = Peer(self, threading.RLock())
        self.place = place
        self.shortly = shortly
        self.arrived = 0
        self.told_before = -1

    def on_message(self, kind: int, arg: int, body: memoryview) -> bool:
        self.peer.expect(Kind.PAYLOAD, NUMBER.pack(9), self.place.view, tell=True)
        return False

    def on_payload(
        self, kind: int, arg: int, body: memoryview, incoming: Incoming
    ) -> tuple[Sequence[memoryview], object]:
        self._note()
        return [self.place.view], None

    def on_landed(self, number: int, view: memoryview) -> bool | None:
        assert (number, view) == (9, self.place.view)
        if not self.shortly:
            return None
        self._note()
        return self.on_payload_done(None)

    def _note(self) -> None:
        assert self.peer.connection is not None
        self.told_before = self.peer.connection.stats.messages_sent

    def on_payload_done(self, token: object) -> bool:
        self.arrived += 1
        return False

    def on_payload_cancelled(self, token: object) -> None:
        raise AssertionError("nothing was cancelled")

    def on_executed(self, number: int) -> None: ...

    def executed(self) -> int:
        return 41


def exchange(place: Place, *, number: int = 9, shortly: bool = True) -> tuple[Waiting, list[bytes]]:
    """The end that got it, and what it sent."""
    here, there = pair()
    try:
        sender, receiver = Peer(Waiting(place), threading.RLock()), Waiting(place, shortly)
        sender.connection, receiver.peer.connection = here, there
        sender.post(Kind.BATCH, b"announced")
        assert receiver.peer.take(there, 1.0)
        sender.post_payload(Kind.PAYLOAD, NUMBER.pack(number), [Region(place.data)])
        while not receiver.arrived:
            receiver.peer.take(there, 1.0)
        assert there.stats.payload_received == SIZE
        assert receiver.peer.messages_received == 2
        assert not receiver.peer.arriving
        sender.post(Kind.BATCH, b"another")  # goes on as ever
        assert receiver.peer.take(there, 1.0)
        sent = []
        while (incoming := here.receive()) is not None:
            sent.append(bytes(incoming.header))
        return receiver, sent
    finally:
        here.abort()
        there.abort()


@pytest.mark.parametrize("shortly", [True, False])
def test_it_is_told_once_and_before_it_is_looked_at(shortly: bool) -> None:
    place = Place()
    receiver, sent = exchange(place, shortly=shortly)
    assert place.memory == place.data
    assert [HEADER.unpack_from(message)[0] for message in sent] == [Kind.ACK]
    ack = decode_ack(sent[0][HEADER.size :])
    assert ack.delivered == (2,)
    assert ack.executed == 41
    assert receiver.told_before == (0 if native is None else 1)
    assert not receiver.peer.owing
    assert receiver.peer.receipt().seen == 3


def test_another_payload_is_told_when_it_has_been_taken_in() -> None:
    place = Place()
    receiver, sent = exchange(place, number=10)
    assert receiver.told_before == 0
    assert [decode_ack(message[HEADER.size :]).delivered for message in sent] == [(2,)]


@needs_c
@pytest.mark.parametrize("where", ["on_landed", "on_payload", "on_payload_done"])
def test_an_interruption_while_it_is_taken_in(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are gone from the socket: the connection is given up, and the next one brings
    them again if they were not counted as here."""

    class Interrupted(Waiting):
        pass

    def interrupts(self: Waiting, *args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Interrupted, where, interrupts)
    array = np.zeros(SIZE, np.uint8)
    place = Place()
    place.view, gone = array.data, weakref.ref(array)
    here, there = pair()
    try:
        sender = Peer(Waiting(place), threading.RLock())
        receiver = Interrupted(place, shortly=where == "on_landed")
        sender.connection, receiver.peer.connection = here, there
        sender.post(Kind.BATCH, b"announced")
        assert receiver.peer.take(there, 1.0)
        sender.post_payload(Kind.PAYLOAD, NUMBER.pack(9), [Region(place.data)])
        with pytest.raises(KeyboardInterrupt):
            receiver.peer.take(there, 1.0)
        assert there.closed
        assert receiver.peer.receipt().seen == (2 if where == "on_payload_done" else 1)
        receiver.peer.forget()
    finally:
        here.abort()
        there.abort()
    del array, place.view, receiver
    gc.collect()
    assert gone() is None
