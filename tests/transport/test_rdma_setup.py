"""How an RDMA connection is brought up, and all that keeps it from that."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from gpuremote import _clock
from gpuremote.errors import ConnectionLost, ProtocolError, TransportUnavailable
from gpuremote.testing.driving import Ends, place
from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport import rdma
from gpuremote.transport.base import Connection
from gpuremote.transport.rdma import Rdma, RdmaConnection
from gpuremote.transport.rdma.setup import Options, RdmaPath, bring_up
from gpuremote.transport.setup import Setup, upgrade
from gpuremote.transport.tcp import TcpConnection
from gpuremote.transport.verbs.base import Gid, GidKind, VerbsError, VerbsProvider
from gpuremote.transport.verbs.gids import gid_of
from tests.rdma.ends import LOOPBACK, connected, first_pair
from tests.transport.ends import both


def gid(host: str, kind: GidKind = GidKind.ROCE_V2) -> Gid:
    raw = gid_of(host)
    assert raw is not None
    return Gid(0, raw, kind)


@pytest.fixture
def firsts() -> Iterator[tuple[TcpConnection, TcpConnection]]:
    here, there = first_pair(LOOPBACK, blocking=True)
    yield here, there
    here.abort()
    there.abort()


def setups(firsts: tuple[Connection, Connection], seconds: float = 20.0) -> list[Setup]:
    deadline = _clock.now() + seconds
    return [Setup(first, blocking=True, deadline=deadline) for first in firsts]


def _given(provider: VerbsProvider) -> VerbsProvider:
    return provider


def attempt(
    firsts: tuple[Connection, Connection],
    here: VerbsProvider,
    there: VerbsProvider,
    options: tuple[Options, Options] = (Options(), Options()),
) -> list[object]:
    """Bring both ends up through the set-up of a session; what each gave or raised."""

    def transport(provider: VerbsProvider, wanted: Options) -> type[Rdma]:
        class Chosen(Rdma):
            pass

        Chosen.options = wanted
        Chosen.provider = staticmethod(partial(_given, provider))
        return Chosen

    one, other = setups(firsts)
    return both(
        lambda: upgrade(one, transport(here, options[0]), client=True),
        lambda: upgrade(other, transport(there, options[1]), client=False),
    )


def refused(found: list[object]) -> list[str]:
    assert [type(one) for one in found] == [TransportUnavailable] * 2, found
    return [getattr(one, "message", "") for one in found]


def still_works(firsts: tuple[Connection, Connection]) -> None:
    firsts[0].send(b"goes on")
    incoming = firsts[1].receive(1.0)
    assert incoming is not None
    assert bytes(incoming.header) == b"goes on"


def nothing_left(*providers: FakeVerbs) -> None:
    for verbs in providers:
        assert (verbs.open_devices, verbs.registered, verbs.pairs) == (0, 0, {})


def test_both_ends_come_up(firsts: tuple[TcpConnection, TcpConnection]) -> None:
    verbs = FakeVerbs()
    here, there = attempt(firsts, verbs, verbs)
    assert isinstance(here, RdmaConnection)
    assert isinstance(there, RdmaConnection)
    # 4 KiB on every queue pair that writes, in both directions.
    assert verbs.written == [4096] * 6
    said = here.describe()
    assert said["transport"] == "rdma"
    assert said["lanes"] == 2
    assert said["devices"] == ["fake0"]
    assert "RoCE v2 on fake0 as 127.0.0.1" in str(said["reason"])
    here.close()
    there.abort()
    assert firsts[0].closed
    assert firsts[1].closed
    nothing_left(verbs)


def test_the_smaller_number_counts(firsts: tuple[TcpConnection, TcpConnection]) -> None:
    verbs = FakeVerbs(("one", "two", "three"))
    options = Options(lanes=5, rails=3), Options(lanes=3, rails=2)
    here, there = attempt(firsts, verbs, verbs, options)
    assert isinstance(here, RdmaConnection)
    assert isinstance(there, RdmaConnection)
    assert here.describe()["devices"] == there.describe()["devices"] == ["one", "two"]
    assert here.describe()["lanes"] == 3
    ends = Ends(here, there)
    here.send(b"", [here.register(bytes(9 << 20))])
    assert place(ends, ends.receive(there)) == [bytes(9 << 20)]
    here.abort()
    there.abort()
    nothing_left(verbs)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"names": ()}, "no RDMA device"),
        ({"port": {"active": False, "state": "down"}}, "port 1 of fake0 is down"),
        ({"gids": ()}, "port 1 of fake0 has no usable GID"),
        ({"gids": (Gid(0, bytes(16), GidKind.ROCE_V2),)}, "has no usable GID"),
        ({"lockable": 65536}, "ulimit -l"),
    ],
    ids=["no device", "port down", "no GID", "zero GID", "memlock"],
)
def test_what_one_end_lacks(
    firsts: tuple[TcpConnection, TcpConnection],
    failing: int,
    change: dict[str, Any],
    reason: str,
) -> None:
    good = FakeVerbs()
    if "port" in change:
        change = {"port": dataclasses.replace(good.port, **change["port"])}
    bad = FakeVerbs(**change)
    providers = (bad, good) if failing == 0 else (good, bad)
    said = refused(attempt(firsts, *providers))
    assert reason in said[failing]
    assert said[1 - failing] == f"the other end: {said[failing]}"
    nothing_left(good, bad)
    still_works(firsts)


def test_versions_of_roce_that_do_not_mix(firsts: tuple[TcpConnection, TcpConnection]) -> None:
    old = FakeVerbs(gids=(gid("10.0.0.1", GidKind.ROCE_V1),))
    new = FakeVerbs(gids=(gid("10.0.0.2"),))
    said = refused(attempt(firsts, old, new))
    assert "no usable GID for RoCE v1" in said[1]
    nothing_left(old, new)


@pytest.mark.parametrize(
    ("fault", "reason"), [("link", "RETRY_EXC_ERR"), ("corrupt", "arrived as something else")]
)
def test_a_way_that_does_not_work(
    firsts: tuple[TcpConnection, TcpConnection], fault: str, reason: str
) -> None:
    verbs = FakeVerbs()
    setattr(verbs, fault, fault == "corrupt")
    assert any(reason in text for text in refused(attempt(firsts, verbs, verbs)))
    nothing_left(verbs)
    still_works(firsts)


def test_a_path_that_is_abandoned(firsts: tuple[TcpConnection, TcpConnection]) -> None:
    verbs = FakeVerbs()
    one, other = setups(firsts)
    paths = both(
        lambda: bring_up(one, verbs, Options(), client=True),
        lambda: bring_up(other, verbs, Options(), client=False),
    )
    for path in paths:
        assert isinstance(path, RdmaPath)
        path.abandon()
    nothing_left(verbs)
    still_works(firsts)


GOOD: dict[str, Any] = {
    "version": 1,
    "lanes": 1,
    "ring": [64, 16384],
    "rails": [{"gid": bytes(15) + b"1", "kind": "RoCE v2", "lid": 0, "mtu": 1024, "message": 4096}],
}
RAIL = GOOD["rails"][0]


@pytest.mark.parametrize(
    "said",
    [
        {},
        {**GOOD, "version": 2},
        {**GOOD, "lanes": 0},
        {**GOOD, "lanes": 1 << 40},
        {**GOOD, "lanes": True},
        {**GOOD, "ring": [64]},
        {**GOOD, "ring": [1, 16384]},
        {**GOOD, "ring": [64, 16]},
        {**GOOD, "rails": []},
        {**GOOD, "rails": [RAIL] * 100},
        {**GOOD, "rails": [7]},
        {**GOOD, "rails": [{**RAIL, "gid": b"short"}]},
        {**GOOD, "rails": [{**RAIL, "kind": "RoCE v9"}]},
        {**GOOD, "rails": [{**RAIL, "mtu": 1000}]},
        {**GOOD, "rails": [{**RAIL, "message": 1}]},
    ],
)
def test_a_client_that_says_nonsense(
    firsts: tuple[TcpConnection, TcpConnection], said: dict[str, Any]
) -> None:
    verbs = FakeVerbs()
    one, other = setups(firsts)
    one.say(said)
    with pytest.raises((ProtocolError, TransportUnavailable)):
        bring_up(other, verbs, Options(), client=False)
    nothing_left(verbs)


@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"out": [[1, 2]], "in": [[1, 2]], "trial": [[0, 0], [0, 0]], "control": [1]},
        {"out": [[1, 2]], "in": [[1, 1 << 24]], "trial": [[0, 0], [0, 0]], "control": [1, 2]},
        {"out": [[1, 2]], "in": [], "trial": [[0, 0], [0, 0]], "control": [1, 2]},
        {"out": [[1, 2]], "in": [[1, 2]], "trial": [[0, 0]], "control": [1, 2]},
        {"out": [[1, 2]], "in": [[1, 2]], "trial": [[0, 0], [-1, 0]], "control": [1, 2]},
    ],
)
def test_a_client_whose_queue_pairs_are_none(
    firsts: tuple[TcpConnection, TcpConnection], ends: dict[str, Any]
) -> None:
    verbs = FakeVerbs()
    one, other = setups(firsts)
    one.say(GOOD)
    one.say(ends)
    with pytest.raises(ProtocolError):
        bring_up(other, verbs, Options(), client=False)
    nothing_left(verbs)


def test_a_peer_that_goes_away(firsts: tuple[TcpConnection, TcpConnection]) -> None:
    verbs = FakeVerbs()
    firsts[0].abort()
    with pytest.raises(ConnectionLost):
        bring_up(setups(firsts)[1], verbs, Options(), client=False)
    nothing_left(verbs)


# -- what the probe says ---------------------------------------------------------------------------


class Failing:
    """A provider that can't."""

    name = "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def devices(self) -> list[str]:
        raise self.error

    def open(self, name: str) -> Any:
        raise self.error


def probed(provider: VerbsProvider) -> tuple[bool, str]:
    class Probed(Rdma):
        pass

    Probed.provider = staticmethod(partial(_given, provider))
    return Probed.probe()


def test_a_probe_that_finds_something() -> None:
    verbs = FakeVerbs()
    works, reason = probed(verbs)
    assert works
    assert reason.startswith("fake0 port 1, RoCE v2 as ")
    nothing_left(verbs)


def test_a_probe_of_what_can_not_be_used() -> None:
    assert probed(FakeVerbs(())) == (False, "no RDMA device (`rdma link` shows what there is)")
    little = FakeVerbs(lockable=65536)
    works, reason = probed(little)
    assert not works
    assert "ulimit -l" in reason
    nothing_left(little)
    works, reason = probed(Failing(VerbsError("devices can't be listed", 38)))
    assert not works
    assert "ENOSYS" in reason
    assert probed(Failing(RuntimeError("odd"))) == (False, "RuntimeError: odd")


def test_a_machine_without_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    provider = rdma.default_provider.__wrapped__
    empty = tmp_path_factory.mktemp("class")
    monkeypatch.setattr(rdma, "_CLASS", empty / "missing")
    with pytest.raises(TransportUnavailable, match="no RDMA device on this machine"):
        provider()
    monkeypatch.setattr(rdma, "_CLASS", empty)
    with pytest.raises(TransportUnavailable, match="no RDMA device on this machine"):
        provider()
    (empty / "mlx5_0").mkdir()
    monkeypatch.setattr(rdma, "_NODES", empty / "nodes")
    with pytest.raises(TransportUnavailable, match="ib_uverbs"):
        provider()
    (empty / "nodes").mkdir()
    (empty / "nodes" / "uverbs0").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TransportUnavailable, match="not permitted"):
        provider()
    monkeypatch.setattr(os, "access", lambda *_: True)

    def absent() -> None:
        raise ImportError("No module named 'pyverbs'")

    monkeypatch.setattr(rdma, "PyverbsProvider", absent)
    with pytest.raises(TransportUnavailable, match="install python3-pyverbs"):
        provider()


def test_many_connections_leave_nothing() -> None:
    verbs = FakeVerbs()
    for _ in range(5):
        for end in connected(blocking=False, over=LOOPBACK, provider=verbs):
            end.abort()
    nothing_left(verbs)
