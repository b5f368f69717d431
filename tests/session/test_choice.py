"""Which transport a session uses, what it says of the others, and what happens when one breaks."""

from __future__ import annotations

import logging
import socket
from typing import Any

import numpy as np
import pytest

from gpuremote import _clock
from gpuremote.client.core import Core
from gpuremote.client.link import Link
from gpuremote.errors import ConnectionFailed, TransportUnavailable
from gpuremote.rpc import cooldown
from gpuremote.testing.servers import RunningServer
from gpuremote.transport import select
from gpuremote.transport.base import Region
from gpuremote.transport.certificates import TlsClient
from gpuremote.transport.setup import Path, Setup
from gpuremote.transport.shm import ShmConnection
from gpuremote.transport.shm_setup import Shm
from gpuremote.wire.frames import NUMBER, Kind
from gpuremote.wire.hello import Hello
from tests.faults.sides import Side

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_preference(transport: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUREMOTE_TRANSPORT")


def broken(setup: Setup) -> Path:
    raise TransportUnavailable("the socket leads nowhere")


def test_the_best_is_used_and_explained(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        explanation = session.transport.explain()
        assert session.transport.name == explanation.chosen == "shm"
        candidates = {c["name"]: c for c in explanation.as_dict()["candidates"]}
        assert candidates.keys() >= {"shm", "rdma", "tcp"}
        assert candidates["shm"]["available"]
        assert all(c["reason"] for c in candidates.values())
        assert session.stats().fallbacks == 0


def test_an_explanation_is_current(
    side: Side, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what a connection finds out while it is used."""
    with side.session(server.url) as session:
        before = session.transport.explain()
        monkeypatch.setattr(ShmConnection, "describe", lambda _: {"found": "out"})
        after = session.transport.explain()
        assert after.connection == {"found": "out"}
        assert after.candidates == before.candidates
        monkeypatch.undo()
        assert session.transport.explain() == before


@pytest.mark.parametrize("name", ["tcp", "shm"])
@pytest.mark.parametrize("option", ["transport", "require"])
def test_one_that_is_asked_for(side: Side, server: RunningServer, option: str, name: str) -> None:
    with side.session(f"{server.url}?{option}={name}") as session:
        assert session.transport.name == name
        host = np.arange(MIB)
        assert np.array_equal(side.do((side.do(session.devices[0].put(host)) + 1).get()), host + 1)
        for candidate in session.transport.explain().candidates:
            if candidate["name"] != name and candidate["name"] != "tcp":
                assert not candidate["available"]


def test_one_that_can_not_be_had(side: Side, server: RunningServer) -> None:
    with pytest.raises(TransportUnavailable) as caught:
        side.do(side.connect(f"{server.url}?require=pigeon"))
    assert caught.value.reasons.keys() >= {"shm", "rdma", "tcp"}


@pytest.mark.parametrize(("wanted", "offered"), [(None, False), ("rdma", True)])
def test_who_asks_for_encryption_gets_no_verbs_unasked(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, offered: bool
) -> None:
    found = (select.Candidate("rdma", True, "a card"), select.Candidate("tcp", True, "sockets"))
    monkeypatch.setattr("gpuremote.rpc.transports.probe", lambda: found)
    hellos: list[Hello] = []

    def dial(host: str, port: int, hello: Hello, **_: Any) -> None:
        hellos.append(hello)
        raise ConnectionFailed("enough")

    monkeypatch.setattr("gpuremote.client.link.dial", dial)
    link = Link("nowhere", 1, tls=TlsClient("", "", ""), transport=wanted)
    with pytest.raises(ConnectionFailed):
        link.open(Core("nowhere"), blocking=True)
    assert ("rdma" in hellos[0].transports) is offered


def test_one_that_does_not_work_is_a_warning(
    side: Side,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Shm, "connect", staticmethod(broken))
    with caplog.at_level(logging.WARNING, "gpuremote"), side.session(server.url) as session:
        assert session.transport.name == "tcp"
        reasons = session.transport.explain().reasons()
        assert "the socket leads nowhere" in reasons["shm"]
        assert session.stats().fallbacks == 1
        side.do(side.do(session.devices[0].put(np.zeros(MIB))).get())
    (warning,) = caplog.messages
    assert "the socket leads nowhere" in warning
    with pytest.raises(TransportUnavailable, match="the socket leads nowhere"):
        side.do(side.connect(f"{server.url}?require=shm"))


def cut(session: Any) -> None:
    """The other process seems to be gone."""
    connection = session._core.peer.connection
    assert isinstance(connection, ShmConnection)
    with socket.socket(fileno=socket.dup(connection.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)


def test_one_that_breaks_is_left(
    side: Side,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cooldown, "FIRST", 1e9)
    with side.session(server.url) as session:
        device = session.devices[0]
        changes: list[str] = []
        end = session.transport.subscribe(lambda told: changes.append(told.chosen))
        host = np.arange(5 * MIB, dtype=np.uint8)
        remote = side.do(device.put(host))
        given = session.empty(5 * MIB, np.uint8)
        given[:] = host
        adopted = side.do(device.put(given))
        view = side.do(remote.get(copy=False))
        cut(session)
        # What was uploaded is there, also the memory that both ends had.
        assert np.array_equal(side.do((remote + adopted).get()), host + host)
        assert np.array_equal(view, host)
        assert session.transport.name == "tcp"
        assert session.stats().fallbacks == 1
        assert "client: " in session.transport.explain().reasons()["shm"]
        assert side.do(side.do(device.put(host)).get()).sum() == host.sum()
        assert session.empty(MIB).flags.writeable  # ordinary memory now
        assert changes == ["tcp"]
        end()
    assert len([m for m in caplog.messages if "shm" in m]) == 1


def test_a_transfer_that_is_taken_back_is_no_failure_of_the_transport(
    side: Side, server: RunningServer
) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        side.do(device.ones(4).wait())
        core = session._core
        with core.lock:
            entry = core.peer.post_payload(
                Kind.PAYLOAD, NUMBER.pack(1 << 40), [Region(bytes(99 * MIB))]
            )
            core.peer.cancel(entry)
        assert side.do(device.ones(4).sum().item()) == 4
        assert session.transport.name == "shm"
        assert session.stats().fallbacks == 0
        assert session.stats().reconnects == 1


def test_one_that_broke_comes_back(
    side: Side, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooldown, "FIRST", 0.2)
    with side.session(server.url) as session:
        device = session.devices[0]
        changes: list[str] = []
        session.transport.subscribe(lambda told: changes.append(told.chosen))
        x = device.ones(MIB)
        side.do(x.wait())
        cut(session)
        deadline = _clock.now() + 30
        while changes != ["tcp", "shm"]:
            assert _clock.now() < deadline, changes
            side.do(x.sum().item())
        assert side.do(x.sum().item()) == MIB


def test_a_payload_under_way_when_it_breaks(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        hosts = [np.full(3 * MIB, k, np.uint8) for k in range(8)]
        remotes = side.do(device.put_many(hosts))
        for k in range(8):
            remotes.append(side.do(device.put(hosts[k])))
        if session.transport.name == "shm":
            cut(session)
        for k, remote in enumerate(remotes):
            assert np.array_equal(side.do(remote.get()), hosts[k % 8])
