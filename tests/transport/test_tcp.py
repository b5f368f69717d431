"""What is particular to the stream transport: framing, hostile bytes, threads and signals."""

from __future__ import annotations

import mmap
import random
import signal
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuremote._speed import native
from gpuremote.errors import (
    ConnectionLost,
    InternalError,
    LimitExceeded,
    ProtocolError,
)
from gpuremote.testing.driving import Ends, place, random_parts
from gpuremote.transport._framing import MAX_CHUNK, MAX_HEADER, MAX_REGIONS
from gpuremote.transport._incoming import Payload
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.tcp import TcpConnection, pair, tune

MIB = 1 << 20
Pair = tuple[TcpConnection, TcpConnection]


def frame(kind: int, body: bytes, channel: int = 0, flags: int = 0) -> bytes:
    return struct.pack("<IBBH", len(body), kind, flags, channel) + body


def opening(sizes: list[int], header: bytes = b"", channel: int = 0) -> bytes:
    return frame(2, struct.pack(f"<H{len(sizes)}Q", len(sizes), *sizes) + header, channel)


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, TcpConnection]]:
    """A plain socket and a connection that are connected."""
    plain, other = socket.socketpair()
    plain.settimeout(10)
    connection = TcpConnection(other, blocking=False)
    yield plain, connection
    plain.close()
    connection.abort()


def receive_all(connection: TcpConnection, sizes_cap: int = MIB) -> list[tuple[bytes, bytes]]:
    """Messages with their payload, until the connection ends; drops payload over the cap."""
    got: list[tuple[bytes, list[bytearray]]] = []
    deadline = time.monotonic() + 20
    try:
        while True:
            assert time.monotonic() < deadline
            incoming = connection.receive(0.05)
            if incoming is None:
                continue
            targets: list[bytearray] = []
            if sum(incoming.sizes) > sizes_cap:
                incoming.discard()
            else:
                targets = [bytearray(size) for size in incoming.sizes]
                incoming.into([memoryview(target) for target in targets])
            got.append((bytes(incoming.header), targets))
    except ConnectionLost:
        return [(header, b"".join(targets)) for header, targets in got]


def receive_for_ever(connection: TcpConnection) -> None:
    """Drop whatever comes, until an error comes out."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        incoming = connection.receive(0.05)
        if incoming is not None:
            incoming.discard()


# -- framing -----------------------------------------------------------------------------------

STREAM = (
    frame(1, b"first")
    + opening([3, 0, 6], b"bulk", channel=7)
    + frame(1, b"")
    + frame(3, b"abcde", channel=7)
    + opening([2], b"other", channel=9)
    + frame(3, b"XY", channel=9)
    + frame(1, b"between")
    + frame(3, b"fghi", channel=7)
    + opening([0, 0], b"empty", channel=7)
    + frame(1, b"last")
)
MESSAGES = [
    (b"first", b""),
    (b"bulk", b"abcdefghi"),
    (b"", b""),
    (b"other", b"XY"),
    (b"between", b""),
    (b"empty", b""),
    (b"last", b""),
]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 8, 9, 11, 1000])
def test_stream_in_pieces(raw: tuple[socket.socket, TcpConnection], step: int) -> None:
    plain, connection = raw

    def send() -> None:
        for begin in range(0, len(STREAM), step):
            plain.send(STREAM[begin : begin + step])
            time.sleep(0.0002)
        plain.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    assert receive_all(connection) == MESSAGES
    sender.join()
    assert connection.stats.payload_received == 11


def test_what_is_sent_is_the_documented_framing() -> None:
    plain, other = socket.socketpair()
    connection = TcpConnection(other, blocking=True)
    connection.send(b"first")
    connection.send(b"bulk", [Region(b"abc"), Region(b""), Region(b"defghi")])
    connection.send(b"", [Region(b"")])
    connection.close()
    with plain:
        assert plain.recv(1000) == (
            frame(1, b"first") + opening([3, 0, 6], b"bulk") + frame(3, b"abcdefghi") + opening([0])
        )


def test_loss_inside_a_message(raw: tuple[socket.socket, TcpConnection]) -> None:
    plain, connection = raw
    plain.send(STREAM[:9])
    plain.close()
    with pytest.raises(ConnectionLost, match="in the middle of a message"):
        receive_for_ever(connection)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ProtocolError),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", ProtocolError),  # TLS
        (frame(0, b""), ProtocolError),
        (frame(4, b""), ProtocolError),
        (frame(1, b"x", flags=1), ProtocolError),
        (frame(1, b"x", channel=1), ProtocolError),
        (struct.pack("<IBBH", MAX_HEADER + 1, 1, 0, 0), LimitExceeded),
        (struct.pack("<IBBH", 0xFFFFFFFF, 2, 0, 0), LimitExceeded),
        (frame(2, b""), ProtocolError),
        (frame(2, b"\0"), ProtocolError),
        (frame(2, b"\0\0"), ProtocolError),  # no region
        (frame(2, b"\2\0" + bytes(15)), ProtocolError),  # half a size
        (opening([1 << 63]), LimitExceeded),
        (opening([1], b"h" * MAX_HEADER + b"h"), LimitExceeded),
        (frame(3, b"x"), ProtocolError),  # a channel that is not open
        (opening([1], channel=3) + frame(3, b"x", channel=4), ProtocolError),
        (opening([1], channel=3) + frame(3, b"xy", channel=3), ProtocolError),
        (opening([1], channel=3) + frame(3, b"", channel=3), ProtocolError),
        (opening([1], channel=3) + opening([1], channel=3), ProtocolError),
        (opening([1], channel=3) + frame(3, b"x", channel=3, flags=1), ProtocolError),
        (
            opening([1 << 40], channel=3) + struct.pack("<IBBH", MAX_CHUNK + 1, 3, 0, 3),
            ProtocolError,
        ),
    ],
)
def test_what_no_sender_sends(
    raw: tuple[socket.socket, TcpConnection], data: bytes, error: type[ProtocolError]
) -> None:
    plain, connection = raw
    sender = threading.Thread(target=plain.sendall, args=(data,))
    sender.start()
    with pytest.raises(error):
        receive_for_ever(connection)
    with pytest.raises(error):
        connection.receive()
    sender.join()


def test_sizes_are_announced_and_not_allocated(
    raw: tuple[socket.socket, TcpConnection],
) -> None:
    plain, connection = raw
    tracemalloc.start()
    plain.sendall(opening([(1 << 63) - 1] * 1000, channel=5))
    incoming = None
    while incoming is None:
        incoming = connection.receive(1)
    assert sum(incoming.sizes) == 1000 * ((1 << 63) - 1)
    incoming.discard()
    plain.sendall(struct.pack("<IBBH", MAX_HEADER, 1, 0, 0) + bytes(100))
    assert connection.receive(1) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_HEADER + MIB


@pytest.mark.parametrize("seed", range(8))
def test_hostile_bytes(seed: int) -> None:
    """Mutated streams end in an error of the contract; in bounded time and memory."""
    chance = random.Random(seed)
    tracemalloc.start()
    for _ in range(150):
        data = bytearray(STREAM * chance.choice((1, 1, 3)))
        for _ in range(chance.randrange(1, 6)):
            _mutate(data, chance)
        plain, other = socket.socketpair()
        connection = TcpConnection(other, blocking=chance.random() < 0.5)
        with plain:
            plain.sendall(data)
        try:
            receive_all(connection)
        except ProtocolError:
            pass
        finally:
            connection.abort()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * MAX_HEADER + MIB


def _mutate(data: bytearray, chance: random.Random) -> None:
    where = chance.randrange(len(data) or 1)
    match chance.randrange(5):
        case 0:
            data[where : where + 1] = bytes([chance.randrange(256)])
        case 1:
            del data[where : where + chance.randrange(1, 20)]
        case 2:
            data[where:where] = chance.randbytes(chance.randrange(1, 20))
        case 3:
            data[where : where + 4] = struct.pack("<I", chance.choice((0, 1, 0xFFFFFFFF, 4096)))
        case 4:
            data[where:where] = STREAM[chance.randrange(len(STREAM)) :]


# -- any sequence of sends ---------------------------------------------------------------------

MESSAGE = st.tuples(
    st.binary(max_size=40),
    st.lists(st.sampled_from([0, 1, 5, 4096, 70_000, 300_000]), max_size=4),
    st.booleans(),
)


@settings(max_examples=40)
@given(messages=st.lists(MESSAGE, max_size=30), blocking=st.booleans())
def test_any_sequence(messages: list[tuple[bytes, list[int], bool]], blocking: bool) -> None:
    here, there = pair(blocking)
    try:
        ends = Ends(here, there)
        parts = [random_parts(sizes) for _, sizes, _ in messages]
        got: list[tuple[bytes, list[bytearray] | None]] = []
        ended: list[int] = []
        freed: list[int] = []

        def take(_: object, incoming: Incoming) -> None:
            number = len(got)
            keep = messages[number][2]
            targets = [bytearray(size) for size in incoming.sizes] if keep else None
            got.append((bytes(incoming.header), targets))
            if targets is None:
                incoming.discard(lambda _: ended.append(number))
            else:
                incoming.into([memoryview(t) for t in targets], lambda _: ended.append(number))

        ends.take = take
        for number, (header, _, _) in enumerate(messages):
            regions = [Region(part) for part in parts[number]]
            here.send(header, regions, partial(freed.append, number))
            if number % 3 == 0:
                ends.step()
        ends.until(lambda: len(ended) == len(messages) and not here.pending_output)
        assert [header for header, _ in got] == [header for header, _, _ in messages]
        for (_, targets), expected in zip(got, parts, strict=True):
            assert targets is None or targets == expected
        assert sorted(freed) == sorted(ended) == list(range(len(messages)))
        assert here.stats.bytes_sent == there.stats.bytes_received
    finally:
        here.abort()
        there.abort()


def test_small_messages_that_the_kernel_takes_in_part(ends: Pair) -> None:
    here, there = ends
    sent: list[bytes] = []
    freed: list[int] = []
    while not here.pending_output:
        number = len(sent)
        sent.append(bytes([number % 251]) * (number * 7 % 5003))
        here.send(sent[-1], (), lambda: freed.append(1))
    sent.append(b"behind")
    here.send(sent[-1], (), lambda: freed.append(1))
    assert len(freed) == len(sent) - 2
    both = Ends(here, there)
    for expected in sent:
        assert both.receive(there).header == expected
    both.flush(here)
    assert len(freed) == len(sent)


def test_channel_numbers_come_around(ends: Pair) -> None:
    here, there = ends
    here._outbox._channel = 65530
    both = Ends(here, there)
    for number in range(20):
        with here.together():  # through the queue
            here.send(bytes([number]), [Region(b"abc")])
        assert place(both, both.receive(there)) == [b"abc"]


def test_five_gibibytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    tune(client)
    here, there = TcpConnection(client, blocking=True), TcpConnection(server, blocking=True)
    size = 5 << 30
    # Never written to: all of it is the one huge page of zeros that the system has.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        region = here.register(memory)
        here.send(b"", [region, Region(b"end")])
        both = Ends(here, there, limit=50)
        incoming = both.receive(there)
        assert incoming.sizes == (size, 3)
        done: list[Incoming] = []
        incoming.discard(done.append)
        both.until(lambda: done)
        assert incoming.received == size + 3
        here.close()
        there.close()
        region.release()


def test_limits_of_the_sender(ends: Pair) -> None:
    here, _ = ends
    with pytest.raises(LimitExceeded):
        here.send(b"", [Region(b"")] * (MAX_REGIONS + 1))
    with pytest.raises(LimitExceeded):
        here.send(bytes(MAX_HEADER + 1))
    assert not here.pending_output
    here.send(b"", [Region(b"x")] * MAX_REGIONS)


def test_payload_lands_without_a_copy(ends: Pair) -> None:
    here, there = ends
    both = Ends(here, there)
    source = bytes(32 * MIB)
    done: list[Incoming] = []

    def take(_: object, incoming: Incoming) -> None:
        incoming.into([memoryview(bytearray(size)) for size in incoming.sizes], done.append)

    both.take = take
    for _ in range(3):
        done.clear()
        here.send(b"", [Region(source)])
        here.send(b"at the same time", [Region(bytes(MIB)), Region(bytes(3 * MIB))])
        here.send(b"between")
        both.until(lambda: len(done) == 3)
    # What comes along with the first header at most, and nothing with the frames behind it.
    assert there.stats.payload_copied <= 3 * 64 * 1024


# -- how it is to be used ----------------------------------------------------------------------


def test_forgotten_payload(ends: Pair) -> None:
    here, there = ends
    here.send(b"", [Region(b"abc")])
    both = Ends(here, there)
    incoming = both.receive(there)
    with pytest.raises(InternalError):
        there.receive()
    assert place(both, incoming) == [b"abc"]
    with pytest.raises(InternalError):
        incoming.into([memoryview(bytearray(3))])


def test_waiting_is_one_system_call() -> None:
    here, there = pair(blocking=True)
    here.send(b"x")
    assert there.receive(1.0) is not None
    assert (there.stats.receives, here.stats.sends) == (1, 1)
    begin = time.monotonic()
    assert there.receive(5.0) is None
    assert 0.8 < time.monotonic() - begin < 2.0
    assert there.stats.receives == 1
    here.abort()
    there.abort()


def test_signal_in_the_middle() -> None:
    """Nobody knows how many bytes went through when KeyboardInterrupt comes out of a step in
    Python. The part in C knows that none did."""
    here, there = pair(blocking=True)

    def interrupt(number: int, stack: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            here.receive(1.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    if native is None:
        assert here.closed
        assert here._sock.fileno() == -1
        with pytest.raises(ConnectionLost):
            there.receive(1.0)
    else:
        here.send(b"still here")
        assert there.receive(1.0) is not None
        there.send(b"and there")
        assert here.receive(1.0) is not None
        here.abort()
    there.abort()


def test_abort_from_a_callback(ends: Pair) -> None:
    here, there = ends
    here.send(b"", [Region(b"abc")])
    incoming = Ends(here, there).receive(there)
    incoming.into([memoryview(bytearray(3))], lambda _: there.abort())
    with pytest.raises(ConnectionLost):
        receive_for_ever(there)
    assert there._sock.fileno() == -1


def test_abort_from_a_callback_of_the_sender(ends: Pair) -> None:
    here, _ = ends
    here.send(b"x", (), here.abort)
    with pytest.raises(ConnectionLost):
        here.flush()
    assert here._sock.fileno() == -1


def test_failing_callback_aborts(ends: Pair) -> None:
    here, there = ends
    here.send(b"", [Region(b"abc")])

    def fail(_: Incoming) -> None:
        raise RuntimeError("a bug of the caller")

    Ends(here, there).receive(there).into([memoryview(bytearray(3))], fail)
    with pytest.raises(RuntimeError, match="a bug"):
        receive_for_ever(there)
    assert there.closed


def test_discard_by_another_thread(ends: Pair) -> None:
    """Also while the receiving thread waits for more of that payload."""
    here, there = ends
    source = b"\x55" * (24 * MIB)
    for _ in range(5):
        here.send(b"", [Region(source)])
        _discard_from_here(here, there, Ends(here, there).receive(there))


def _discard_from_here(here: TcpConnection, there: TcpConnection, incoming: Incoming) -> None:
    target = bytearray(incoming.sizes[0])
    called: list[str] = []
    incoming.into([memoryview(target)], lambda _: called.append("into"))
    receiving = threading.Thread(target=_receive_until, args=(there, called))
    receiving.start()
    begin = time.monotonic()
    while not incoming.received:
        here.flush()
    incoming.discard(lambda _: called.append("discard"))
    assert time.monotonic() - begin < 0.9
    target[:] = bytes(len(target))
    while not here.flush():
        time.sleep(0.0005)
    receiving.join()
    assert called == ["discard"]
    assert not any(target)


def _receive_until(connection: TcpConnection, called: list[str]) -> None:
    deadline = time.monotonic() + 20
    while not called and time.monotonic() < deadline:
        assert connection.receive(1.0) is None


def test_descriptor_is_closed_by_the_last_user() -> None:
    here, there = pair(blocking=True)
    seen: list[int] = []

    def receive() -> None:
        try:
            here.receive(1.0)
        except ConnectionLost:
            seen.append(here._sock.fileno())

    waiting = threading.Thread(target=receive)
    waiting.start()
    time.sleep(0.05)
    here.abort()
    waiting.join()
    assert seen == [-1]
    there.abort()


def test_close_with_unread_input_loses_nothing() -> None:
    """A reset because of unread bytes would throw away what the peer has not got yet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    connection = TcpConnection(server, blocking=True)
    client.sendall(bytes(300_000))
    connection.send(b"goodbye", [Region(bytes(500_000))])
    connection.close(5)
    got = b""
    with client:
        while data := client.recv(1 << 20):
            got += data
    assert len(got) > 500_000
    assert got.startswith(opening([500_000], b"goodbye"))


def test_works_on_after_long_use(ends: Pair) -> None:
    """Every buffer and every table is as empty as at the start."""
    here, there = ends
    both = Ends(here, there)
    for _ in range(200):
        here.send(b"x" * 1000, [Region(bytes(10_000))])
        place(both, both.receive(there))
        there.send(b"y" * 100)
        both.receive(here)
    for end in ends:
        assert not end._channels
        assert not end._outbox._used
        assert not end._outbox._streams
        assert end._target is None
        assert end._large is None


def test_what_has_no_place_any_more_does_not_count_as_received() -> None:
    """Another thread has aborted the connection: the next one brings it from there on."""
    payload = Payload(memoryview(b""), (10,), 0, lambda: None)
    target = bytearray(10)
    payload.into([memoryview(target)])
    assert payload.put(memoryview(b"0123")) == 4
    payload.release()
    assert payload.put(memoryview(b"4567")) == 0
    assert (payload.received, payload.left) == (4, 6)
    assert target == b"0123" + bytes(6)


def test_an_abort_by_another_thread_before_bytes_are_put_in_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What came behind them is not looked at: it is the connection that ended."""
    here, there = pair()
    try:
        for name in (b"first", b"second"):
            here.send(name, [Region(bytes(1000))])
        incoming = there.receive(1.0)
        assert incoming is not None
        incoming.into([memoryview(bytearray(1000))])
        known = Payload.put

        def late(payload: Payload, source: memoryview) -> int:
            there._rx_touching = 0  # it has not begun yet
            thread = threading.Thread(target=there.abort)
            thread.start()
            thread.join()
            return known(payload, source)

        monkeypatch.setattr(Payload, "put", late)
        with pytest.raises(ConnectionLost):
            there.receive(1.0)
        assert incoming.received == 0
    finally:
        here.abort()
        there.abort()
