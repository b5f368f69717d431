"""``devices`` and ``doctor``, usage, failures: output and exit codes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import gpuremote
from gpuremote.cli._console import printable, say, show, size
from gpuremote.testing.servers import RunningServer
from tests.cli.commands import BOXES, command, document, plain, run, terminal
from tests.rdma.devices import why_not

DOCUMENT = Path(__file__).parents[2] / "docs/transports.md"
NOBODY = "gpu://127.0.0.1:1"


def test_version_and_usage() -> None:
    assert run("--version").stdout == f"gpuremote {gpuremote.__version__}\n"
    assert run().returncode == 2
    assert run("no-such-command").returncode == 2
    done = run("bench", "--rounds", "2")
    assert done.returncode == 2
    assert "at least 5" in done.stderr


def test_devices_as_json(server: RunningServer) -> None:
    done = run("devices", server.url, "--json")
    found = document(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["backend"] == "numpy"
    assert found["transport"] == "shm"
    assert found["transport_reason"]
    assert found["session_memory_limit"] == 1 << 30
    assert [d["kind"] for d in found["devices"]] == ["cpu", "cpu"]
    assert all(d["name"] and d["model"] and d["memory_bytes"] > 0 for d in found["devices"])


def test_devices_as_text_of_the_default_server(server: RunningServer) -> None:
    done = run("devices", env={"GPUREMOTE_URL": server.url, "FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert plain(done.stdout)
    head, first, second, *rest = done.stdout.splitlines()
    assert head.split() == ["device", "backend", "kind", "model", "memory"]
    assert first.split()[:3] == [f"cpu:0@127.0.0.1:{server.port}", "numpy", "cpu"]
    assert second.startswith("cpu:1@")
    assert rest[0] == "a session may hold 1.0 GiB"
    assert rest[1].startswith("transport shm: ")


def test_devices_on_a_terminal(server: RunningServer) -> None:
    with terminal() as screen:
        done = subprocess.run(
            command("devices", server.url), stdout=screen.end, stderr=screen.end, check=False
        )
        said = screen.read()
    assert done.returncode == 0
    assert set(said) & set(BOXES)


def test_doctor_as_json(server: RunningServer) -> None:
    done = run("doctor", "--json", "--peer", server.url)
    found = document(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["usable"] is True
    assert found["packages"]["numpy"]
    transports = {t["name"]: t for t in found["transports"]}
    assert transports.keys() >= {"tcp", "shm", "rdma"}
    assert transports["tcp"]["available"] is True
    backends = {b["name"]: b for b in found["backends"]}
    assert backends.keys() >= {"numpy", "cupy"}
    assert backends["numpy"]["available"] is True
    assert all(row["reason"] for row in found["transports"] + found["backends"])
    machine = found["machine"]
    algorithms = machine["congestion_control"]
    assert set(algorithms["permitted"]) <= set(algorithms["available"])
    assert algorithms["default"] in algorithms["permitted"]
    assert machine["file_descriptors"]["soft"] > 0
    assert machine["memlock_bytes"].keys() == {"soft", "hard"}
    assert machine["infiniband"]["present"] or not machine["infiniband"]["devices"]
    for place in ("local", "peer"):
        assert found[place]["works"] is True
        assert found[place]["round_trip_4KiB_us"] > 0
        assert found[place]["transport"]["chosen"] == "shm"
        candidates = {c["name"]: c for c in found[place]["transport"]["candidates"]}
        assert candidates.keys() >= {"tcp", "shm", "rdma"}
        assert all(c["reason"] for c in candidates.values())


@pytest.mark.skipif(not why_not(), reason="shown for a machine without RDMA devices")
@pytest.mark.parametrize(("arguments", "code"), [((), 0), (("--peer", "local://?require=rdma"), 1)])
def test_doctor_as_documented(arguments: tuple[str, ...], code: int) -> None:
    called = " ".join(("$ gpuremote doctor", *arguments))
    (shown,) = re.findall(re.escape(called) + r"\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    done = run("doctor", *arguments)
    assert (done.returncode, done.stderr) == (code, "")
    printed = done.stdout.splitlines()
    for line in shown.splitlines():
        assert line == "..." or line in printed


def test_doctor_as_text_with_a_peer_that_does_not_work() -> None:
    done = run("doctor", "--peer", NOBODY)
    assert (done.returncode, done.stderr) == (1, "")
    assert plain(done.stdout)
    lines = done.stdout.splitlines()
    for name in ("shm", "rdma", "tcp", "cupy", "numpy", "/dev/infiniband", "open files"):
        assert any(line.startswith(name) for line in lines), name
    assert any(line.startswith("local://: works") for line in lines)
    assert any(line.startswith("candidate") for line in lines)
    assert any(line.startswith(f"{NOBODY}: does not work: ") for line in lines)


def test_doctor_as_json_with_a_peer_that_does_not_work() -> None:
    done = run("doctor", "--json", "--peer", NOBODY)
    assert (done.returncode, done.stderr) == (1, "")
    found = document(done)
    assert found["usable"] is False
    assert found["local"]["works"] is True
    assert found["peer"].pop("reason")
    assert found["peer"] == {"url": NOBODY, "works": False, "error": "ConnectionFailed"}


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("devices", NOBODY), 3, "ConnectionFailed"),
        (("bench", NOBODY), 3, "ConnectionFailed"),
        (("devices", "gpu://127.0.0.1:1?bogus=1"), 2, "InvalidURL"),
        (("bench", "ftp://x"), 2, "InvalidURL"),
        (("doctor", "--peer", "ftp://x"), 2, "InvalidURL"),
        (("devices", "local://?require=rdma"), 3, "TransportUnavailable"),
        (("serve", "--listen", "0.0.0.0:0"), 2, "ConfigError"),
    ],
)
def test_failures_have_exit_codes_and_are_json_too(
    arguments: tuple[str, ...], code: int, error: str
) -> None:
    done = run(*arguments, "--json")
    assert done.returncode == code
    found = document(done)
    assert found["error"] == error
    assert isinstance(found["code"], int)
    assert isinstance(found["retryable"], bool)
    assert done.stderr == f"gpuremote: {found['message']}\n"


def test_failures_without_json_leave_standard_output_alone() -> None:
    done = run("devices", NOBODY)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("gpuremote: ")
    assert "127.0.0.1:1" in done.stderr


def test_nobody_reads_the_output(server: RunningServer) -> None:
    with subprocess.Popen(
        command("devices", server.url, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(50) == 1


def test_what_a_server_says_can_not_steer_a_terminal(capsys: Any) -> None:
    show(("name", "[bold]"), [["\x1b]0;title\x07", ":smile: [red]x[/red]"], ["a\nb\r", "\x9b1m"]])
    say("\x1b[2J\nnext")
    assert capsys.readouterr().out == (
        "name              [bold]\n"
        "\\x1b]0;title\\x07  :smile: [red]x[/red]\n"
        "a; b\\r            \\x9b1m\n"
        "\\x1b[2J; next\n"
    )
    assert printable("two\nlines µ×") == "two\nlines µ×"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (8, "8 B"), (4096, "4 KiB"), (64 << 20, "64 MiB"), (25 << 28, "6.2 GiB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text
