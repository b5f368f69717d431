"""``bench``, and the bars that commands show on a terminal."""

from __future__ import annotations

import io
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import gpuremote
from gpuremote.cli.progress import Bars
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer
from tests.cli.commands import command, document, plain, run, terminal

MIB = 1 << 20


def test_bench_as_json(server: RunningServer) -> None:
    done = run("bench", server.url, "--quick", "--json", env={"FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    found = document(done)
    rows = [(row["workload"], row["bytes"], row["layout"]) for row in found["workloads"]]
    assert rows == [
        ("round trip", 8, "not pinned"),
        ("round trip", 4096, "not pinned"),
        ("put", MIB, "not pinned"),
        ("get", MIB, "not pinned"),
        ("put", 16 * MIB, "not pinned"),
        ("get", 16 * MIB, "not pinned"),
    ]
    assert all(row["ratio"] > 0 and row["rounds"] >= 5 for row in found["workloads"])
    ops = found["small_ops"]
    assert ops["ops"] == 10_000
    assert ops["round_trips"] == 1
    assert ops["wire_bytes_per_op"] <= 64
    assert ops["echo_microseconds"] > 0
    assert ops["ratio_to_echo"] == pytest.approx(
        ops["client_microseconds_per_op"] / ops["echo_microseconds"], rel=0.01
    )
    assert found["transport"]["chosen"] == "shm"


def test_bench_shows_how_far_it_is_on_a_terminal_only() -> None:
    with terminal() as screen:
        done = subprocess.run(
            command("bench", "--quick"),
            stdout=subprocess.PIPE,
            stderr=screen.end,
            text=True,
            check=False,
        )
        shown = screen.read()
    assert done.returncode == 0
    assert "measuring" in shown
    assert "transfers of 16 MiB" in shown
    assert plain(done.stdout)
    assert "measuring" not in done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:9]] == 4 * ["round"] + 2 * ["put", "get"]
    assert "one core" in lines[1]
    assert "10,000 small ops, then one get: " in lines[9]
    assert "1 round trip, " in lines[9]


def test_bench_is_interrupted(server: RunningServer) -> None:
    with (
        terminal() as screen,
        subprocess.Popen(
            command("bench", server.url), stdout=subprocess.PIPE, stderr=screen.end
        ) as process,
    ):
        try:
            screen.read(until="round trips of 4 KiB")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
            assert process.stdout is not None
            assert process.stdout.read() == b""
            assert "Traceback" not in screen.read()
        finally:
            process.kill()


@pytest.fixture
def slow(server: RunningServer) -> Iterator[gpuremote.Session]:
    """A session over 16 MiB/s."""
    with (
        CuttingProxy(server.host, server.port, bandwidth=16 * MIB) as proxy,
        gpuremote.connect_sync(f"gpu://127.0.0.1:{proxy.port}?transport=tcp") as session,
    ):
        yield session


def drawn(session: gpuremote.Session, **options: Any) -> tuple[str, np.ndarray[Any, Any]]:
    """What is shown of a put and a get of 8 MiB, and what came back."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    data = np.arange(8 * MIB, dtype=np.uint8)
    out = np.empty_like(data)
    with Bars("testing", 2, console=console, **options) as bars:
        bars.step("up")
        with bars.transfer(session, data.nbytes, "put 8 MiB"):
            array = session.devices[0].put(data)
        bars.step("down")
        with bars.transfer(session, data.nbytes, "get 8 MiB"):
            array.get(out=out)
    assert np.array_equal(out, data)
    return screen.getvalue(), out


def test_a_long_transfer_gets_a_bar(slow: gpuremote.Session) -> None:
    shown, _ = drawn(slow, large=MIB, patience=0.05)
    for part in ("testing", "put 8 MiB", "get 8 MiB", "of 8 MiB, ", "MiB/s", "s left"):
        assert part in shown


def test_a_transfer_that_is_short_or_small_gets_none(server: RunningServer) -> None:
    with gpuremote.connect_sync(server.url) as session:
        for options in ({"large": MIB, "patience": 30.0}, {"patience": 0.0}):
            shown, _ = drawn(session, **options)
            assert "testing" in shown
            assert "8 MiB" not in shown


def test_without_a_terminal_there_is_none(
    server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.zeros(MIB, np.uint8)
    with gpuremote.connect_sync(server.url) as session, Bars("testing", 1, large=0) as bars:
        bars.step("up")
        with bars.transfer(session, data.nbytes, "put"):
            session.devices[0].put(data)
    assert capsys.readouterr() == ("", "")
