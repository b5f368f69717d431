"""The command line, as real processes: output, exit codes, signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import gpuremote
from gpuremote.errors import ServerDraining
from gpuremote.testing.servers import RunningServer, device_server


def run(*arguments: str, timeout: float = 50) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpuremote", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with device_server("--devices", "2") as running:
        yield running


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on standard output."""
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_version_and_usage() -> None:
    assert run("--version").stdout == f"gpuremote {gpuremote.__version__}\n"
    assert run().returncode == 2
    assert run("no-such-command").returncode == 2


def test_devices(server: RunningServer) -> None:
    found = document(run("devices", server.url, "--json"))
    assert found["backend"] == "numpy"
    assert found["transport"] == "tcp"
    assert [d["kind"] for d in found["devices"]] == ["cpu", "cpu"]
    assert found["devices"][0]["memory_bytes"] > 0
    text = run("devices", server.url)
    assert text.returncode == 0
    assert "\x1b" not in text.stdout
    assert "cpu:1" in text.stdout


def test_doctor(server: RunningServer) -> None:
    done = run("doctor", "--json", "--peer", server.url)
    found = document(done)
    assert done.returncode == 0
    assert found["usable"] is True
    names = {t["name"]: t for t in found["transports"]}
    assert names.keys() >= {"tcp", "shm", "rdma"}
    assert names["tcp"]["available"] is True
    assert all(t["reason"] for t in found["transports"])
    assert {b["name"]: b["available"] for b in found["backends"]}["numpy"] is True
    assert all(b["reason"] for b in found["backends"])
    assert found["peer"]["transport"]["chosen"] == "tcp"
    assert found["peer"]["round_trip_4KiB_us"] > 0


def test_doctor_says_when_a_peer_does_not_work() -> None:
    done = run("doctor", "--json", "--peer", "gpu://127.0.0.1:1")
    assert done.returncode == 1
    found = document(done)
    assert found["peer"] == {
        "url": "gpu://127.0.0.1:1",
        "works": False,
        "error": "ConnectionFailed",
        "reason": found["peer"]["reason"],
    }
    text = run("doctor", "--peer", "gpu://127.0.0.1:1")
    assert text.returncode == 1
    assert "does not work" in text.stdout


def test_bench() -> None:
    found = document(run("bench", "--quick", "--json"))
    rows = {(row["workload"], row["bytes"]) for row in found["workloads"]}
    assert {("round trip", 8), ("round trip", 4096), ("put", 1 << 20), ("get", 1 << 20)} <= rows
    assert all(row["ratio"] > 0 and row["rounds"] >= 3 for row in found["workloads"])
    assert found["small_ops"]["round_trips"] == 1
    assert found["small_ops"]["wire_bytes_per_op"] <= 64


@pytest.mark.parametrize(
    ("url", "code", "error"),
    [
        ("gpu://127.0.0.1:1", 3, "ConnectionFailed"),
        ("gpu://127.0.0.1:1?bogus=1", 2, "InvalidURL"),
        ("ftp://x", 2, "InvalidURL"),
        ("local://?require=rdma", 3, "TransportUnavailable"),
    ],
)
def test_failures_have_exit_codes_and_are_json_too(url: str, code: int, error: str) -> None:
    done = run("devices", url, "--json")
    assert done.returncode == code
    assert document(done)["error"] == error
    assert done.stderr.startswith("gpuremote: ")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_serve_stays_on_loopback_unless_told(address: str) -> None:
    done = run("serve", "--listen", address)
    assert done.returncode == 2
    assert "--insecure" in done.stderr


def test_serve_with_a_bad_address_or_a_taken_port() -> None:
    assert run("serve", "--listen", "127.0.0.1:port").returncode == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 3
    assert "can't listen" in done.stderr


def test_an_unknown_backend() -> None:
    with pytest.raises(gpuremote.GpuRemoteError):
        gpuremote.connect_sync("local://?backend=nonsense")


def test_sigterm_lets_a_session_end() -> None:
    with device_server("--drain", "20") as server:
        session = gpuremote.connect_sync(server.url)
        x = session.devices[0].arange(4)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not session.draining and time.monotonic() < deadline:
            assert x.sum().item() == 6
        assert session.draining
        with pytest.raises(ServerDraining):
            gpuremote.connect_sync(server.url)
        assert (x * 2).get().tolist() == [0, 2, 4, 6]
        session.close()
        assert server.process.wait(10) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with device_server("--drain", "60") as server:
        session = gpuremote.connect_sync(server.url + "?grace=1")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        session.close(timeout=1, raise_failures=False)
