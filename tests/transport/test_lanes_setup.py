"""Whether lanes are opened, how many, and who may open one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gpuremote import _clock
from gpuremote.errors import ConnectionFailed, ConnectionLost, ProtocolError
from gpuremote.testing.driving import Ends, place, random_parts
from gpuremote.transport import select
from gpuremote.transport.base import Connection, Region
from gpuremote.transport.lanes import compression
from gpuremote.transport.lanes import setup as lanes_setup
from gpuremote.transport.lanes.connection import LanesConnection
from gpuremote.transport.lanes.offer import LaneGate, LanePolicy, LaneWishes, Line, lane_proof
from gpuremote.transport.lanes.rule import MAX_LANES, Way
from gpuremote.transport.setup import Setup
from gpuremote.transport.tcp import TcpConnection, pair
from tests.transport.ends import both

SECRET = b"s" * 32

Firsts = tuple[TcpConnection, TcpConnection]


@pytest.fixture
def firsts() -> Iterator[Firsts]:
    here, there = pair()
    yield here, there
    here.abort()
    there.abort()


class Meeting:
    """The two ends of a set-up of lanes.

    Attributes
    ----------
    dialled : list of int
    """

    def __init__(self, firsts: Firsts, gate: LaneGate | None = None) -> None:
        self.firsts = firsts
        self.gate = gate or LaneGate()
        self.dialled: list[int] = []
        self._lock = threading.Lock()

    def dial(self, number: int, proof: bytes, deadline: float) -> Line:
        assert deadline > _clock.now()
        here, there = socket.socketpair()
        with self._lock:
            self.dialled.append(number)
        self.gate.arrive(there, number, proof)
        return here

    def run(self, number: int = 0, compression: str = "off", answer: float = 0.2) -> list[object]:
        """Both ends' connections, or what they raised."""
        asked = LaneWishes(LanePolicy(number, compression, answer), self.dial)
        deadline = _clock.now() + 10
        here, there = self.firsts
        client = Setup(here, blocking=True, deadline=deadline, secret=SECRET, wishes=asked)
        server = Setup(there, blocking=True, deadline=deadline, secret=SECRET, gate=self.gate)
        return both(
            lambda: select.climb(client, ["tcp"], client=True)[0],
            lambda: select.climb(server, ["tcp"], client=False)[0],
        )

    def laned(self, **wishes: Any) -> tuple[LanesConnection, LanesConnection]:
        here, there = self.run(**wishes)
        assert isinstance(here, LanesConnection)
        assert isinstance(there, LanesConnection)
        return here, there


def works(here: Connection, there: Connection) -> None:
    ends = Ends(here, there)
    (data,) = random_parts([3 << 20])
    for sender, receiver in ((here, there), (there, here)):
        sender.send(b"x", [Region(data)])
        assert place(ends, ends.receive(receiver)) == [data]


@pytest.fixture
def meeting(firsts: Firsts) -> Iterator[Meeting]:
    made = Meeting(firsts)
    yield made
    made.gate.close()


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any way is long enough to be measured."""
    monkeypatch.setattr(lanes_setup, "LONG_WAY", 0.0)


# -- whether, and how many ------------------------------------------------------------------------


def test_on_a_short_way_the_client_says_so_and_nobody_answers(meeting: Meeting) -> None:
    here, there = meeting.firsts
    assert meeting.run(answer=0.0003) == [here, there]
    assert (here.stats.messages_sent, there.stats.messages_sent) == (1, 0)
    assert here.reason == "one connection: answers take 0.3 ms"
    assert there.reason == here.reason
    assert meeting.dialled == []
    works(here, there)


def test_a_busy_machine_is_no_long_way(meeting: Meeting) -> None:
    here, there = meeting.firsts
    # The handshake took long; the answers that follow do not.
    assert meeting.run(answer=0.5) == [here, there]
    assert there.stats.messages_sent <= 1 + lanes_setup.PINGS
    assert here.reason.startswith("one connection: ")
    works(here, there)


@pytest.mark.parametrize("number", [2, 5, MAX_LANES])
def test_as_many_as_were_asked_for(meeting: Meeting, number: int) -> None:
    here, there = meeting.laned(number=number)
    assert sorted(meeting.dialled) == [*range(number)]
    assert len(here.lane_bytes()) == len(there.lane_bytes()) == number
    assert here.name == "tcp"
    assert f"{number} lanes as asked for" in here.reason
    assert here.describe()["lanes"] == there.describe()["lanes"] == number
    works(here, there)
    here.close()
    there.close()


@pytest.mark.usefixtures("long_way")
def test_as_many_as_was_measured(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[Way] = []

    def rule(way: Way) -> int:
        ways.append(way)
        return 3

    monkeypatch.setattr(lanes_setup, "lanes_for", rule)
    rates = iter((50e6, 70e6))
    monkeypatch.setattr(lanes_setup, "bandwidth_of", lambda *_: next(rates))
    monkeypatch.setattr(lanes_setup, "kernel_limit", lambda name: 8 << 20)
    here, there = meeting.laned()
    (way,) = ways
    assert 0 < way.delay < 0.2
    assert way.bandwidth == 70e6
    assert way.window == 4 << 20
    assert f"3 lanes: {way}" in here.reason
    said = here.describe()
    assert (said["lanes"], said["bandwidth"], said["window"]) == (3, 70e6, 4 << 20)
    works(here, there)
    here.close()
    there.close()


@pytest.mark.usefixtures("long_way")
def test_one_is_enough(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_setup, "lanes_for", lambda way: 1)
    here, there = meeting.firsts
    assert meeting.run() == [here, there]
    assert "one connection: round trip " in here.reason
    works(here, there)


@pytest.mark.usefixtures("long_way")
def test_a_burst_ends_in_time(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_setup, "BURST_TIME", 0.0)
    here, there = meeting.firsts
    monkeypatch.setattr(lanes_setup, "lanes_for", lambda way: 1)
    assert meeting.run() == [here, there]
    assert there.stats.bytes_received < 2 * lanes_setup.PART


@pytest.mark.usefixtures("long_way")
def test_no_time_to_measure(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_setup, "ROOM", 1e9)
    here, there = meeting.firsts
    assert meeting.run() == [here, there]
    assert "no time" in here.reason
    assert there.stats.bytes_received < lanes_setup.PART


def test_what_is_worth_offering() -> None:
    assert LanePolicy(0, "off").worth_offering
    assert LanePolicy(2, "auto").worth_offering
    assert not LanePolicy(1, "auto").worth_offering
    assert LanePolicy(1, "lz4").worth_offering


def test_a_server_that_is_busy_later_is_not_far_away() -> None:
    policy = LanePolicy()
    assert policy.heard(0.002, "10.0.0.1") == 0.002
    assert policy.heard(0.5, "10.0.0.1") == 0.002
    assert policy.heard(0.001) == 0.001
    # From somewhere else the way is another one.
    assert policy.heard(0.5, "10.9.9.9") == 0.5


# -- compression ----------------------------------------------------------------------------------


def test_compression_that_is_asked_for_needs_one_lane(meeting: Meeting) -> None:
    here, there = meeting.laned(number=1, compression="lz4", answer=0.0001)
    assert "1 lane: " in here.reason
    assert here.reason.endswith("; lz4")
    assert here.describe()["compression"] == there.describe()["compression"] == "lz4"
    ends = Ends(here, there)
    data = bytes(4 << 20)
    for sender, receiver in ((here, there), (there, here)):
        sender.send(b"", [Region(data)])
        assert place(ends, ends.receive(receiver)) == [data]
        assert sender.stats.extra["lanes_wire"] < len(data) / 10
    here.close()
    there.close()


@pytest.mark.usefixtures("long_way")
def test_on_a_long_way_with_one_connection_a_lane_may_compress(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_setup, "lanes_for", lambda way: 1)
    here, there = meeting.laned(compression="auto")
    assert here.reason.endswith("; zstd where it pays")
    here.close()
    there.close()


def test_a_library_that_is_missing_is_named(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "available", lambda name: False)
    here, there = meeting.laned(number=2, compression="zstd")
    assert "zstandard is not installed here" in here.reason
    assert here.describe()["compression"] == ""
    works(here, there)
    here.close()
    there.close()


def test_a_library_that_the_server_lacks(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compression.wanted_codecs

    def wanted(wish: str) -> tuple[list[str], str]:
        # The server asks for all that there are.
        return (["lz4"], "") if wish == "auto" else real(wish)

    monkeypatch.setattr(lanes_setup, "wanted_codecs", wanted)
    here, there = meeting.laned(number=2, compression="zstd")
    assert "zstandard is not installed at the server" in here.reason
    here.close()
    there.close()


# -- what goes wrong ------------------------------------------------------------------------------


def test_lanes_that_do_not_come_about_are_fewer(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    dial = meeting.dial

    def some(number: int, proof: bytes, deadline: float) -> Line:
        if number % 2:
            raise ConnectionFailed("a firewall")
        return dial(number, proof, deadline)

    monkeypatch.setattr(meeting, "dial", some)
    here, there = meeting.laned(number=5)
    assert len(here.lane_bytes()) == len(there.lane_bytes()) == 3
    works(here, there)
    here.close()
    there.close()


@pytest.mark.parametrize("wrong", ["proof", "number", "refused"])
def test_none_that_comes_about(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(lanes_setup, "PATIENCE", 0.3)
    dial = meeting.dial

    def badly(number: int, proof: bytes, deadline: float) -> Line:
        if wrong == "refused":
            raise ConnectionFailed("a firewall")
        if wrong == "number":
            return dial((number + 1) % 2, proof, deadline)
        return dial(number, bytes(len(proof)), deadline)

    monkeypatch.setattr(meeting, "dial", badly)
    here, there = meeting.firsts
    assert meeting.run(number=2) == [here, there]
    assert "no lane came" in here.reason
    works(here, there)


def test_a_server_that_takes_none(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "gate", None)
    here, there = meeting.firsts
    assert meeting.run(number=2) == [here, there]
    assert "one connection only" in here.reason
    works(here, there)
    meeting.gate = LaneGate()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"codecs": "zstd"},
        {"codecs": [1]},
        {"codecs": ["x"] * 17},
        {"codecs": [], "then": {"dialled": 3, "codec": ""}},
        {"codecs": [], "then": {"dialled": [MAX_LANES], "codec": ""}},
        {"codecs": [], "then": {"dialled": [-1], "codec": ""}},
        {"codecs": [], "then": {"dialled": [0, 0], "codec": ""}},
        {"codecs": [], "then": {"dialled": [True], "codec": ""}},
        {"codecs": [], "then": {"dialled": [0], "codec": "zstd"}},
        {"codecs": [], "then": {"dialled": [0]}},
        {"codecs": [], "then": {"dialled": [0], "codec": "", "rate": "fast"}},
        {"codecs": [], "then": {"burst": 7}},
        {"codecs": [], "then": {"burst": b"x"}, "at last": {"ping": 1}},
    ],
    ids=str,
)
def test_a_client_that_says_something_else(meeting: Meeting, said: dict[str, Any]) -> None:
    here, there = meeting.firsts
    deadline = _clock.now() + 10
    client = Setup(here, blocking=True, deadline=deadline, secret=SECRET)
    server = Setup(there, blocking=True, deadline=deadline, secret=SECRET, gate=meeting.gate)
    first = {key: value for key, value in said.items() if key == "codecs"}
    for message in (first, said.get("then"), said.get("at last")):
        if message is not None:
            client.say(message)
    with pytest.raises(ProtocolError):
        select.climb(server, ["tcp"], client=False)


@pytest.mark.parametrize(
    "said",
    [
        {"nonce": b"short", "codecs": [], "sends": 0, "takes": 0},
        {"nonce": bytes(32), "codecs": [], "sends": -1, "takes": 0},
        {"nonce": bytes(32), "codecs": [], "sends": 0, "takes": float("nan")},
        {"nonce": bytes(32), "codecs": [], "sends": 0, "takes": 0, "lanes": [7]},
        {"nonce": bytes(32), "codecs": [], "sends": 0, "takes": 0, "lanes": "all"},
        {"nonce": bytes(32), "codecs": [], "sends": 0, "takes": 0, "lanes": [0, 7]},
    ],
    ids=str,
)
def test_a_server_that_says_something_else(meeting: Meeting, said: dict[str, Any]) -> None:
    here, there = meeting.firsts
    made: list[socket.socket] = []

    def dial(number: int, proof: bytes, deadline: float) -> Line:
        made.append(socket.socket())
        return made[-1]

    deadline = _clock.now() + 10
    wishes = LaneWishes(LanePolicy(2, "off", 0.2), dial)
    client = Setup(here, blocking=True, deadline=deadline, secret=SECRET, wishes=wishes)
    server = Setup(there, blocking=True, deadline=deadline, secret=SECRET)
    server.say(said)
    server.say({"lanes": said.get("lanes")})
    with pytest.raises(ProtocolError):
        select.climb(client, ["tcp"], client=True)
    assert all(sock.fileno() < 0 for sock in made)


def test_a_first_connection_that_ends_meanwhile(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the lanes is left at either end."""
    made: list[socket.socket] = []

    def dial(number: int, proof: bytes, deadline: float) -> Line:
        here, there = socket.socketpair()
        made.extend((here, there))
        meeting.gate.arrive(there, number, proof)
        if number == 1:
            meeting.firsts[1].abort()
        return here

    monkeypatch.setattr(meeting, "dial", dial)
    assert all(isinstance(end, ConnectionLost) for end in meeting.run(number=2))
    assert len(made) == 4
    assert all(sock.fileno() < 0 for sock in made)


def test_lanes_that_nobody_offered(meeting: Meeting) -> None:
    here, _ = meeting.firsts
    setup = Setup(here, blocking=True, deadline=_clock.now() + 10, secret=SECRET)
    with pytest.raises(ProtocolError):
        select.climb(setup, ["tcp"], client=True)


# -- the gate -------------------------------------------------------------------------------------


def test_nobody_comes_in_without_a_proof() -> None:
    gate = LaneGate()
    lines = [socket.socketpair() for _ in range(7)]
    nonce = b""

    def come(number: int, proof: bytes) -> bool:
        line = lines.pop()
        came = gate.arrive(line[0], number, proof)
        assert came is (line[0].fileno() >= 0)
        line[1].close()
        return came

    assert not come(0, lane_proof(SECRET, nonce, 0))  # nobody waits
    nonce = gate.open(SECRET)
    assert not come(0, lane_proof(b"t" * 32, nonce, 0))
    assert not come(1, lane_proof(SECRET, nonce, 0))
    assert not come(MAX_LANES, lane_proof(SECRET, nonce, MAX_LANES))
    assert come(0, lane_proof(SECRET, nonce, 0))
    assert not come(0, lane_proof(SECRET, nonce, 0))  # once
    found = gate.collect([0, 1], 0.01)
    assert [*found] == [0]
    assert not come(1, lane_proof(SECRET, nonce, 1))  # it is closed
    found[0].close()


def test_a_nonce_is_good_for_one_set_up() -> None:
    gate = LaneGate()
    first = gate.open(SECRET)
    assert gate.open(SECRET) != first
    here, there = socket.socketpair()
    assert not gate.arrive(here, 0, lane_proof(SECRET, first, 0))
    there.close()


def test_a_gate_without_a_secret_lets_nobody_in() -> None:
    gate = LaneGate()
    nonce = gate.open(b"")
    here, there = socket.socketpair()
    assert not gate.arrive(here, 0, lane_proof(b"", nonce, 0))
    there.close()


def test_lanes_that_come_and_are_not_collected_are_closed() -> None:
    gate = LaneGate()
    nonce = gate.open(SECRET)
    here, there = socket.socketpair()
    assert gate.arrive(here, 3, lane_proof(SECRET, nonce, 3))
    gate.close()
    assert here.fileno() < 0
    there.close()
