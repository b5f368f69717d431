"""The handshake: round trips, version skew, and everything that can be wrong with the bytes."""

from __future__ import annotations

import pytest

from gpuremote.errors import (
    ConnectionLost,
    LimitExceeded,
    NotAGpuRemoteServer,
    ProtocolError,
    ServerBusy,
    UnsupportedVersion,
)
from gpuremote.wire.caps import MAX_HELLO
from gpuremote.wire.frames import pack_info
from gpuremote.wire.hello import (
    MAX_VERSION,
    MIN_VERSION,
    Hello,
    HelloReader,
    Message,
    Opened,
    Receipt,
    Refusal,
    Route,
    Welcome,
    choose_version,
)


def read(data: bytes) -> Message | None:
    """Feed a whole message, as much as the reader asks for at a time."""
    reader = HelloReader("peer:1")
    found = None
    while data and found is None:
        step = reader.missing
        found = reader.feed(data[:step])
        data = data[step:]
    assert not data
    return found


def test_hello_round_trip() -> None:
    sent = Hello(
        software="x 1",
        host="h",
        session=b"s" * 16,
        secret=b"t" * 32,
        ticket=b"k" * 24,
        receipt=Receipt(7, [(3, 100), (5, 0)]),
        transports={"tcp": "works"},
        memory_limit=123,
    )
    assert read(sent.encode()) == sent


def test_welcome_round_trip() -> None:
    sent = Welcome(
        software="x 1",
        server="a:1",
        session=b"s",
        secret=b"t",
        backend="numpy",
        devices=[{"kind": "cpu", "name": "n", "memory": 5}],
        grace=2.5,
        window=99,
        choice={"chosen": "tcp"},
        worker=4,
    )
    assert read(sent.encode()) == sent


def test_refusal_becomes_its_error() -> None:
    found = read(Refusal.of(ServerBusy("full")).encode())
    assert isinstance(found, Refusal)
    error = found.error("a:1")
    assert type(error) is ServerBusy
    assert error.peer == "a:1"
    assert "full" in str(error)


@pytest.mark.parametrize("sent", [Opened(b"s" * 16, b"t" * 32), Route(b"s" * 16), Route(b"")])
def test_what_comes_before_and_after_tls(sent: Opened | Route) -> None:
    assert read(sent.encode()) == sent


def test_every_split_of_the_bytes_gives_the_same() -> None:
    sent = Hello(software="split me")
    data = sent.encode()
    for cut in range(1, len(data)):
        reader = HelloReader("p")
        assert reader.feed(data[:cut]) is None
        assert reader.feed(data[cut:]) == sent


def test_reader_never_asks_for_bytes_after_the_message() -> None:
    data = Hello(software="x").encode()
    reader = HelloReader("p")
    taken = 0
    found = None
    while found is None:
        step = reader.missing
        found = reader.feed(data[taken : taken + step])
        taken += step
    assert taken == len(data)


def test_a_newer_peer_says_more_and_is_understood() -> None:
    body = {"software": "new", "not_known_yet": [1, 2, 3], "receipt": [0, []]}
    packed = pack_info(body)
    prefix = b"gpuR" + bytes([MIN_VERSION, MAX_VERSION + 5]) + (1).to_bytes(2, "little")
    found = read(prefix + len(packed).to_bytes(4, "little") + packed)
    assert isinstance(found, Hello)
    assert found.software == "new"
    assert choose_version(*found.versions) == MAX_VERSION


@pytest.mark.parametrize("versions", [(MAX_VERSION + 1, MAX_VERSION + 3), (0, MIN_VERSION - 1)])
def test_no_common_version(versions: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedVersion, match="upgrade"):
        choose_version(*versions)


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 400 Bad Request\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"gpuX00000000", b"\x00" * 12],
)
def test_another_protocol_is_named(data: bytes) -> None:
    with pytest.raises(NotAGpuRemoteServer, match="check host and port"):
        HelloReader("p").feed(data)


def test_the_first_wrong_byte_is_enough() -> None:
    with pytest.raises(NotAGpuRemoteServer):
        HelloReader("p").feed(b"gX")


def test_end_of_stream() -> None:
    with pytest.raises(NotAGpuRemoteServer, match="closed without an answer"):
        HelloReader("p").feed(b"")
    reader = HelloReader("p")
    reader.feed(Hello().encode()[:20])
    with pytest.raises(ConnectionLost, match="middle"):
        reader.feed(b"")


def test_announced_size_is_capped_before_it_is_read() -> None:
    prefix = b"gpuR\x01\x01" + (1).to_bytes(2, "little") + (MAX_HELLO + 1).to_bytes(4, "little")
    with pytest.raises(LimitExceeded):
        HelloReader("p").feed(prefix)


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"receipt": [-1, []]},
        {"receipt": [3, [[4, 0]]]},
        {"receipt": [3, [[1]]]},
        {"receipt": "x"},
        {"session": "not bytes"},
        {"memory_limit": True},
        {"transports": {"tcp": 3}},
        {"transports": []},
    ],
)
def test_malformed_bodies(body: object) -> None:
    packed = pack_info(body)
    prefix = b"gpuR\x01\x01" + (1).to_bytes(2, "little") + len(packed).to_bytes(4, "little")
    with pytest.raises(ProtocolError):
        read(prefix + packed)


def test_unknown_kind() -> None:
    packed = pack_info({})
    prefix = b"gpuR\x01\x01" + (99).to_bytes(2, "little") + len(packed).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="kind 99"):
        read(prefix + packed)
