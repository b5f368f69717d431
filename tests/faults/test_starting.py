"""A worker process that takes longer to start than a client waits for an answer."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import gpuremote
from gpuremote._clock import now
from gpuremote.errors import AuthenticationFailed, HandshakeTimeout, ProtocolError
from gpuremote.rpc import dial
from gpuremote.rpc.dial import read_hello
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.wire.hello import Hello, Starting, Welcome
from tests.faults.processes import descendants
from tests.faults.raw import RawClient, fake_server

SLOW = 4.5
"""Seconds that the worker is held up."""


@pytest.fixture
def server() -> Iterator[RunningServer]:
    """Without a worker that waits for sessions."""
    with device_server("--warm", "0") as running:
        yield running


@contextmanager
def held_up(server: RunningServer) -> Iterator[None]:
    """What starts worker processes is stopped as soon as it is there, and goes on after a while."""
    done = threading.Event()

    def hold() -> None:
        while not done.is_set():
            for pid in descendants(server.process.pid)[:1]:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(SLOW)
                os.kill(pid, signal.SIGCONT)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_it_is_waited_for(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with (
        held_up(server),
        caplog.at_level(logging.INFO, "gpuremote.client"),
        gpuremote.connect_sync(f"{server.url}?connect_timeout=4") as session,
    ):
        assert session.devices[0].ones(3).tolist() == [1, 1, 1]
    assert ["starts a process" in record.message for record in caplog.records] == [True]


async def test_by_a_loop_too(server: RunningServer) -> None:
    with held_up(server):
        async with gpuremote.connect(f"{server.url}?connect_timeout=4") as session:
            assert await session.devices[0].ones(3).tolist() == [1, 1, 1]


def test_a_client_that_does_not_know_of_it(server: RunningServer) -> None:
    """Such a one gets nothing that it could not read."""
    with held_up(server):
        RawClient(server.host, server.port, Hello(transports={"tcp": ""})).close()


def test_a_client_that_gives_up(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that was started for it is no loss to the next one."""
    with held_up(server):
        monkeypatch.setattr(dial, "MAX_START", 0.2)
        with pytest.raises(HandshakeTimeout):
            gpuremote.connect_sync(f"{server.url}?connect_timeout=1.2")
    with gpuremote.connect_sync(server.url) as session:
        assert session.devices[0].ones(2).tolist() == [1, 1]


@pytest.mark.parametrize("seconds", [float("nan"), 1e300, -1.0])
def test_a_server_that_asks_for_more_and_more(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks for is bounded, and it may ask once."""
    monkeypatch.setattr(dial, "MAX_START", 0.3)

    def behave(sock: socket.socket) -> None:
        hello = read_hello(sock, now() + 10.0, "client")
        assert isinstance(hello, Hello)
        assert hello.patient
        sock.sendall(Starting(seconds).encode())
        sock.recv(1)  # until it has enough

    with fake_server(behave) as fake, pytest.raises(HandshakeTimeout):
        gpuremote.connect_sync(f"{fake.url}?connect_timeout=0.5")

    def insist(sock: socket.socket) -> None:
        read_hello(sock, now() + 10.0, "client")
        sock.sendall(2 * Starting(seconds).encode())
        sock.recv(1)

    with fake_server(insist) as fake, pytest.raises(ProtocolError, match="STARTING"):
        gpuremote.connect_sync(f"{fake.url}?connect_timeout=5")


def test_it_takes_nobody_past_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says it before the proof does not know the token."""
    monkeypatch.setenv("GPUREMOTE_TOKEN", "the-token-of-these-tests-0123456789")

    def behave(sock: socket.socket) -> None:
        read_hello(sock, now() + 10.0, "client")
        sock.sendall(Starting(5.0).encode() + Welcome().encode())
        sock.recv(1)

    with (
        fake_server(behave) as fake,
        pytest.raises(AuthenticationFailed, match="did not ask for a token"),
    ):
        gpuremote.connect_sync(fake.url)


def test_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "the-token-of-these-tests-0123456789"
    file = tmp_path / "token"
    file.write_text(secret)
    monkeypatch.setenv("GPUREMOTE_TOKEN", secret)
    with (
        device_server("--warm", "0", "--token-file", str(file)) as server,
        held_up(server),
        gpuremote.connect_sync(f"{server.url}?connect_timeout=4") as session,
    ):
        assert session.devices[0].ones(2).tolist() == [1, 1]
