"""RDMA connections whose verbs go wrong, whose peer lies, or whose program changes its mind."""

from __future__ import annotations

import dataclasses
import gc
import struct
from collections.abc import Iterator

import pytest

from gpuremote.errors import ConnectionLost, GpuRemoteError, InternalError, ProtocolError
from gpuremote.testing.driving import Ends, place, random_parts
from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport.base import Connection, Incoming
from gpuremote.transport.rdma import Options, RdmaConnection, frames
from gpuremote.transport.rdma.control import RECEIVES, SLOT
from gpuremote.transport.rdma.lanes import SENDS
from gpuremote.transport.verbs.base import Access, Status
from tests.rdma.ends import LOOPBACK, connected

MIB = 1 << 20
Pair = tuple[RdmaConnection, RdmaConnection]


@pytest.fixture
def verbs() -> FakeVerbs:
    return FakeVerbs()


@pytest.fixture
def pair(verbs: FakeVerbs) -> Iterator[Pair]:
    here, there = connected(blocking=False, over=LOOPBACK, provider=verbs)
    yield here, there
    here.abort()
    there.abort()
    # Whatever happened: nothing of it is left.
    assert (verbs.open_devices, verbs.registered, verbs.pairs) == (0, 0, {})


@pytest.fixture
def ends(pair: Pair) -> Ends:
    return Ends(*pair)


def end_of(*connections: RdmaConnection) -> GpuRemoteError:
    """Step until one is lost; what it said."""
    ends = Ends(*connections)
    try:
        ends.until(lambda: False)
    except (ConnectionLost, ProtocolError) as error:
        return error
    raise AssertionError("it goes on")


def begin(pair: Pair, ends: Ends, size: int, done: list[Incoming] | None = None) -> Incoming:
    """Announce a payload, and say where it goes."""
    here, there = pair
    here.send(b"", [here.register(bytes(size))])
    incoming = ends.receive(there)
    incoming.into([memoryview(bytearray(size))], None if done is None else done.append)
    return incoming


# -- work requests that fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (Status.RETRY_EXC_ERR, "is the link up"),
        (Status.RNR_RETRY_EXC_ERR, "credits"),
        (Status.WR_FLUSH_ERR, "had failed already"),
        (Status.LOC_PROT_ERR, "unmapped"),
        (Status.GENERAL_ERR, "dmesg"),
    ],
    ids=lambda value: value.name if isinstance(value, Status) else "",
)
@pytest.mark.parametrize("write", [False, True], ids=["message", "write"])
def test_a_failure_is_explained(
    pair: Pair, ends: Ends, verbs: FakeVerbs, status: Status, advice: str, write: bool
) -> None:
    here, there = pair
    if write:
        begin(pair, ends, 16 * MIB)
        ends.until(lambda: there.stats.payload_received)
        assert there.stats.payload_received < 16 * MIB
        verbs.fail(status)
    else:
        verbs.fail(status)
        here.send(b"lost")
    said = end_of(here, there)
    assert isinstance(said, ConnectionLost)
    assert said.retryable
    assert status.name in said.message
    assert advice in said.message
    assert "fake0" in said.message
    assert "0x51" in said.message
    assert ("a write of" in said.message) == write
    # The other end learns why as well.
    assert status.name in str(end_of(there))
    assert status.name in str(end_of(here))


def test_a_port_that_is_down_by_now(pair: Pair, verbs: FakeVerbs) -> None:
    verbs.port = dataclasses.replace(verbs.port, active=False, state="down")
    verbs.link = False
    pair[0].send(b"lost")
    assert "port 1 of fake0 is down" in str(end_of(pair[0]))


def test_a_status_that_nobody_knows(pair: Pair, verbs: FakeVerbs) -> None:
    verbs._failures.append(77)
    pair[0].send(b"lost")
    assert "status 77" in str(end_of(pair[0]))


def test_the_first_failure_counts(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, _ = pair
    verbs.holding = True
    for _ in range(20):
        here.send(bytes(SLOT // 2))
    verbs.fail(Status.LOC_PROT_ERR)
    verbs.let_go()
    assert "LOC_PROT_ERR" in str(end_of(here))


def test_memory_is_free_once_the_loss_is_known(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, there = pair
    target = bytearray(16 * MIB)
    here.send(b"", [here.register(b"\x55" * len(target))])
    incoming = ends.receive(there)
    called: list[Incoming] = []
    incoming.into([memoryview(target)], called.append)
    ends.until(lambda: incoming.received)
    verbs.link = False
    for end in pair:
        end_of(end)
    assert verbs.registered == 0
    target.clear()  # nobody holds it: a bytearray that is exported does not shrink
    assert not called


def test_what_came_before_the_loss_is_delivered(pair: Pair) -> None:
    here, there = pair
    here.send(b"first")
    here.send(b"second")
    here.abort()
    got: list[bytes] = []
    ends = Ends(there)
    ends.take = lambda _, incoming: got.append(bytes(incoming.header))
    with pytest.raises(ConnectionLost):
        ends.until(lambda: False)
    assert got == [b"first", b"second"]


# -- completions -----------------------------------------------------------------------------------


def test_completions_that_come_late(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    """Memory is not given back before the card is through with it."""
    here, there = pair
    freed: list[str] = []
    source = bytes(3 * MIB)
    here.send(b"", [here.register(source)], lambda: freed.append("source"))
    incoming = ends.receive(there)
    done: list[Incoming] = []
    incoming.into([memoryview(bytearray(len(source)))], done.append)
    verbs.withheld = True
    for _ in range(20):
        ends.step()
    assert not freed
    assert not done
    verbs.report()
    ends.until(lambda: freed and done)


def test_completions_that_come_after_the_end(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, there = pair
    begin(pair, ends, 3 * MIB)
    verbs.withheld = True
    for _ in range(5):
        ends.step()
    here.abort()
    there.abort()
    verbs.report()  # to queues that are closed
    with pytest.raises(ConnectionLost):
        here.receive()


def test_an_event_for_nothing(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, there = pair
    for _ in range(3):
        verbs.rouse()
        assert there.receive() is None
    here.send(b"after")
    assert bytes(ends.receive(there).header) == b"after"


def test_an_event_that_never_comes(pair: Pair, verbs: FakeVerbs) -> None:
    """What was reported without an event is found when the watch looks."""
    here, there = pair
    there.receive()
    verbs.forget_who_waits()
    here.send(b"silent")
    due = there.due()
    assert due is not None
    assert due <= 1.0
    incoming = there.receive()
    assert incoming is not None
    assert bytes(incoming.header) == b"silent"


def test_more_writes_than_a_card_takes(pair: Pair, ends: Ends) -> None:
    here, there = pair
    sources = random_parts([20_000] * (5 * SENDS))
    here.send(b"", [here.register(source) for source in sources])
    assert place(ends, ends.receive(there)) == sources
    assert here.stats.sends > 5 * SENDS


def test_a_largest_message_of_the_port(verbs: FakeVerbs) -> None:
    verbs.port = dataclasses.replace(verbs.port, max_message=100_000)
    here, there = connected(blocking=True, over=LOOPBACK, provider=verbs, options=Options(lanes=1))
    try:
        verbs.written.clear()
        ends = Ends(here, there)
        source = random_parts([250_001])
        here.send(b"", [here.register(source[0])])
        assert place(ends, ends.receive(there)) == source
        assert verbs.written == [100_000, 100_000, 50_001]
    finally:
        here.abort()
        there.abort()


# -- credit ----------------------------------------------------------------------------------------


def test_a_reader_that_does_not_read(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    """The sender stops when the ring is full: no send finds it without a receive."""
    here, there = pair
    count = 4 * RECEIVES
    for number in range(count):
        here.send(struct.pack("<I", number) + bytes(SLOT // 2))
    for _ in range(50):
        here.flush()
    assert here.pending_output
    got: list[int] = []
    while len(got) < count:
        incoming = ends.receive(there)
        got.append(struct.unpack_from("<I", incoming.header)[0])
    assert got == list(range(count))
    assert not here.pending_output


def test_credit_in_one_direction_only(pair: Pair, ends: Ends) -> None:
    """A side that only receives says so by itself, and that ends nowhere."""
    here, there = pair
    for _ in range(20 * RECEIVES):
        here.send(bytes(SLOT - 100))
        ends.receive(there)
    for _ in range(20):
        ends.step()
    sent = there.stats.sends
    assert 20 <= sent <= 2 * 20 + 20
    for _ in range(20):
        ends.step()
    assert there.stats.sends == sent


def test_both_full(pair: Pair, ends: Ends) -> None:
    here, there = pair
    for _ in range(3 * RECEIVES):
        here.send(bytes(SLOT - 100))
        there.send(bytes(SLOT - 100))
    got: dict[Connection, int] = {here: 0, there: 0}

    def take(end: Connection, _: Incoming) -> None:
        got[end] += 1

    ends.take = take
    ends.until(lambda: got == {here: 3 * RECEIVES, there: 3 * RECEIVES})


# -- payload that is dropped -----------------------------------------------------------------------


def test_a_lane_that_is_made_again(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    """Memory is taken back while the peer writes; what else is on that lane gets through."""
    here, there = pair
    kept = random_parts([6 * MIB])[0]
    here.send(b"dropped", [here.register(b"\x55" * 8 * MIB)])
    here.send(b"kept", [here.register(kept)])
    dropped = ends.receive(there)
    target = bytearray(8 * MIB)
    called: list[str] = []
    dropped.into([memoryview(target)], lambda _: called.append("into"))
    incoming = ends.receive(there)
    into = bytearray(len(kept))
    incoming.into([memoryview(into)], lambda _: called.append("kept"))
    ends.until(lambda: dropped.received)
    # Pieces of both are asked for; the peer will write them later.
    verbs.holding = True
    for _ in range(3):
        ends.step()
    dropped.discard(lambda _: called.append("dropped"))
    target[:] = bytes(len(target))
    verbs.let_go()
    ends.until(lambda: len(called) == 2)
    assert sorted(called) == ["dropped", "kept"]
    assert into == kept
    assert not any(target)
    assert here.stats.extra["lanes_renewed"] >= 1
    for lane in there._in._lanes:
        assert not lane.revoked
        assert not lane.pieces
    here.send(b"after", [here.register(kept)])
    assert place(ends, ends.receive(there)) == [kept]


def test_dropped_when_it_is_complete(pair: Pair, ends: Ends) -> None:
    here, there = pair
    incoming = begin(pair, ends, 100_000)
    Ends(here).until(lambda: here.stats.payload_sent)
    there.flush()  # it is complete, and receive() has not told it
    called: list[str] = []
    incoming.discard(lambda _: called.append("discard"))
    ends.until(lambda: called)
    incoming.discard(lambda _: called.append("again"))
    ends.step()
    assert called == ["discard"]


def test_into_twice(pair: Pair, ends: Ends) -> None:
    here, there = pair
    for size in (10, 100_000):
        here.send(b"", [here.register(bytes(size))])
        incoming = ends.receive(there)
        incoming.into([memoryview(bytearray(size))])
        with pytest.raises(InternalError):
            incoming.into([memoryview(bytearray(size))])


def test_undecided(pair: Pair, ends: Ends) -> None:
    here, there = pair
    for size in (10, 100_000):
        here.send(b"", [here.register(bytes(size))])
        incoming = ends.receive(there)
        with pytest.raises(InternalError):
            there.receive()
        incoming.discard()


def test_memory_that_can_not_be_registered(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, there = pair
    here.send(b"", [here.register(bytes(MIB))])
    incoming = ends.receive(there)
    verbs.lockable = verbs.registered
    incoming.into([memoryview(bytearray(MIB))])
    assert "ulimit -l" in str(end_of(there))


# -- a peer that lies ------------------------------------------------------------------------------


def piece(**changes: int) -> bytes:
    fields = {"channel": 0, "number": 0, "lane": 0, "offset": 0, "size": 100} | changes
    segments = (frames.Segment(0, fields["size"], 1),)
    return frames.encode_piece(frames.Piece(**fields, segments=segments))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (99, b""),
        (frames.BYE, b"x"),
        (frames.OPEN, b""),
        (frames.OPEN, frames.encode_open(3, [0])),
        (frames.EAGER, b"\xff\xff\xff\xff"),
        (frames.EAGER, frames.encode_eager(0, [1 << 40])),
        (frames.EAGER, frames.encode_eager(4, [4]) + b"1234567"),
        (frames.PIECE, b"short"),
        (frames.PIECE, piece(channel=1)),
        (frames.PIECE, piece(lane=9)),
        (frames.PIECE, piece(offset=MIB)),
        (frames.PIECE, piece(offset=(1 << 64) - 100)),
        (frames.PIECE, piece(size=2 * MIB)),
        (frames.PIECE, piece(size=0)),
        (frames.DROP, b"12345"),
        (frames.DROPPED, frames.encode_channel(0)),
        (frames.LANE, b"12345"),
        (frames.LANE, frames.encode_lane(0, 5, 5)),
        (frames.LANE, frames.encode_lane(7, 5, 5)),
        (frames.LANE_READY, frames.encode_lane(0, 5, 5)),
    ],
)
def test_frames_that_no_honest_peer_sends(pair: Pair, ends: Ends, kind: int, body: bytes) -> None:
    here, there = pair
    there.send(b"", [there.register(bytes(MIB))])  # channel 0 is open
    ends.receive(here).discard()
    here._control.add(kind, body)
    here.flush()
    assert isinstance(end_of(there), ProtocolError)
    with pytest.raises(ProtocolError):
        there.send(b"x")


def test_credit_for_more_than_was_sent(pair: Pair) -> None:
    here, there = pair
    here._control._consumed = 1000
    here.send(b"x")
    assert "credit" in str(end_of(there))


def test_more_than_there_is(pair: Pair, ends: Ends) -> None:
    """The same bytes are asked for twice."""
    here, there = pair
    here.send(b"", [here.register(bytes(MIB))])
    ends.receive(there)
    target = memoryview(bytearray(MIB))
    held = there._rails[0].registry.acquire(target, 0, MIB, Access.WRITE_HERE | Access.WRITE_THERE)
    for number in (100, 101):
        there._in._lanes[0].pair.post_receive(
            1 << 40, there._rails[0].sink, 1, there._rails[0].sink_key
        )
        segment = frames.Segment(held.address, MIB, held.rkey)
        wanted = frames.Piece(0, number, 0, 0, MIB, (segment,))
        there._control.add(frames.PIECE, frames.encode_piece(wanted))
    there.flush()
    assert isinstance(end_of(here), ProtocolError)


def test_a_message_on_the_first_connection(pair: Pair) -> None:
    here, there = pair
    here._base.send(b"the card burns")
    assert "the card burns" in str(end_of(there))


# -- the rest --------------------------------------------------------------------------------------


def test_allocated_memory_is_sent_as_it_is(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, there = pair
    memory = here.allocate(2 * MIB)
    assert memory is not None
    memory[:] = b"\x07" * len(memory)
    registered = here._rails[0].registry.made
    here.send(b"", [here.register(memory)])
    assert place(ends, ends.receive(there)) == [b"\x07" * 2 * MIB]
    assert here._rails[0].registry.made == registered
    here.abort()
    assert here.allocate(1) is None
    assert memory[0] == 7
    del memory
    gc.collect()


def test_small_payload_travels_with_its_header(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, there = pair
    verbs.written.clear()
    parts = random_parts([100, 0, 8000])
    here.send(b"header", [here.register(part) for part in parts])
    assert place(ends, ends.receive(there)) == parts
    assert verbs.written == []
    assert there.stats.payload_copied == 8100
    large = random_parts([100_000])
    here.send(b"header", [here.register(large[0])])
    assert place(ends, ends.receive(there)) == large
    assert verbs.written == [100_000]
    assert there.stats.payload_copied == 8100


def test_many_small_messages_share_slots(pair: Pair, ends: Ends, verbs: FakeVerbs) -> None:
    here, _ = pair
    verbs.holding = True
    for _ in range(10_000):
        here.send(b"12345678")
    verbs.let_go()
    got: list[bytes] = []
    ends.take = lambda _, incoming: got.append(bytes(incoming.header))
    ends.until(lambda: len(got) == 10_000)
    assert here.stats.sends < 1000


def test_an_exception_out_of_a_step_ends_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = pair

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(here._control, "pump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        here.receive()
    assert here.closed
