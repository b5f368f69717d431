"""Opening and tuning sockets, and the choice of a transport."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from benchmarks.network import private_network
from gpuremote.errors import ConnectionFailed, ConnectionLost
from gpuremote.server.daemon import _listen
from gpuremote.transport import congestion
from gpuremote.transport.tcp import TcpConnection, join_address, open_tcp, pair, tune


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = open_tcp("127.0.0.1", listener.getsockname()[1], 5)
        there, _ = listener.accept()
    return here, there


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_open_by_name_finds_the_address_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        open_tcp("localhost", listener.getsockname()[1], 5).close()


def test_refused() -> None:
    port = unused_port()
    with pytest.raises(ConnectionFailed, match=r"(?s)refused.*gpuremote serve") as caught:
        open_tcp("127.0.0.1", port, 5)
    assert caught.value.peer == f"127.0.0.1:{port}"
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


@pytest.mark.parametrize("host", ["host.invalid", "a" * 70, "", "\0"])
def test_no_such_host(host: str) -> None:
    with pytest.raises(ConnectionFailed):
        open_tcp(host, 9, 0.5)


def test_no_answer_in_time() -> None:
    """A queue of connections that is full answers nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        waiting = open_tcp("127.0.0.1", port, 0.2)
        begin = time.monotonic()
        with pytest.raises(ConnectionFailed, match="no answer within"):
            open_tcp("127.0.0.1", port, 0.2)
        assert 0.15 < time.monotonic() - begin < 2
        waiting.close()


def test_tune() -> None:
    here, there = tcp_pair()
    for sock in (here, there):
        reason = tune(sock)
        assert reason.startswith("congestion control ")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        sock.close()
    assert tune(here).startswith("congestion control ")  # closed: nothing set, and no error


def test_tune_leaves_unix_sockets() -> None:
    here, there = socket.socketpair()
    assert tune(here) == "Unix socket"
    here.close()
    there.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="Linux only")
def test_congestion_control(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tcp_pair()
    assert congestion.choose(here) == (congestion.current(here), "same host")
    rtt = congestion.round_trip(here)
    assert rtt is not None
    assert 0 < rtt < 1
    monkeypatch.setattr(congestion, "same_host", lambda _: False)
    monkeypatch.setattr(congestion, "round_trip", lambda _: 0.0005)
    algorithm, why = congestion.choose(here)
    assert why.endswith("0.50 ms, short")
    monkeypatch.setattr(congestion, "round_trip", lambda _: 0.08)
    algorithm, why = congestion.choose(here)
    assert "round trip 80.00 ms, long" in why
    assert algorithm == congestion.current(here)
    monkeypatch.setattr(congestion, "_wanted", lambda _: ("no-such-thing", "a test"))
    algorithm, why = congestion.choose(here)
    assert algorithm == congestion.current(here)
    assert "no-such-thing can't be set" in why
    monkeypatch.undo()
    here.close()
    there.close()
    assert congestion.round_trip(here) is None
    assert congestion.unacknowledged(here) == 0
    assert congestion.choose(here)[0] == ""


def test_no_connection_begins_paced() -> None:
    """Where ``bbr`` is the default, what was set afterwards did not end the pacing."""
    with private_network("bbr") as why:
        if why:
            pytest.skip(f"no network whose default is bbr: {why}")
        plain = socket.create_server(("127.0.0.1", 0))
        host, port = plain.getsockname()
        other = socket.create_connection((host, port))
        assert congestion.current(other) == "bbr"
        prepared = _listen("127.0.0.1", 0)
        here = open_tcp("127.0.0.1", prepared.getsockname()[1], 5.0)
        there, _ = prepared.accept()
        assert [congestion.current(sock) for sock in (prepared, here, there)] == ["reno"] * 3
        for sock in (plain, other, prepared, here, there):
            sock.close()


def test_addresses() -> None:
    assert join_address("::1", 7700) == "[::1]:7700"
    here, there = tcp_pair()
    connection = TcpConnection(here, blocking=True, reason="a test")
    assert connection.peer_address == join_address(*there.getsockname())
    assert connection.describe()["reason"] == "a test"
    connection.close()
    there.close()
    first, second = pair()
    assert first.local_address == second.peer_address == "unix"
    first.close()
    second.close()


def test_socket_that_is_not_connected() -> None:
    with socket.socket() as sock, pytest.raises(ConnectionLost, match="not connected"):
        TcpConnection(sock, blocking=True)


def test_mode_of_the_socket() -> None:
    here, there = socket.socketpair()
    first, second = TcpConnection(here, blocking=True), TcpConnection(there, blocking=False)
    assert here.gettimeout() is None
    assert there.gettimeout() == 0.0
    seconds, _ = struct.unpack(
        "@ll", here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.calcsize("@ll"))
    )
    assert seconds == 1
    first.close()
    second.close()
