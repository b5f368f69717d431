"""What is TLS's own: how it ends, what lies in between, and how much is encrypted ahead."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest

from gpuremote._clock import now
from gpuremote.errors import ConnectionLost
from gpuremote.testing.driving import Ends, place
from gpuremote.transport import tls
from gpuremote.transport.base import Region
from gpuremote.transport.certificates import TlsClient, TlsServer
from gpuremote.transport.tls import AHEAD, RECORD, TlsConnection, TlsSocket
from tests.certificates import Authority

Trust = tuple[TlsServer, TlsClient]
Pair = tuple[TlsConnection, TlsConnection]


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    authority = Authority(tmp_path_factory.mktemp("tls"))
    return authority.server(), authority.client()


@pytest.fixture(params=[True, False], ids=["blocking", "loop"])
def pair(request: pytest.FixtureRequest, trust: Trust) -> Iterator[Pair]:
    lines = shaken(trust)
    here, there = (TlsConnection(line, blocking=request.param) for line in lines)
    yield here, there
    here.abort()
    there.abort()


def shaken(trust: Trust) -> tuple[TlsSocket, TlsSocket]:
    """Two ends of a TLS connection."""
    server, client = trust
    one, other = socket.socketpair()
    here, there = TlsSocket(one, client, "localhost"), TlsSocket(other, server)
    thread = threading.Thread(target=there.handshake, args=(now() + 10,))
    thread.start()
    here.handshake(now() + 10)
    thread.join()
    return here, there


def until_lost(connection: TlsConnection) -> ConnectionLost:
    deadline = now() + 20
    while now() < deadline:
        try:
            assert connection.receive(1.0) is None
        except ConnectionLost as error:
            return error
    raise AssertionError("nothing was lost")


def test_the_peer_closes(pair: Pair) -> None:
    here, there = pair
    here.close()
    assert "closed the connection" in until_lost(there).message


@pytest.mark.parametrize("announced", [True, False])
def test_the_stream_ends_in_the_middle_of_a_message(trust: Trust, announced: bool) -> None:
    """With TLS's goodbye, or cut off by somebody on the way."""
    line, other = shaken(trust)
    there = TlsConnection(other, blocking=True)
    line.sendall((100).to_bytes(4, "little") + b"\1\0\0\0" + b"half of it")
    if announced:
        line.say_goodbye()
    line.raw.shutdown(socket.SHUT_WR)
    assert "middle of a message" in until_lost(there).message
    line.close()
    there.abort()


def test_bytes_that_were_changed_on_the_way(trust: Trust) -> None:
    for position in (0, 3, 7, 40, -1):
        line, other = shaken(trust)
        there = TlsConnection(other, blocking=True)
        line._tls.write(b"\x05\0\0\0\1\0\0\0hello" * 5)
        record = bytearray(line._outgoing.read())
        record[position] ^= 1
        line.raw.sendall(record)
        line.raw.shutdown(socket.SHUT_WR)
        until_lost(there)
        assert there.stats.messages_received == 0
        line.close()
        there.abort()


def test_what_is_encrypted_and_not_taken_is_pending(pair: Pair) -> None:
    here, there = pair
    source = random.Random(1).randbytes(8 << 20)
    here.send(b"", [Region(source)])
    while not here.flush():
        waiting = here._tls._sealed.nbytes
        assert 0 < waiting < AHEAD + AHEAD // 16  # and what encryption adds
        if here._tls.flush() is False:
            break
    assert here.pending_output
    ends = Ends(here, there)
    assert place(ends, ends.receive(there)) == [source]
    ends.flush(here)
    assert not here.pending_output


def test_a_message_of_which_only_the_encryption_waits_is_pending(pair: Pair) -> None:
    """It is out of the outbox, and a driver has to see to it all the same."""
    here, there = pair
    sent = 0
    while not here.pending_output:
        here.send(bytes(10_000))
        sent += 1
    ends = Ends(here, there)
    for _ in range(sent):
        assert bytes(ends.receive(there).header) == bytes(10_000)
    assert not here.pending_output


def test_what_was_decrypted_is_told_of(pair: Pair) -> None:
    """The descriptor does not: its bytes were all read."""
    here, there = pair
    for _ in range(5):
        here.send(bytes(10_000))
    ends = Ends(there)
    assert len(ends.receive(there).header) == 10_000
    got = 1
    while there.due() == 0.0 or there.buffered:
        got += there.receive(0) is not None
    assert got == 5
    assert (there.due(), there.buffered) == (None, False)


def test_small_pieces_are_joined_and_large_ones_are_cut() -> None:
    chance = random.Random(2)
    for _ in range(200):
        buffers = [
            chance.randbytes(chance.choice((0, 1, 8, 5000, RECORD, RECORD + 1, 3 * AHEAD + 5)))
            for _ in range(chance.randrange(1, 8))
        ]
        pieces = [bytes(piece) for piece in tls._pieces(buffers)]
        assert b"".join(pieces) == b"".join(buffers)
        assert all(0 < len(piece) <= AHEAD for piece in pieces)
        whole = sum(len(piece) for piece in pieces)
        assert len(pieces) <= whole // RECORD + 2 * len(buffers)
    assert [len(p) for p in tls._pieces([b"x" * 8] * 100)] == [800]


def test_keys_that_are_used_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = pair
    monkeypatch.setattr(tls, "KEY_BYTES", 50_000)
    for _ in range(5):
        here.send(bytes(10_000))
    with pytest.raises(ConnectionLost, match="keys"):
        here.send(bytes(10_000))
    ends = Ends(there)
    for _ in range(5):
        assert len(ends.receive(there).header) == 10_000


def test_only_tls_1_3(trust: Trust) -> None:
    server, client = trust
    for context in (server.context, client.context()):
        assert context.minimum_version.name == "TLSv1_3"
    here, there = shaken(trust)
    assert here.describe()["version"] == there.describe()["version"] == "TLSv1.3"
    assert here.certificate == there.certificate == server.certificate
    here.close()
    there.close()
