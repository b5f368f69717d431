"""A worker's side of a handshake that breaks in the middle."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gpuremote._clock import now
from gpuremote.errors import ConnectionLost
from gpuremote.rpc.dial import read_hello
from gpuremote.server import control
from gpuremote.server.worker import Worker
from gpuremote.wire.hello import Hello, Welcome
from gpuremote.wire.state import State

OPTIONS = argparse.Namespace(
    backend="numpy",
    devices=1,
    memory_limit=1 << 20,
    grace=30.0,
    software="gpuremote",
    allow_ops=[],
    allow_kernels=False,
    contents=-1,
    **dict.fromkeys(("certfile", "keyfile", "client_ca", "cafile", "weights"), ""),
)
HELLO = Hello(transports={"tcp": ""})
REQUEST: dict[str, Any] = {
    "event": "connection",
    "number": 1,
    "server": "s" * 32,
    "session": b"n" * 16,
    "secret": b"x" * 32,
    "choice": {"order": []},
    "advertise": "",
}


@pytest.fixture
def worker() -> Iterator[Worker]:
    ours, theirs = control.pair()
    with ours, theirs:
        made = Worker(theirs, OPTIONS)
        yield made
        for descriptor in (made._wake_main, made._wake_control):
            os.close(descriptor)


def test_a_session_that_was_welcomed_outlives_its_first_connection(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It breaks behind the welcome: the client has a session, and will come back for it."""

    def breaks(*_: object) -> None:
        raise ConnectionLost("gone")

    def ends(_: int) -> None:
        raise AssertionError("the worker ended")

    monkeypatch.setattr(worker, "_best_path", breaks)
    monkeypatch.setattr(os, "_exit", ends)
    client, server = socket.socketpair()
    with client:
        worker._admit(server, HELLO, dict(REQUEST))
        assert isinstance(read_hello(client, now() + 10, "the worker"), Welcome)
    assert "came and went: gone" in capsys.readouterr().err
    assert worker.state.value is State.LOST
    assert worker._welcomed.is_set()
    assert not worker._attached.is_set()


def test_a_session_that_was_not_welcomed_ends_with_its_connection(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its client has heard nothing; the daemon gives it another worker."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    client, server = socket.socketpair()
    client.close()
    worker._admit(server, HELLO, dict(REQUEST))
    assert ended == [1]
    assert worker.state.value is State.NEW
