"""The reliable peer, both ends in one thread over real socket pairs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from gpuremote.errors import ConnectionLost, ProtocolError
from gpuremote.rpc.peer import Peer
from gpuremote.transport._incoming import Payload
from gpuremote.transport._looking import MISSES, REST, WITHIN, Looking
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.tcp import TcpConnection, pair
from gpuremote.wire.caps import WINDOW_BYTES
from gpuremote.wire.frames import HEADER, Kind
from gpuremote.wire.hello import Receipt


class End:
    """One end: records what arrives."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.peer = Peer(self, self.lock)
        self.messages: list[tuple[int, int, bytes]] = []
        self.payloads: list[bytes] = []
        self.cancelled: list[object] = []
        self.executed_there = 0
        self.refuse = False
        self.patient = False  # acknowledges payloads with the next message

    def on_message(self, kind: int, arg: int, body: memoryview) -> bool:
        self.messages.append((kind, arg, bytes(body)))
        return False

    def on_payload(
        self, kind: int, arg: int, body: memoryview, incoming: Incoming
    ) -> tuple[Sequence[memoryview], object] | None:
        if self.refuse:
            return None
        place = [bytearray(size) for size in incoming.sizes]
        return [memoryview(part) for part in place], place

    def on_payload_done(self, token: object) -> bool:
        assert isinstance(token, list)
        self.payloads.append(b"".join(token))
        return self.patient

    def on_landed(self, number: int, view: memoryview) -> bool | None:
        return None

    def on_payload_cancelled(self, token: object) -> None:
        self.cancelled.append(token)

    def on_executed(self, number: int) -> None:
        self.executed_there = number

    def executed(self) -> int:
        return len(self.messages)

    def step(self) -> bool:
        """Receive what is there; True if anything happened."""
        connection = self.peer.connection
        if connection is None:
            return False
        before = connection.stats.bytes_received
        try:
            connection.flush()
            incoming = connection.receive()
            if incoming is not None:
                self.peer.dispatch(incoming, connection)
                return True
        except ConnectionLost as error:
            self.peer.lost(error)
            return False
        return connection.stats.bytes_received != before


def connect(a: End, b: End) -> None:
    """A new connection, as after a handshake: both receipts are taken before either attaches."""
    first, second = pair(blocking=False)
    receipts = a.peer.receipt(), b.peer.receipt()
    a.peer.attach(first, receipts[1])
    b.peer.attach(second, receipts[0])


def settle(*ends: End, idle: int = 3) -> None:
    quiet = 0
    for _ in range(100_000):
        quiet = 0 if sum(end.step() for end in ends) else quiet + 1
        if quiet >= idle:
            return
    raise AssertionError("the peers do not come to rest")


def close(*ends: End) -> None:
    for end in ends:
        end.peer.lost(ConnectionLost("the test is over"))


def test_messages_and_payloads_arrive_in_order() -> None:
    a, b = End(), End()
    connect(a, b)
    data = random.Random(1).randbytes(3 << 20)
    delivered = []
    a.peer.post(Kind.BATCH, b"one", 1)
    a.peer.post_payload(
        Kind.PAYLOAD, b"two", [Region(data)], on_delivered=lambda: delivered.append(2)
    )
    a.peer.post(Kind.BATCH, b"three")
    settle(a, b)
    assert b.messages == [(Kind.BATCH, 1, b"one"), (Kind.BATCH, 0, b"three")]
    assert b.payloads == [data]
    assert delivered == [2]
    close(a, b)


def test_what_is_delivered_is_not_kept() -> None:
    a, b = End(), End()
    connect(a, b)
    for _ in range(1000):
        a.peer.post(Kind.BATCH, b"x" * 100)
    settle(a, b)
    b.peer.acknowledge()
    settle(a, b)
    assert a.peer.unacknowledged == 0
    assert len(b.messages) == 1000
    close(a, b)


def test_acknowledgements_do_not_answer_each_other() -> None:
    a, b = End(), End()
    connect(a, b)
    settle(a, b)
    before = a.peer.messages_sent + b.peer.messages_sent
    for _ in range(50):
        a.peer.post(Kind.BATCH, b"x")
        settle(a, b)
    assert a.peer.messages_sent + b.peer.messages_sent <= before + 52
    close(a, b)


def test_credit_bounds_what_is_on_its_way() -> None:
    a, b = End(), End()
    connect(a, b)
    settle(a, b)
    start = a.peer.credit
    assert 0 < start <= WINDOW_BYTES
    a.peer.post(Kind.BATCH, bytes(1000))
    assert a.peer.credit == start - 1000 - HEADER.size
    b.peer.held = True
    for _ in range(40):
        a.peer.post(Kind.BATCH, bytes(20_000))
        settle(a, b)
    assert a.peer.credit < start - 40 * 20_000
    b.peer.held = False
    b.peer.acknowledge()
    settle(a, b)
    assert a.peer.credit == WINDOW_BYTES
    close(a, b)


def test_a_payload_that_is_refused_is_dropped_and_acknowledged() -> None:
    a, b = End(), End()
    connect(a, b)
    b.refuse = True
    delivered = []
    region = Region(bytes(1 << 20))
    a.peer.post_payload(Kind.PAYLOAD, b"", [region], on_delivered=lambda: delivered.append(1))
    a.peer.post(Kind.BATCH, b"after")
    settle(a, b)
    assert delivered == [1]
    assert b.payloads == []
    assert b.messages == [(Kind.BATCH, 0, b"after")]
    close(a, b)


@pytest.mark.parametrize("seed", range(40))
def test_losses_anywhere_leave_nothing_out_and_nothing_twice(seed: int) -> None:
    """Both ends send, the connection breaks after random steps, again and again."""
    random_ = random.Random(seed)
    a, b = End(), End()
    sent: dict[int, list[bytes]] = {0: [], 1: []}
    payloads: dict[int, list[bytes]] = {0: [], 1: []}
    delivered: list[int] = []
    for round_ in range(12):
        connect(a, b)
        for side, end in enumerate((a, b)):
            for _ in range(random_.randrange(4)):
                body = random_.randbytes(random_.randrange(1, 2000))
                end.peer.post(Kind.BATCH, body)
                sent[side].append(body)
            if random_.random() < 0.7:
                data = [random_.randbytes(random_.randrange(300_000)) for _ in range(3)]
                end.peer.post_payload(
                    Kind.PAYLOAD,
                    b"",
                    [Region(part) for part in data],
                    on_delivered=lambda: delivered.append(1),
                )
                payloads[side].append(b"".join(data))
        for _ in range(random_.randrange(20)):
            random_.choice((a, b)).step()
        close(*random_.sample((a, b), 2))
        assert round_ < 12
    connect(a, b)
    settle(a, b)
    for end in (a, b):
        end.peer.acknowledge()
    settle(a, b)
    for side, end in enumerate((b, a)):
        assert [body for _, _, body in end.messages] == sent[side]
        assert sorted(end.payloads) == sorted(payloads[side])
    assert len(delivered) == len(payloads[0]) + len(payloads[1])
    assert a.peer.unacknowledged == b.peer.unacknowledged == 0
    close(a, b)


def test_cancelling_a_payload_on_its_way_frees_the_memory_and_keeps_the_session() -> None:
    a, b = End(), End()
    connect(a, b)
    memory = bytearray(20 << 20)
    region = Region(memory)
    entry = a.peer.post_payload(Kind.PAYLOAD, b"", [region])
    b.step()
    b.step()
    a.peer.cancel(entry)
    del entry
    region.release()
    memory.clear()  # would raise BufferError if anything still held the memory
    assert a.peer.connection is None
    b.peer.lost(ConnectionLost("seen later"))
    connect(a, b)
    a.peer.post(Kind.BATCH, b"after")
    settle(a, b)
    assert b.messages == [(Kind.BATCH, 0, b"after")]
    assert b.payloads == []
    assert len(b.cancelled) <= 1
    assert a.peer.bulk_in_flight == 0
    close(a, b)


def test_dropping_what_arrives_leaves_its_buffers_alone() -> None:
    a, b = End(), End()
    connect(a, b)
    a.peer.post_payload(Kind.PAYLOAD, b"", [Region(b"\xff" * (8 << 20))])
    places: list[bytearray] = []

    def on_payload(*_: object) -> tuple[Sequence[memoryview], object]:
        places.append(bytearray(8 << 20))
        return [memoryview(places[0])], places

    b.on_payload = on_payload  # type: ignore[method-assign,assignment]
    while not places or not any(places[0][:1]):
        b.step()
        a.step()
    assert b.peer.drop_arriving(places)
    copy = bytes(places[0])
    settle(a, b)
    assert bytes(places[0]) == copy
    assert 0 in copy
    assert b.payloads == []
    close(a, b)


def raw(seq: int, ack: int = 0, kind: int = Kind.BATCH, flags: int = 0) -> bytes:
    return HEADER.pack(kind, flags, 0, 0, seq, ack)


@pytest.mark.parametrize(
    "header",
    [
        b"short",
        raw(seq=2),
        raw(seq=1, ack=9),
        raw(seq=1, kind=99),
        raw(seq=0, kind=99),
        raw(seq=5, flags=1),
        raw(seq=0, kind=Kind.ACK) + b"odd",
    ],
)
def test_what_breaks_the_protocol(header: bytes) -> None:
    b = End()
    first, second = pair(blocking=False)
    b.peer.attach(second, Receipt())
    first.send(header)
    with pytest.raises(ProtocolError):
        settle(b, idle=100)
    first.abort()
    close(b)


def test_kinds_that_may_be_ignored() -> None:
    b = End()
    first, second = pair(blocking=False)
    b.peer.attach(second, Receipt())
    first.send(raw(seq=1, kind=99, flags=128))
    first.send(raw(seq=0, kind=98, flags=128))
    first.send(raw(seq=2) + b"x")
    for _ in range(10):
        b.step()
    assert b.messages == [(Kind.BATCH, 0, b"x")]
    first.abort()
    close(b)


def test_a_receipt_for_what_was_never_sent() -> None:
    b = End()
    first, second = pair(blocking=False)
    with pytest.raises(ProtocolError, match="claims"):
        b.peer.attach(second, Receipt(seen=3))
    for connection in (first, second):
        assert isinstance(connection, TcpConnection)
        connection.abort()


def test_ping() -> None:
    a, b = End(), End()
    connect(a, b)
    a.peer.control(Kind.PING, arg=77)
    settle(a, b)
    assert a.peer.last_pong == 77
    close(a, b)


class Deaf:
    """A connection over which nothing comes."""

    def __init__(self) -> None:
        self.calls = 0
        self.pause = 0.0
        """Seconds of a receive that waits."""

    def receive(self, wait: float = 0.0) -> Incoming | None:
        self.calls += 1
        if wait:
            time.sleep(self.pause)
        return None


def test_looking_that_does_not_help_is_left_out() -> None:
    """Until a wait was so short that it would have helped; and without being asked to, always."""
    peer, deaf = End().peer, Deaf()
    connection: Any = deaf

    def looks() -> bool:
        before = deaf.calls
        assert not peer.take(connection, 1.0, 32)
        calls = deaf.calls - before  # fewer on a busy machine, as time counts as well
        assert 1 <= calls <= 33
        return calls > 1

    for _ in range(50):
        assert not peer.take(connection)
    assert deaf.calls == 50
    deaf.pause = 10 * WITHIN
    assert [looks() for _ in range(20)] == MISSES * [True] + (20 - MISSES) * [False]
    for _ in range(100):  # on a busy machine no wait is short
        deaf.pause = 0.0
        assert not looks()
        deaf.pause = 10 * WITHIN
        if looks():
            break
    else:
        raise AssertionError("it never looks again")
    assert [looks() for _ in range(MISSES)] == (MISSES - 1) * [True] + [False]
    deaf.pause = 2 * REST
    assert not looks()
    assert not looks()  # nothing came


def test_what_was_left_is_looked_at_once_more() -> None:
    """The wait right after looking in vain is short where the peer was about to come: that says
    nothing, as looking did not help."""
    looking = Looking()
    for _ in range(MISSES):
        assert looking.due
        looking.looked(False)
        looking.waited(0.0, True)
    assert not looking.due
    looking.waited(2 * REST, False)  # nothing at all
    assert not looking.due
    looking.waited(2 * WITHIN, True)
    assert not looking.due
    looking.waited(0.0, True)
    assert looking.due
    for _ in range(MISSES):
        looking.looked(False)
    looking.waited(2 * REST, True)  # something new begins
    assert looking.due


@pytest.mark.parametrize("patient", [False, True])
def test_a_payload_is_acknowledged_with_the_next_message(patient: bool) -> None:
    a, b = End(), End()
    b.patient = patient
    connect(a, b)
    settle(a, b)
    delivered: list[int] = []
    for turn in range(10):
        sent = b.peer.messages_sent
        a.peer.post_payload(
            Kind.PAYLOAD, b"", [Region(bytes(100_000))], partial(delivered.append, turn)
        )
        settle(a, b)
        assert b.peer.owing == patient
        assert b.peer.messages_sent - sent == 1 - patient
        b.peer.post(Kind.BATCH, b"next")
        assert not b.peer.owing
        settle(a, b)
        assert delivered == list(range(turn + 1))
        assert b.peer.messages_sent - sent == 2 - patient
    assert a.peer.bulk_in_flight == 0
    close(a, b)


def one_that_owes() -> tuple[End, End]:
    """Two ends, the second of which has yet to say that a payload arrived."""
    a, b = End(), End()
    b.patient = True
    connect(a, b)
    settle(a, b)
    a.peer.post_payload(Kind.PAYLOAD, b"", [Region(bytes(100_000))])
    settle(a, b)
    assert b.peer.owing
    assert a.peer.bulk_in_flight == 1
    return a, b


def test_a_payload_that_nothing_follows_is_acknowledged_when_asked_to_be() -> None:
    a, b = one_that_owes()
    b.peer.acknowledge()
    assert not b.peer.owing
    settle(a, b)
    assert a.peer.bulk_in_flight == 0
    close(a, b)


def test_what_a_new_connection_says_is_not_owed_any_more() -> None:
    a, b = one_that_owes()
    close(a, b)
    assert b.peer.owing
    connect(a, b)
    assert not b.peer.owing
    assert a.peer.bulk_in_flight == 0
    close(a, b)


@pytest.mark.parametrize("where", ["on_payload", "into"])
def test_an_interruption_where_a_payload_begins(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: the connection is given up, and the next one brings what is missing."""
    a, b = End(), End()
    here, there = pair()
    a.peer.connection, b.peer.connection = here, there
    data = random.Random(1).randbytes(100_000)
    a.peer.post(Kind.BATCH, b"before")
    assert b.peer.take(there, 1.0)
    a.peer.post_payload(Kind.PAYLOAD, b"12345678", [Region(data)])

    def interrupts(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "on_payload":
            patch.setattr(b, where, interrupts)
        else:
            patch.setattr(Payload, where, interrupts)
        with pytest.raises(KeyboardInterrupt):
            b.peer.take(there, 1.0)
    assert there.closed
    for end in (a, b):
        end.peer.lost(ConnectionLost("interrupted"))
    here, there = pair()
    try:
        receipts = a.peer.receipt(), b.peer.receipt()
        a.peer.attach(here, receipts[1])
        b.peer.attach(there, receipts[0])
        while not b.payloads:
            b.peer.take(there, 1.0)
            here.flush()
        assert b.payloads == [data]
        a.peer.post(Kind.BATCH, b"behind")
        while len(b.messages) < 2:
            b.peer.take(there, 1.0)
        assert [body for _, _, body in b.messages] == [b"before", b"behind"]
    finally:
        here.abort()
        there.abort()


def test_an_interruption_where_a_payload_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the thread that receives: whoever waits for the payload is told all the same, as it
    does not come again."""
    a, b = End(), End()
    here, there = pair()
    a.peer.connection, b.peer.connection = here, there
    data = random.Random(1).randbytes(100_000)
    a.peer.post_payload(Kind.PAYLOAD, b"12345678", [Region(data)])
    done = b.on_payload_done

    def interrupted(token: object) -> bool:
        monkeypatch.setattr(b, "on_payload_done", done)
        raise KeyboardInterrupt

    def take_all() -> None:
        while True:
            b.peer.take(there, 1.0)

    monkeypatch.setattr(b, "on_payload_done", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take_all()
    assert b.payloads == [data]
    assert not b.peer.arriving
    receipt = b.peer.receipt()
    assert (receipt.seen, receipt.partial) == (1, [])
    close(a, b)
