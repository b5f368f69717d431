"""``serve``: where it listens, what it refuses, how it ends."""

from __future__ import annotations

import json
import secrets
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

import gpuremote
from gpuremote.errors import GpuRemoteError, ServerDraining
from gpuremote.testing.servers import device_server
from tests.certificates import Authority
from tests.cli.commands import command, run


def announced(*arguments: str, end: signal.Signals) -> str:
    """What ``serve`` prints when it listens; ended by a signal afterwards."""
    with subprocess.Popen(
        command("serve", "--listen", "127.0.0.1:0", *arguments), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 30)[0]
            line = process.stdout.readline()
            process.send_signal(end)
            assert process.wait(10) == 0
            assert process.stdout.read() == ""
        finally:
            process.kill()
    return line


def test_it_says_where_it_listens() -> None:
    found: dict[str, Any] = json.loads(announced("--json", end=signal.SIGTERM))
    assert found["host"] == "127.0.0.1"
    assert found["backend"] == "numpy"
    assert found["port"] > 0
    assert found["pid"] > 0
    text = announced(end=signal.SIGINT)
    assert text.startswith("gpuremote: serving numpy devices on gpu://127.0.0.1:")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_it_stays_on_loopback_unless_told(address: str) -> None:
    done = run("serve", "--listen", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--insecure" in done.stderr
    assert "--certfile" in done.stderr
    assert "--token-file" in done.stderr


def test_other_hosts_take_tls_and_a_token(tmp_path: Path) -> None:
    """One of the two is not enough, unless --insecure says so; and then it says what that means."""
    own = Authority(tmp_path).issue("server")
    encrypted = ["--certfile", own.certfile, "--keyfile", own.keyfile]
    token = tmp_path / "token"
    token.write_text(secrets.token_urlsafe(32))
    known = ["--token-file", str(token)]
    clear, anyone = "travels in the clear", "anyone who can reach it can use these devices"
    for arguments, said, unsaid in (
        (encrypted, anyone, clear),
        (known, clear, anyone),
        ([], clear, "Traceback"),
    ):
        done = run("serve", "--listen", "0.0.0.0:0", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert unsaid not in done.stderr
        code, text = listening("0.0.0.0:0", *arguments, "--insecure")
        assert code == 0
        assert said in text
        assert unsaid not in text
    assert listening("0.0.0.0:0", *encrypted, *known) == (0, "")


def listening(address: str, *arguments: str) -> tuple[int, str]:
    """Have a server listen there and end it: exit code, and what it said on standard error."""
    with subprocess.Popen(
        command("serve", "--listen", address, "--json", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("{")
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=20)
            return process.returncode, said
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--certfile", "missing.pem"), "missing.pem: can't be read"),
        (("--client-ca", "ca.pem"), "client_ca is given without certfile"),
        (("--cafile", "missing.pem"), "missing.pem: can't be read"),
    ],
)
def test_certificates_that_can_not_be_used(arguments: tuple[str, ...], says: str) -> None:
    done = run("serve", "--listen", "127.0.0.1:0", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--listen", "127.0.0.1:port"), "'port' is not a number"),
        (("--backend", "nonsense"), "no backend named 'nonsense'"),
        (("--memory-limit", "8G"), "8GiB"),
    ],
)
def test_bad_options_are_wrong_usage(arguments: tuple[str, ...], says: str) -> None:
    done = run("serve", "--listen", "127.0.0.1:0", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (3, "")
    assert "can't listen" in done.stderr


def test_sigterm_lets_a_session_end() -> None:
    with device_server("--drain", "20") as server:
        session = gpuremote.connect_sync(server.url)
        x = session.devices[0].arange(4)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(2000):  # each asks the server, and hears what it has said meanwhile
            assert x.sum().item() == 6
            if session.draining:
                break
        assert session.draining
        with pytest.raises(ServerDraining):
            gpuremote.connect_sync(server.url)
        assert (x * 2).get().tolist() == [0, 2, 4, 6]
        session.close()
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with device_server("--drain", "60") as server:
        session = gpuremote.connect_sync(server.url + "?grace=0.2")
        x = session.devices[0].arange(4)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(2000):
            assert x.sum().item() == 6
            if session.draining:
                break
        assert session.draining
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        with pytest.raises(GpuRemoteError):
            x.sum().item()
        session.close(timeout=1, raise_failures=False)
