"""Sessions over lanes: with both drivers, with and without TLS and a token, over connections that
break, with strangers who would like to be a lane."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuremote._clock import now
from gpuremote.errors import AuthenticationFailed, SessionLost
from gpuremote.rpc.dial import read_hello
from gpuremote.testing.cutting import CuttingProxy, Direction
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.transport.lanes.connection import LanesConnection
from gpuremote.transport.lanes.rule import Way, lanes_for
from gpuremote.transport.tls import TlsSocket
from gpuremote.wire.hello import Attach, Challenge, Hello, Refusal, Welcome
from tests.certificates import Authority
from tests.faults.sides import Side

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
TOKEN = secrets.token_urlsafe(32)
QUERY = "?transport=tcp&lanes=3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("lanes")
    (found / "token").write_text(TOKEN)
    (found / "token").chmod(0o600)
    return found


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def guarded(folder: Path, authority: Authority) -> Iterator[RunningServer]:
    """Speaks TLS, and wants a token."""
    own = authority.issue("server")
    with device_server(
        *("--certfile", own.certfile, "--keyfile", own.keyfile),
        *("--token-file", str(folder / "token")),
    ) as server:
        yield server


@pytest.fixture(scope="module")
def token_only(folder: Path) -> Iterator[RunningServer]:
    with device_server("--token-file", str(folder / "token")) as server:
        yield server


def pattern(size: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def lanes_of(session: Any) -> LanesConnection:
    connection = session._core.peer.connection
    assert isinstance(connection, LanesConnection)
    return connection


def go_there_and_back(side: Side, session: Any) -> None:
    device = session.devices[0]
    hosts = [pattern(9 * MIB + k, k) for k in range(3)]
    remotes = side.do(device.put_many(hosts))
    for host, remote in zip(hosts, remotes, strict=True):
        assert np.array_equal(side.do((remote + 1).get()), host + 1)


def test_arrays_go_there_and_back(side: Side, server: RunningServer) -> None:
    with side.session(server.url + QUERY) as session:
        explained = session.transport.explain()
        assert explained.chosen == "tcp"
        assert "3 lanes as asked for" in explained.reason
        assert explained.connection["lanes"] == 3
        go_there_and_back(side, session)
        lanes = lanes_of(session)
        assert all(sent > MIB and received > MIB for sent, received in lanes.lane_bytes())
        assert session.stats().payload_copied == 0
        assert side.do(session.devices[0].ones(1000).sum().item()) == 1000


@pytest.mark.parametrize("which", ["guarded", "token_only"])
def test_as_well_protected_as_the_first(
    side: Side,
    which: str,
    guarded: RunningServer,
    token_only: RunningServer,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = guarded if which == "guarded" else token_only
    monkeypatch.setenv("GPUREMOTE_TOKEN", TOKEN)
    query = QUERY + (f"&cafile={authority.cafile}" if which == "guarded" else "")
    with side.session(server.url + query) as session:
        lanes = lanes_of(session)
        assert all((lane.tls is not None) is (which == "guarded") for lane in lanes._lanes)
        go_there_and_back(side, session)
        assert all(sent > MIB and received > MIB for sent, received in lanes.lane_bytes())


def test_compression(side: Side, server: RunningServer) -> None:
    with side.session(server.url + "?transport=tcp&lanes=1&compression=lz4") as session:
        host = np.zeros(16 * MIB, np.uint8)
        remote = side.do(session.devices[0].put(host))
        assert np.array_equal(side.do(remote.get()), host)
        lanes = lanes_of(session)
        ((sent, received),) = lanes.lane_bytes()
        assert sent < MIB
        assert received < MIB
        assert session.transport.explain().connection["compression"] == "lz4"
        go_there_and_back(side, session)


def test_on_one_host_there_are_none_unasked(side: Side, server: RunningServer) -> None:
    with side.session(server.url + "?transport=tcp") as session:
        assert "lanes" not in session.transport.explain().connection
        assert "one connection" in session.transport.explain().reason
    with side.session(server.url + "?transport=tcp&lanes=1") as session:
        assert "one connection" not in session.transport.explain().reason


def test_on_a_long_way_there_are_as_many_as_it_needs(side: Side, server: RunningServer) -> None:
    """Also where the kernel takes it for a short one, as here."""
    with (
        CuttingProxy(server.host, server.port, delay=0.05, bandwidth=500e6) as proxy,
        side.session(proxy.url) as session,
    ):
        explained = session.transport.explain()
        found = explained.connection
        assert found["delay"] >= 0.1
        way = Way(found["delay"], found["bandwidth"], found["window"])
        assert 1 < found["lanes"] == lanes_for(way)
        assert f"{found['lanes']} lanes: {way}" in explained.reason
        assert proxy.open_connections == 1 + found["lanes"]
        host = pattern(24 * MIB, 3)
        assert np.array_equal(side.do(side.do(session.devices[0].put(host)).get()), host)
        assert session.stats().payload_copied == 0
        # What was lost is made up for over the same way.
        proxy.cut()
        assert side.do(session.devices[0].ones(5).sum().item()) == 5
        assert session.transport.explain().connection["lanes"] > 1


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_lane_that_is_cut(side: Side, server: RunningServer, direction: Direction) -> None:
    """One connection is cut in the middle of a payload, whichever it is; the session goes on."""
    with (
        CuttingProxy(server.host, server.port) as proxy,
        side.session(f"{proxy.url}&lanes=3") as session,
    ):
        device = session.devices[0]
        host = pattern(24 * MIB, 7)
        remote = side.do(device.put(host))
        for cut in range(1, 5):
            before = proxy.cuts
            forwarded = proxy.bytes_up if direction == "up" else proxy.bytes_down
            proxy.cut_after(forwarded + cut * 5 * MIB + 12_345, direction)
            if direction == "up":
                remote = side.do(device.put(host))
            else:
                assert np.array_equal(side.do(remote.get()), host)
            assert proxy.cuts == before + 1
            assert np.array_equal(side.do(remote.get()), host)
            lanes_of(session)
        assert session.stats().reconnects == 4


def test_everything_is_cut_again_and_again(side: Side, server: RunningServer) -> None:
    with (
        CuttingProxy(server.host, server.port) as proxy,
        side.session(f"{proxy.url}&lanes=4") as session,
    ):
        host = pattern(24 * MIB, 8)
        proxy.cut_after(6 * MIB + 1, "up", repeat=True)
        remotes = [side.do(session.devices[0].put(host)) for _ in range(3)]
        proxy.cut_never()
        for remote in remotes:
            assert np.array_equal(side.do(remote.get()), host)
        assert session.stats().reconnects >= 5


def test_a_transfer_that_is_taken_back(side: Side, server: RunningServer) -> None:
    with side.session(server.url + QUERY) as session:
        device = session.devices[0]
        host = pattern(24 * MIB, 9)
        remote = side.do(device.put(host))
        out = np.zeros_like(host)
        with pytest.raises(TimeoutError):
            side.do(remote.get(out=out, timeout=0.0))
        out[:] = 0
        assert np.array_equal(side.do(remote.get()), host)
        assert not out.any()


# -- strangers ------------------------------------------------------------------------------------


def call(server: RunningServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=10)


def hear(sock: socket.socket | TlsSocket) -> Any:
    return read_hello(sock, now() + 10, "server")


@pytest.mark.parametrize("lane", [0, 3, -1, 1 << 40])
def test_a_lane_that_nobody_waits_for_is_closed(
    side: Side, server: RunningServer, lane: int
) -> None:
    with side.session(server.url + QUERY) as session:
        known = session._link.welcome.session
        with call(server) as sock:
            sock.sendall(Attach(known, lane, secrets.token_bytes(32)).encode())
            assert sock.recv(1) == b""
        go_there_and_back(side, session)
        assert session.stats().reconnects == 0


def test_a_lane_of_a_session_that_is_not_there(server: RunningServer) -> None:
    with call(server) as sock:
        sock.sendall(Attach(b"x" * 16, 0, bytes(32)).encode())
        answer = hear(sock)
        assert isinstance(answer, Refusal)
        assert answer.code == SessionLost.code


def test_a_lane_needs_the_token(
    side: Side, token_only: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUREMOTE_TOKEN", TOKEN)
    with side.session(token_only.url + QUERY) as session, call(token_only) as sock:
        sock.sendall(Attach(session._link.welcome.session, 0, bytes(32)).encode())
        assert isinstance(hear(sock), Challenge)
        sock.sendall(Attach(session._link.welcome.session, 0, bytes(32)).encode())
        answer = hear(sock)
        assert isinstance(answer, Refusal)
        assert answer.code == AuthenticationFailed.code


def test_a_lane_in_the_clear_of_a_server_with_tls(guarded: RunningServer) -> None:
    with call(guarded) as sock:
        sock.sendall(Attach(b"x" * 16, 0, bytes(32)).encode())
        answer = hear(sock)
        assert isinstance(answer, Refusal)
        assert answer.code == AuthenticationFailed.code


def test_a_stranger_during_the_set_up(server: RunningServer) -> None:
    """He knows the number of the session, which is no secret, and comes while lanes are awaited."""
    with call(server) as sock:
        sock.sendall(Hello(transports={"tcp": ""}, lanes=1).encode())
        welcome = hear(sock)
        assert isinstance(welcome, Welcome)
        assert welcome.choice["order"] == ["tcp"]
        descriptors = len(os.listdir(f"/proc/{welcome.worker}/fd"))
        for lane in (0, 1, 2):
            with call(server) as stranger:
                stranger.sendall(Attach(welcome.session, lane, bytes(32)).encode())
                assert stranger.recv(1) == b""
        assert len(os.listdir(f"/proc/{welcome.worker}/fd")) == descriptors
