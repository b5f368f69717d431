"""Who may open a session: the shared token, over real sockets."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import AuthenticationFailed, ConfigError, PeerCopyFailed, error_from_wire
from gpuremote.rpc.dial import read_hello
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.wire.hello import Challenge, Hello, Proof, Refusal, Welcome
from gpuremote.wire.identity import client_proof, server_proof
from tests.faults.sides import Side

TOKEN = secrets.token_urlsafe(32)
DEADLINE = 1e9


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identity") / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture(scope="module")
def guarded(token_file: Path) -> Iterator[RunningServer]:
    with device_server("--token-file", str(token_file)) as server:
        yield server


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUREMOTE_TOKEN", TOKEN)


def call(server: RunningServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=10)


def hear(sock: socket.socket) -> Any:
    return read_hello(sock, DEADLINE, "the server")


def works(side: Side, url: str) -> bool:
    with side.session(url) as session:
        x = session.devices[0].arange(3)
        return bool(side.do((x + 1).tolist()) == [1, 2, 3])


@pytest.mark.usefixtures("known")
def test_with_the_token(side: Side, guarded: RunningServer) -> None:
    assert works(side, guarded.url)


def test_without_the_token(side: Side, guarded: RunningServer) -> None:
    with pytest.raises(AuthenticationFailed, match="GPUREMOTE_TOKEN") as caught:
        side.do(side.connect(guarded.url))
    assert not caught.value.retryable
    assert isinstance(caught.value, PermissionError)
    assert caught.value.peer == f"127.0.0.1:{guarded.port}"


def test_with_another_token(
    side: Side, guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUREMOTE_TOKEN", secrets.token_urlsafe(32))
    with pytest.raises(AuthenticationFailed, match="not the one that this server knows"):
        side.do(side.connect(guarded.url))
    monkeypatch.setenv("GPUREMOTE_TOKEN", TOKEN)
    assert works(side, guarded.url)


@pytest.mark.usefixtures("known")
def test_a_server_that_asks_for_nothing(side: Side) -> None:
    """It may not be the one that the program means."""
    with device_server() as open_to_all, pytest.raises(AuthenticationFailed, match="did not ask"):
        side.do(side.connect(open_to_all.url))


@pytest.mark.usefixtures("known")
def test_a_server_of_this_process_needs_none(side: Side) -> None:
    assert works(side, "local://")


def test_a_token_that_can_be_guessed(
    tmp_path: Path, guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUREMOTE_TOKEN", "secret")
    with pytest.raises(ConfigError, match="GPUREMOTE_TOKEN: a token of 6 characters"):
        gpuremote.connect_sync(guarded.url)
    short = tmp_path / "short"
    short.write_text("secret")
    for path, text in ((short, "6 characters"), (tmp_path / "missing", "can't be read")):
        done = subprocess.run(
            [sys.executable, "-m", "gpuremote", "serve", "--token-file", str(path)],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 2
        assert text in done.stderr


@pytest.mark.usefixtures("known")
def test_resuming_needs_it_too(side: Side, guarded: RunningServer) -> None:
    with (
        CuttingProxy(guarded.host, guarded.port) as proxy,
        side.session(f"gpu://127.0.0.1:{proxy.port}") as session,
    ):
        x = session.devices[0].arange(1000)
        for _ in range(3):
            proxy.cut()
            x = x + 1
            assert side.do(x.sum().item()) > 0
        assert session.stats().reconnects == 3


@pytest.mark.usefixtures("known")
def test_servers_that_copy_to_each_other(
    side: Side, guarded: RunningServer, token_file: Path, tmp_path: Path
) -> None:
    with (
        device_server("--token-file", str(token_file)) as friend,
        side.session(guarded.url) as here,
        side.session(friend.url) as there,
    ):
        x = here.devices[0].arange(100_000)
        copied = x.copy_to(there.devices[0])
        assert np.array_equal(side.do(copied.get()), np.arange(100_000))


def test_a_server_with_another_token_brings_nothing(
    side: Side, guarded: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with device_server() as stranger, side.session(stranger.url) as there:
        monkeypatch.setenv("GPUREMOTE_TOKEN", TOKEN)
        with side.session(guarded.url) as here:
            copied = there.devices[0].arange(100_000).copy_to(here.devices[0])
            with pytest.raises(PeerCopyFailed, match="token"):
                side.do(copied.get())
            assert side.do(here.devices[0].ones(2).tolist()) == [1, 1]
        monkeypatch.delenv("GPUREMOTE_TOKEN")
        with pytest.raises(PeerCopyFailed):
            side.do(there.synchronize())


def test_nothing_is_looked_at_before_the_proof(guarded: RunningServer) -> None:
    """Not even whether the handshake is one."""
    garbage = Hello().encode()[:8] + (4).to_bytes(4, "little") + b"\xc1\xff\xff\xff"
    with call(guarded) as sock:
        sock.sendall(garbage)
        challenge = hear(sock)
        assert isinstance(challenge, Challenge)
        sock.sendall(Proof(secrets.token_bytes(32)).encode())
        refusal = hear(sock)
        assert isinstance(refusal, Refusal)
        assert isinstance(error_from_wire(refusal.code, ""), AuthenticationFailed)


def test_a_proof_is_good_for_one_handshake(guarded: RunningServer) -> None:
    hello = Hello(nonce=secrets.token_bytes(32)).encode()
    token = TOKEN.encode()
    with call(guarded) as sock:
        sock.sendall(hello)
        first = hear(sock)
        proof = client_proof(token, first.nonce, hello)
        sock.sendall(Proof(proof).encode())
        assert hear(sock).proof == server_proof(token, first.nonce, hello)
        assert isinstance(hear(sock), Welcome)
    with call(guarded) as sock:
        sock.sendall(hello)
        assert hear(sock).nonce != first.nonce
        sock.sendall(Proof(proof).encode())
        assert isinstance(hear(sock), Refusal)
    with call(guarded) as sock:  # nor for another HELLO
        changed = Hello(nonce=secrets.token_bytes(32), memory_limit=1).encode()
        sock.sendall(changed)
        sock.sendall(Proof(client_proof(token, hear(sock).nonce, hello)).encode())
        assert isinstance(hear(sock), Refusal)
    with call(guarded) as sock:  # nor is the server's own one good for a client
        sock.sendall(hello)
        sock.sendall(Proof(server_proof(token, hear(sock).nonce, hello)).encode())
        assert isinstance(hear(sock), Refusal)


@pytest.mark.usefixtures("known")
def test_somebody_who_only_says_welcome(side: Side) -> None:
    """An impostor that does not know the token: whatever it answers, it gets no session."""
    for script in ("welcome", "proof", "nothing"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            program = f"""
import socket, sys
from gpuremote.rpc.dial import read_hello
from gpuremote.wire.hello import Challenge, Proof, Welcome
listener = socket.socket(fileno={listener.fileno()})
sock, _ = listener.accept()
read_hello(sock, 1e9, "")
sock.sendall(Challenge(b"n" * 32).encode())
read_hello(sock, 1e9, "")
if {script!r} == "welcome":
    sock.sendall(Welcome().encode())
elif {script!r} == "proof":
    sock.sendall(Proof(b"p" * 32).encode() + Welcome().encode())
try:
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)
except OSError:
    pass  # the client has gone
"""
            with subprocess.Popen(
                [sys.executable, "-c", program], pass_fds=[listener.fileno()]
            ) as impostor:
                error = gpuremote.GpuRemoteError if script == "nothing" else AuthenticationFailed
                with pytest.raises(error):
                    side.do(side.connect(f"gpu://127.0.0.1:{port}"))
                assert impostor.wait(10) == 0


def test_the_token_is_not_shown(guarded: RunningServer, token_file: Path) -> None:
    """Neither on a command line nor in what the objects say of themselves."""
    from gpuremote.client.link import Link
    from gpuremote.config import Settings
    from gpuremote.server.options import ServerOptions

    for found in (
        Link("host", 1, token=TOKEN.encode()),
        Settings(token=TOKEN.encode()),
        ServerOptions(token=TOKEN.encode()),
    ):
        assert TOKEN not in repr(found)
    for pid in (guarded.process.pid, os.getpid()):
        assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    arguments = ServerOptions(token=TOKEN.encode()).worker_arguments()
    assert not any(TOKEN in argument for argument in arguments)
