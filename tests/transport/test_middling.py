"""Messages larger than what is asked for at first, and payloads that nothing is queued before."""

from __future__ import annotations

import random
import socket
import threading
import time

import pytest

from gpuremote.testing.driving import Ends, place
from gpuremote.transport.base import Region
from gpuremote.transport.tcp import TcpConnection
from tests.transport.test_tcp import MIB, Pair, frame, opening


@pytest.mark.parametrize("size", [5_000, 100_000, 262_136])
def test_a_middling_message_in_pieces(ends: Pair, size: int) -> None:
    """Larger than what is asked for at first, and up to the receive buffer."""
    here, there = ends
    data = random.Random(size).randbytes(size)
    whole = frame(1, data)
    both = Ends(here, there)
    for cut in (1, 7, 8, 9, 4_000, size):
        sender = threading.Thread(target=_send_in_two, args=(here._sock, whole, cut))
        sender.start()
        assert both.receive(there).header == data
        sender.join()


def _send_in_two(sock: socket.socket, data: bytes, cut: int) -> None:
    plain = sock.dup()
    with plain:
        plain.setblocking(True)
        plain.sendall(data[:cut])
        time.sleep(0.02)
        plain.sendall(data[cut:])


@pytest.mark.parametrize("size", [1, 1_000, MIB, 4 * MIB, 9 * MIB + 5])
def test_one_region_that_the_kernel_takes_in_part(ends: Pair, size: int) -> None:
    """Nothing is queued before it, and the rest is: the same bytes, in the same order."""
    here, there = ends
    here._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    both = Ends(here, there)
    payload = random.Random(size).randbytes(size)
    freed: list[int] = []
    rounds = 20 if size <= MIB else 3
    for number in range(rounds):
        here.send(b"%d" % number, [Region(payload)], lambda: freed.append(1))
        here.send(b"behind")
        first = both.receive(there)
        assert first.header == b"%d" % number
        assert place(both, first) == [payload]
        assert bytes(both.receive(there).header) == b"behind"
    both.flush(here)
    assert len(freed) == rounds
    assert here.stats.payload_sent == there.stats.payload_received == rounds * size
    assert here.stats.bytes_sent == there.stats.bytes_received


@pytest.mark.parametrize("size", [MIB, 4 * MIB, 4 * MIB + 1, 13 * MIB])
def test_one_region_in_bursts(ends: Pair, size: int) -> None:
    """A step ends with the chunk in which it has handed over enough; the next one goes on."""
    here, there = ends
    here.burst = 1
    both = Ends(here, there)
    payload = random.Random(size).randbytes(size)
    for _ in range(3):
        here.send(b"header", [Region(payload)])
        assert here.pending_output or size <= 4 * MIB
        assert place(both, both.receive(there)) == [payload]
    assert here.stats.payload_sent == there.stats.payload_received == 3 * size
    assert here.stats.bytes_sent == there.stats.bytes_received


def test_what_is_complete_is_reported_before_more_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two payloads under way, and of the second one a part: nobody sleeps over the first."""
    other, mine = socket.socketpair()
    connection = TcpConnection(mine, blocking=True)
    begun = frame(3, b"one", 0) + frame(3, b"part of b", 1)[:10]
    other.sendall(opening([3], b"a", 0) + opening([9], b"b", 1) + begun)
    done: list[bytes] = []
    places = [bytearray(3), bytearray(9)]
    for place_ in places:
        incoming = connection.receive(1.0)
        assert incoming is not None
        incoming.into([memoryview(place_)], lambda found: done.append(bytes(found.header)))
    slept: list[float] = []
    original = connection._read

    def read(wait: float) -> bool:
        slept.append(wait if done else 0.0)
        return original(wait)

    monkeypatch.setattr(connection, "_read", read)
    while not done:
        assert connection.receive(1.0) is None
    assert done == [b"a"]
    assert not any(slept)
    assert places[0] == b"one"
    other.close()
    connection.abort()


def test_what_a_callback_of_a_lone_payload_sends_goes_out(ends: Pair) -> None:
    here, there = ends
    here.send(b"first", [Region(b"abc")], lambda: here.send(b"second"))
    assert not here.pending_output
    both = Ends(here, there)
    assert place(both, both.receive(there)) == [b"abc"]
    assert bytes(both.receive(there).header) == b"second"
