"""The leak check finds what it is there to find."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from blockbuster import BlockBuster, BlockingError

from tests.leaks import SHM_PREFIX, Snapshot, settled_leaks


def test_finds_an_open_socket_until_it_is_closed() -> None:
    before = Snapshot.take()
    with socket.socket():
        (line,) = settled_leaks(before, 0)
        assert "file descriptor" in line
        assert "socket:" in line
    assert settled_leaks(before, 0) == []


def test_finds_a_child_and_a_child_nobody_waited_for() -> None:
    before = Snapshot.take()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        lines = settled_leaks(before, 0)
        assert any(f"process {child.pid}: " in line for line in lines)
        assert child.stdin is not None
        child.stdin.close()
        deadline = time.monotonic() + 10
        while "(state Z" not in "".join(settled_leaks(before, 0)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert settled_leaks(before, 0) == []


def test_finds_an_orphan() -> None:
    before = Snapshot.take()
    # A child that starts a child of its own, tells its number and goes.
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0, stdout=2)\n"
        "print(child.pid)\n"
        "child.returncode = 0\n"
    )
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-c", script], stdin=reader, stdout=subprocess.PIPE, check=True
        )
        lines = settled_leaks(before, 0)
        assert any(f"process {int(done.stdout)}: " in line for line in lines)
    finally:
        os.close(reader)
        os.close(writer)
    assert settled_leaks(before) == []


def test_a_process_started_by_one_that_was_there_is_not_this_tests() -> None:
    script = (
        "import subprocess, sys\n"
        "input()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        before = Snapshot.take()
        server.stdin.write("\n")
        server.stdin.flush()
        worker = int(server.stdout.readline())
        after = Snapshot.take()
        server.stdin.close()
    assert worker in after.processes
    assert after.left_behind(before) == []


@pytest.mark.parametrize(
    ("name", "daemon", "found"),
    [("other", False, True), ("gpuremote-idle", True, True), ("other", True, False)],
)
def test_finds_threads(name: str, daemon: bool, found: bool) -> None:
    before = Snapshot.take()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name=name, daemon=daemon)
    thread.start()
    try:
        assert bool(settled_leaks(before, 0)) is found
    finally:
        stop.set()
        thread.join()
    assert settled_leaks(before, 0) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm on this system")
def test_finds_shared_memory() -> None:
    before = Snapshot.take()
    segment = Path("/dev/shm", f"{SHM_PREFIX}-test-{os.getpid()}")
    segment.touch()
    try:
        assert settled_leaks(before, 0) == [f"shared memory {segment}"]
    finally:
        segment.unlink()


async def test_a_blocked_loop_is_an_error_and_a_nonblocking_socket_is_none() -> None:
    # What conftest.py switches on for gpuremote, here for this file.
    detector = BlockBuster(scanned_modules=[sys.modules[__name__]])
    wrapped = [detector.functions[name] for name in ("socket.socket.send", "socket.socket.recv")]
    left, right = socket.socketpair()
    with left, right:
        for function in wrapped:
            function.activate()
        try:
            left.setblocking(False)
            right.setblocking(False)
            assert left.send(b"x") == 1
            assert right.recv(1) == b"x"
            with pytest.raises(BlockingIOError):
                right.recv(1)
            left.setblocking(True)
            with pytest.raises(BlockingError):
                left.send(b"x")
        finally:
            for function in wrapped:
                function.deactivate()


async def test_runs_on_the_loop_that_was_asked_for(pytestconfig: pytest.Config) -> None:
    module = type(asyncio.get_running_loop()).__module__
    assert module.split(".")[0] == os.environ.get("GPUREMOTE_TEST_LOOP", "uvloop")


def test_the_checks_are_on_for_every_test(tmp_path: Path) -> None:
    (tmp_path / "test_bad.py").write_text(
        "import os, time\n"
        "from unittest import mock\n"
        "from gpuremote import config\n"
        "def test_leaks():\n"
        "    os.pipe()\n"
        "async def test_blocks():\n"
        "    with mock.patch.object(config, 'unquote', lambda text: time.sleep(0)):\n"
        "        config.parse_url('gpu://[::1]')\n"
        "def test_warns():\n"
        "    import warnings\n"
        "    warnings.warn('careful')\n"
        "async def test_good():\n"
        "    time.sleep(0)\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml")]
    # No cache: the outer run has it.
    command += ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    assert "left behind:\n  file descriptor" in done.stdout
    assert "BlockingError: Blocking call to time.sleep" in done.stdout
    assert "UserWarning: careful" in done.stdout
    # test_leaks itself passes; what it left behind is an error of its own.
    assert "2 failed, 2 passed, 1 error" in done.stdout
