"""Several connections as one: how payload is spread, what may come in which order, and what a peer
may not do."""

from __future__ import annotations

import itertools
import random
import select
import socket
import struct
import tracemalloc
from collections.abc import Iterator

import pytest

from gpuremote import _clock
from gpuremote.errors import ConnectionLost, InvalidBuffer, LimitExceeded, ProtocolError
from gpuremote.testing.driving import Ends, place, random_parts
from gpuremote.transport._framing import FRAME, MESSAGE, encode_sizes
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.lanes import connection, payload
from gpuremote.transport.lanes.compression import codec_named
from gpuremote.transport.lanes.connection import LARGE, LanesConnection
from gpuremote.transport.lanes.frames import (
    MAX_AHEAD,
    MAX_PIECE,
    NUMBER,
    PIECE,
    SPREAD,
    Piece,
    encode_piece,
)
from gpuremote.transport.tcp import TcpConnection

MIB = 1 << 20

Pair = tuple[LanesConnection, LanesConnection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = connection.pair(4)
    yield here, there
    here.abort()
    there.abort()


class ByHand:
    """A connection whose other end is spoken by hand.

    Attributes
    ----------
    end : LanesConnection
    control : socket.socket
    lanes : list of socket.socket
    """

    def __init__(self, count: int = 2, codec: str = "") -> None:
        first, self.control = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(count)]
        self.lanes = [there for _, there in pairs]
        self.end = LanesConnection(
            TcpConnection(first, blocking=False),
            [here for here, _ in pairs],
            codecs=(None, codec_named(codec) if codec else None),
        )

    def announce(self, *sizes: int, number: int = 0, header: bytes = b"") -> None:
        body = encode_sizes([*sizes]) + NUMBER.pack(number) + header
        self.control.sendall(FRAME.pack(len(body), SPREAD, 0, 0) + body)

    def piece(
        self,
        offset: int,
        data: bytes,
        *,
        number: int = 0,
        lane: int = 0,
        raw: int = 0,
        codec: int = 0,
    ) -> None:
        head = encode_piece(Piece(number, offset, raw or len(data), len(data), codec))
        self.say(self.lanes[lane], head + data)

    def say(self, sock: socket.socket, data: bytes) -> None:
        """Send, and have the other end read where it is more than the kernel takes."""
        left = memoryview(data)
        deadline = _clock.now() + 20
        while left:
            assert _clock.now() < deadline
            try:
                left = left[sock.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                assert self.end.receive() is None

    def receive(self) -> Incoming | None:
        for _ in range(20):
            if (incoming := self.end.receive()) is not None:
                return incoming
        return None

    def begin(self, *sizes: int) -> tuple[Incoming, list[bytearray], list[Incoming]]:
        """A payload is announced, and has a place."""
        self.announce(*sizes)
        incoming = self.receive()
        assert incoming is not None
        targets = [bytearray(size) for size in sizes]
        done: list[Incoming] = []
        incoming.into([memoryview(target) for target in targets], done.append)
        return incoming, targets, done

    def close(self) -> None:
        self.end.abort()
        for sock in (self.control, *self.lanes):
            sock.close()


@pytest.fixture
def hand() -> Iterator[ByHand]:
    found = ByHand()
    yield found
    found.close()


# -- how payload is spread ------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(32 * MIB,), (5 * MIB + 3, 0, 1, 9 * MIB)], ids=str)
def test_every_lane_carries_some_and_nothing_is_copied(pair: Pair, sizes: tuple[int, ...]) -> None:
    here, there = pair
    ends = Ends(*pair)
    parts = random_parts(sizes)
    here.send(b"header", [Region(part) for part in parts])
    incoming = ends.receive(there)
    assert (bytes(incoming.header), incoming.sizes) == (b"header", sizes)
    assert place(ends, incoming) == parts
    sent = [lane[0] for lane in here.lane_bytes()]
    assert min(sent) > MIB
    assert sum(sent) == sum(sizes) + PIECE.size * here.stats.extra["pieces"]
    assert here.stats.payload_copied == there.stats.payload_copied == 0
    assert here.stats.extra["lanes_raw"] == here.stats.extra["lanes_wire"] == sum(sizes)


def test_messages_and_small_payloads_stay_on_the_first(pair: Pair) -> None:
    here, there = pair
    ends = Ends(*pair)
    here.send(b"message")
    here.send(b"small", [Region(bytes(LARGE - 1))])
    assert bytes(ends.receive(there).header) == b"message"
    place(ends, ends.receive(there))
    assert here.lane_bytes() == [(0, 0)] * 4


def test_a_slow_lane_holds_up_no_other(hand: ByHand) -> None:
    total = 24 * MIB
    hand.end.send(b"", [Region(bytes(total))])
    slow, fast = hand.lanes
    came = 0
    deadline = _clock.now() + 20
    fast.settimeout(0.2)
    while hand.end.pending_output and _clock.now() < deadline:
        hand.end.flush()
        try:
            came += len(fast.recv(4 * MIB))
        except TimeoutError:
            break
    # What the slow one's kernel holds, and the rest of one piece.
    assert came > total - 3 * MIB
    slow.settimeout(0.2)
    assert slow.recv(PIECE.size)


def test_pieces_get_smaller_towards_the_end(pair: Pair) -> None:
    here, there = pair
    ends = Ends(*pair)
    here.send(b"", [Region(bytes(16 * MIB))])
    place(ends, ends.receive(there))
    # In pieces of 1 MiB it would be 16.
    assert 24 < here.stats.extra["pieces"] < 100


def test_together(pair: Pair) -> None:
    here, there = pair
    ends = Ends(*pair)
    before = here.stats.sends
    with here.together():
        for number in range(20):
            here.send(str(number).encode())
    assert here.stats.sends == before + 1
    assert [int(bytes(ends.receive(there).header)) for _ in range(20)] == list(range(20))


def test_regions_that_can_not_be_sent_leave_no_trace(pair: Pair) -> None:
    here, there = pair
    ends = Ends(*pair)
    big = Region(bytes(LARGE))
    with pytest.raises(LimitExceeded):
        here.send(bytes(5 * MIB), [big])
    with pytest.raises(LimitExceeded):
        here.send(b"", [big] * 70_000)
    assert not here.pending_output
    here.send(b"after", [big])
    assert place(ends, ends.receive(there)) == [bytes(LARGE)]


def test_both_compressed_and_raw(pair: Pair) -> None:
    for codec in ("zstd", "lz4"):
        here, there = connection.pair(3, codec)
        ends = Ends(here, there)
        parts = [b"much the same " * 400_000, *random_parts([3 * MIB]), b"x" * 7]
        here.send(b"", [Region(part) for part in parts])
        assert place(ends, ends.receive(there)) == parts
        extra = here.stats.extra
        assert 0 < extra["pieces_compressed"] < extra["pieces"]
        assert extra["lanes_wire"] < 0.7 * extra["lanes_raw"]
        assert there.stats.payload_received == sum(map(len, parts))
        here.abort()
        there.abort()


def test_a_compressed_piece_over_several_regions() -> None:
    hand = ByHand(codec="zstd")
    data = random.Random(1).randbytes(1000) * 40
    packed = codec_named("zstd").compress(memoryview(data))
    sizes = [1] * 300 + [39_700, LARGE]
    _, targets, done = hand.begin(*sizes)
    hand.piece(0, packed, raw=len(data), codec=1)
    hand.piece(len(data), bytes(LARGE), lane=1)
    for _ in range(20):
        hand.receive()
    assert len(done) == 1
    assert b"".join(targets[:-1]) == data
    hand.close()


# -- any order ------------------------------------------------------------------------------------


def test_pieces_in_any_order(hand: ByHand) -> None:
    source = random.Random(2).randbytes(LARGE)
    incoming, (target,), done = hand.begin(LARGE)
    cuts = [0, 7, 8, 60_000, 100_000, 200_000, LARGE]
    spans = [*itertools.pairwise(cuts)]
    random.Random(3).shuffle(spans)
    complete: set[int] = set()
    for number, (start, end) in enumerate(spans):
        hand.piece(start, source[start:end], lane=number % 2)
        hand.receive()
        complete.update(range(start, end))
        # What counts after a loss: the bytes from the beginning without a gap.
        gapless = next((n for n in range(LARGE) if n not in complete), LARGE)
        assert incoming.received == gapless
    hand.receive()
    assert done == [incoming]
    assert target == source


def test_pieces_before_their_announcement(hand: ByHand) -> None:
    source = random.Random(4).randbytes(LARGE)
    hand.piece(50_000, source[50_000:100_000], lane=1)
    hand.piece(0, source[:50_000], lane=1)
    assert hand.receive() is None
    # It is left where it is, and nothing turns for it meanwhile.
    assert hand.end.stats.bytes_received == PIECE.size
    assert hand.end.due() is None
    poll = select.poll()
    poll.register(hand.end.fileno(), select.POLLIN)
    assert not poll.poll(0)
    hand.announce(LARGE, header=b"late")
    incoming = hand.receive()
    assert incoming is not None
    target = bytearray(LARGE)
    done: list[Incoming] = []
    incoming.into([memoryview(target)], done.append)
    assert hand.end.due() == 0.0
    hand.receive()
    assert incoming.received == 100_000
    hand.piece(100_000, source[100_000:])
    hand.receive()
    assert done == [incoming]
    assert target == source


def test_where_it_goes_has_to_fit(hand: ByHand) -> None:
    hand.announce(LARGE)
    incoming = hand.receive()
    assert incoming is not None
    with pytest.raises(InvalidBuffer):
        incoming.into([memoryview(bytearray(LARGE + 1))])
    incoming.discard()
    hand.piece(0, bytes(LARGE // 2))
    hand.piece(LARGE // 2, bytes(LARGE // 2), lane=1)
    hand.receive()
    assert incoming.received == LARGE


# -- the end --------------------------------------------------------------------------------------


def lost(end: LanesConnection) -> ConnectionLost:
    deadline = _clock.now() + 20
    while _clock.now() < deadline:
        try:
            assert end.receive(0.05) is None
        except ConnectionLost as error:
            return error
    raise AssertionError("nothing was lost")


@pytest.mark.parametrize("reset", [True, False])
def test_the_end_of_a_lane_is_the_end(
    hand: ByHand, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER", 0.1)
    incoming, (target,), done = hand.begin(LARGE)
    hand.piece(0, b"x" * 1000)
    if reset:
        hand.lanes[1].sendall(encode_piece(Piece(0, 5000, 10, 10, 0)) + b"y")
    hand.lanes[1].close()
    assert "lane" in lost(hand.end).message
    assert not done
    assert incoming.received == 1000
    assert target[:1001] == b"x" * 1000 + b"\0"
    hand.control.setblocking(False)
    with pytest.raises(ConnectionLost):
        hand.end.receive()


def test_what_had_come_is_delivered_after_the_end(hand: ByHand) -> None:
    source = random.Random(5).randbytes(LARGE)
    _, (target,), done = hand.begin(LARGE)
    hand.control.sendall(FRAME.pack(4, MESSAGE, 0, 0) + b"last")
    hand.lanes[0].close()
    hand.piece(0, source[:100_000], lane=1)
    hand.control.close()
    last = hand.receive()
    assert last is not None
    assert bytes(last.header) == b"last"
    hand.piece(100_000, source[100_000:], lane=1)
    hand.lanes[1].close()
    error = lost(hand.end)
    assert "closed" in error.message
    assert done
    assert target == source


def test_a_sender_learns_that_a_lane_is_gone(hand: ByHand) -> None:
    hand.lanes[0].close()

    def send() -> None:
        for _ in range(100):
            hand.end.send(b"", [Region(bytes(LARGE))])

    with pytest.raises(ConnectionLost):
        send()
    with pytest.raises(ConnectionLost):
        hand.end.flush()


# -- hostile peers --------------------------------------------------------------------------------


def head(*fields: int, zeros: bytes = b"\0\0\0") -> bytes:
    return struct.pack("<QQIIB3s", *fields, zeros)


@pytest.mark.parametrize(
    "said",
    [
        head(0, LARGE, 1, 1, 0),
        head(0, LARGE - 1, 2, 2, 0),
        head(0, (1 << 64) - 1, 1, 1, 0),
        head(0, 999, 2, 2, 0),
        head(0, 1999, 1, 1, 0),
        head(0, 0, 3000, 3000, 0),
        head(0, 1000, 1000, 1000, 0),
        head(0, 3000, 0, 0, 0),
        head(0, 3000, 1, 0, 0),
        head(0, 3000, 1, 2, 0),
        head(0, 3000, 2, 1, 0),
        head(0, 3000, MAX_PIECE + 1, MAX_PIECE + 1, 0),
        head(0, 3000, 10, 5, 1),
        head(0, 3000, 10, 5, 77),
        head(0, 3000, 1, 1, 0, zeros=b"\0\1\0"),
        head(1 + MAX_AHEAD, 0, 1, 1, 0),
        head((1 << 64) - 1, 0, 1, 1, 0),
    ],
    ids=lambda said: said.hex(),
)
def test_pieces_that_no_sender_makes(hand: ByHand, said: bytes) -> None:
    _, (target,), _ = hand.begin(LARGE)
    hand.piece(1000, b"x" * 1000)
    hand.receive()
    hand.lanes[1].sendall(said + b"y" * 4000)
    with pytest.raises(ProtocolError):
        hand.receive()
    assert target == bytes(1000) + b"x" * 1000 + bytes(LARGE - 2000)
    with pytest.raises(ProtocolError):
        hand.end.receive()


def test_a_piece_of_a_payload_that_is_complete(hand: ByHand) -> None:
    _, _, done = hand.begin(LARGE)
    hand.piece(0, bytes(LARGE // 2))
    hand.piece(LARGE // 2, bytes(LARGE // 2), lane=1)
    hand.receive()
    assert done
    hand.piece(0, b"again")
    with pytest.raises(ProtocolError):
        hand.receive()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        encode_sizes([LARGE]),
        encode_sizes([LARGE]) + bytes(7),
        encode_sizes([0, 0]) + NUMBER.pack(0),
        encode_sizes([LARGE]) + NUMBER.pack(1),
        encode_sizes([LARGE]) + NUMBER.pack((1 << 64) - 1),
        encode_sizes([1 << 63]) + NUMBER.pack(0),
    ],
    ids=len,
)
def test_announcements_that_no_sender_makes(hand: ByHand, body: bytes) -> None:
    hand.control.sendall(FRAME.pack(len(body), SPREAD, 0, 0) + body)
    with pytest.raises(ProtocolError):
        hand.receive()


@pytest.mark.parametrize("frame", [(1 << 30, SPREAD, 0, 0), (8, SPREAD, 1, 0), (8, SPREAD, 0, 1)])
def test_frames_that_no_sender_makes(hand: ByHand, frame: tuple[int, int, int, int]) -> None:
    hand.control.sendall(FRAME.pack(*frame) + bytes(8))
    with pytest.raises(ProtocolError):
        hand.receive()


def test_scattered_bytes_take_bounded_memory(hand: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "MAX_RUNS", 100)
    hand.begin(LARGE)

    def scatter() -> None:
        for number in range(200):
            hand.piece(2 * number + 1, b"x", lane=number % 2)
            hand.end.receive()

    with pytest.raises(ProtocolError):
        scatter()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_what_does_not_decompress_to_what_was_said(codec: str) -> None:
    found = codec_named(codec)
    bomb = found.compress(memoryview(bytes(256 * MIB)))[: 2 * MIB]
    for data, raw in (
        (bomb, MAX_PIECE),
        (found.compress(memoryview(bytes(2000))), 1000),
        (found.compress(memoryview(bytes(1000))), 2000),
        (b"no such thing", 5000),
        (found.compress(memoryview(bytes(5000)))[:-4], 5000),
        (found.compress(memoryview(b"x" * 5000)) + b"behind it", 5000),
    ):
        hand = ByHand(codec=codec)
        hand.begin(2 * MAX_PIECE)

        def send(hand: ByHand = hand, data: bytes = data, raw: int = raw) -> None:
            hand.piece(0, data, raw=raw, codec=found.number)
            hand.receive()

        tracemalloc.start()
        with pytest.raises(ProtocolError):
            send()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * MAX_PIECE
        hand.close()


@pytest.mark.timeout(120)
def test_mutated_pieces_and_announcements() -> None:
    chance = random.Random("lanes")
    data = chance.randbytes(20_000)
    refused = complete = 0
    for _ in range(1500):
        hand = ByHand(codec="zstd")
        try:
            _, _, done = hand.begin(20_000)
            packed = codec_named("zstd").compress(memoryview(bytes(5000)))
            said = [
                bytearray(encode_piece(Piece(0, 0, 9000, 9000, 0)) + data[:9000]),
                bytearray(encode_piece(Piece(0, 15_000, 5000, len(packed), 1)) + packed),
                bytearray(encode_piece(Piece(0, 9000, 6000, 6000, 0)) + data[9000:15_000]),
            ]
            for _ in range(chance.randint(0, 2)):
                victim = chance.choice(said)
                victim[chance.randrange(min(len(victim), 60))] ^= 1 << chance.randrange(8)
            for number, stream in enumerate(said):
                hand.lanes[number % 2].sendall(stream)
            hand.receive()
            complete += bool(done)
        except ProtocolError:
            refused += 1
        finally:
            hand.close()
    assert refused > 300
    assert complete > 300
