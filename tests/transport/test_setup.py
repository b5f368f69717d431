"""Which transports two ends try, and how one is brought up over a first connection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuremote import _clock
from gpuremote.errors import (
    ConnectionLost,
    HandshakeTimeout,
    ProtocolError,
    TransportUnavailable,
)
from gpuremote.transport import select
from gpuremote.transport.base import Connection
from gpuremote.transport.setup import MAX_MESSAGES, Path, Setup, upgrade
from gpuremote.transport.tcp import TcpConnection, pair
from tests.transport.ends import both


def test_probe() -> None:
    found = {candidate.name: candidate for candidate in select.probe()}
    assert found["tcp"].available
    assert all(candidate.reason for candidate in found.values())


def test_choice() -> None:
    chosen = select.choose({"tcp": "", "rdma": "a card"}, same_host=False)
    assert "tcp" not in chosen["order"]
    reasons = {c["name"]: c["reason"] for c in chosen["candidates"]}
    assert reasons.keys() >= {"shm", "rdma", "tcp"}
    assert all(reasons.values())


class Works:
    """A transport that is the first connection again."""

    abandoned = 0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def connection(self) -> Connection:
        return self.setup.connection

    def abandon(self) -> None:
        Works.abandoned += 1

    @staticmethod
    def probe() -> tuple[bool, str]:
        return True, "works"

    @staticmethod
    def connect(setup: Setup) -> Path:
        setup.say({"question": 1})
        assert setup.hear() == {"answer": 2}
        return Works(setup)

    @staticmethod
    def accept(setup: Setup) -> Path:
        assert setup.hear() == {"question": 1}
        setup.say({"answer": 2})
        return Works(setup)


class FailsAtTheClient(Works):
    @staticmethod
    def connect(setup: Setup) -> Path:
        raise OSError("no card")


class FailsAtTheServer(Works):
    @staticmethod
    def accept(setup: Setup) -> Path:
        raise TransportUnavailable("no memory")


class FailsAtTheEnd(Works):
    """The client believes that it works."""

    @staticmethod
    def accept(setup: Setup) -> Path:
        setup.hear()
        setup.say({"answer": 2})
        raise TransportUnavailable("changed its mind")


class FailsAtBoth(Works):
    @staticmethod
    def connect(setup: Setup) -> Path:
        raise TransportUnavailable("no card")

    @staticmethod
    def accept(setup: Setup) -> Path:
        raise TransportUnavailable("no memory")


@pytest.fixture(params=[True, False], ids=["blocking", "non-blocking"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[TcpConnection, TcpConnection]]:
    here, there = pair(blocking=request.param)
    yield here, there
    here.abort()
    there.abort()


def setups(ends: tuple[Connection, Connection], seconds: float = 10.0) -> tuple[Setup, Setup]:
    deadline = _clock.now() + seconds
    here, there = (Setup(end, blocking=True, deadline=deadline) for end in ends)
    return here, there


def test_both_ends_are_ready(ends: tuple[TcpConnection, TcpConnection]) -> None:
    here, there = setups(ends)
    found = both(
        lambda: upgrade(here, Works, client=True), lambda: upgrade(there, Works, client=False)
    )
    assert found == list(ends)


@pytest.mark.parametrize(
    ("transport", "client", "server"),
    [
        (FailsAtTheClient, "no card", "the other end: no card"),
        (FailsAtTheServer, "the other end: no memory", "no memory"),
        (FailsAtTheEnd, "the other end: changed its mind", "changed its mind"),
        (FailsAtBoth, "no card", "no memory"),
    ],
)
def test_the_first_connection_goes_on_where_a_transport_fails(
    ends: tuple[TcpConnection, TcpConnection],
    transport: type[Works],
    client: str,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Works, "abandoned", 0)
    here, there = setups(ends)
    found = both(
        lambda: upgrade(here, transport, client=True),
        lambda: upgrade(there, transport, client=False),
    )
    assert [type(error) for error in found] == [TransportUnavailable] * 2
    assert [getattr(error, "message", "") for error in found] == [client, server]
    assert Works.abandoned == (transport is FailsAtTheEnd)
    # What follows is the session's, and neither end has taken any of it.
    ends[0].send(b"a message")
    incoming = ends[1].receive(1.0)
    assert incoming is not None
    assert bytes(incoming.header) == b"a message"


def test_the_next_transport_is_tried(
    ends: tuple[TcpConnection, TcpConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_upgrade_named", {"a": FailsAtTheServer, "b": Works}.get)
    here, there = setups(ends)
    found = both(
        lambda: select.climb(here, ["a", "b"], client=True),
        lambda: select.climb(there, ["a", "b"], client=False),
    )
    assert found == [
        (ends[0], {"a": "the other end: no memory"}),
        (ends[1], {"a": "no memory"}),
    ]


def test_a_transport_that_nobody_knows(ends: tuple[TcpConnection, TcpConnection]) -> None:
    with pytest.raises(ProtocolError, match="pigeon"):
        select.climb(setups(ends)[0], ["pigeon"], client=True)


def test_a_silent_peer(ends: tuple[TcpConnection, TcpConnection]) -> None:
    here, _ = setups(ends, seconds=0.05)
    with pytest.raises(HandshakeTimeout):
        upgrade(here, Works, client=True)


def test_a_peer_that_goes_away(ends: tuple[TcpConnection, TcpConnection]) -> None:
    here, _ = setups(ends)
    ends[1].abort()
    with pytest.raises(ConnectionLost):
        upgrade(here, Works, client=True)


@pytest.mark.parametrize("said", [b"", b"\xc1", b"\x01", b"\x80" + bytes(70_000)])
def test_a_peer_that_says_something_else(
    ends: tuple[TcpConnection, TcpConnection], said: bytes
) -> None:
    here, _ = setups(ends)
    ends[1].send(said)
    with pytest.raises(ProtocolError):
        here.hear()


def test_a_peer_that_talks_without_end(ends: tuple[TcpConnection, TcpConnection]) -> None:
    here, there = setups(ends)
    for _ in range(MAX_MESSAGES + 1):
        there.say({})
    with pytest.raises(ProtocolError):
        here.conclude("ready")


def test_more_than_a_message_may_hold(ends: tuple[TcpConnection, TcpConnection]) -> None:
    with pytest.raises(TransportUnavailable):
        setups(ends)[0].say({"much": bytes(70_000)})
