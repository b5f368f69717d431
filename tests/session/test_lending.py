"""Uploads whose pages are lent to the kernel, over TCP within a host: the same bytes come."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote._speed import NATIVE, native
from gpuremote.client.blocking import Session
from gpuremote.testing.servers import RunningServer

MIB = 1 << 20
TURNS = 16
"""Uploads of a size of which some are copied and some lent (native/lending.c, choosing.c); more, if
some of them come behind a pause, as on a busy machine."""
in_c = pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")


@pytest.fixture
def session(server: RunningServer) -> Iterator[Session]:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp") as session:
        yield session


def pattern(seed: int, nbytes: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def lent(session: Session) -> int:
    return session.stats().payload_lent


def turns(session: Session) -> Iterator[int]:
    """Uploads until some of them were lent."""
    for k in range(400):
        yield k
        if k >= TURNS and (native is None or lent(session)):
            return


@in_c
def test_both_ways_are_tried(session: Session) -> None:
    device, host = session.devices[0], pattern(0, MIB)
    for _ in turns(session):
        device.put(host)
    stats = session.stats()
    assert 0 < stats.payload_lent <= stats.payload_sent - 3 * MIB
    assert stats.payload_copied == 0


def test_the_program_may_write_to_it_at_once(session: Session) -> None:
    """The peer has every byte when ``put`` returns: nobody reads the pages any more."""
    device, host = session.devices[0], np.empty(MIB, np.uint8)
    kept = []
    for k in range(40):
        host[:] = k
        kept.append(device.put(host))
        host[:] = 255
    for k, remote in enumerate(kept):
        assert remote.min().item() == remote.max().item() == k


@pytest.mark.parametrize("nbytes", [200_000, 262_143, 300_001, MIB + 1, 5 * MIB + 4097, 33 * MIB])
@pytest.mark.parametrize("offset", [0, 1, 4095])
def test_sizes_and_places(session: Session, nbytes: int, offset: int) -> None:
    device = session.devices[0]
    host = pattern(nbytes, nbytes + offset)[offset:]
    for k in turns(session):
        host[0] = k % 256
        assert np.array_equal(device.put(host).get(), host)
    if native is not None:
        assert lent(session) > 0


@pytest.mark.parametrize("kind", ["never touched", "a file", "others' too", "read-only"])
def test_memory_of_other_kinds(session: Session, tmp_path: Path, kind: str) -> None:
    device, size = session.devices[0], 2 * MIB
    whole: mmap.mmap | None = None
    host: Any
    match kind:
        case "never touched":
            host = np.zeros(size, np.uint8)
        case "a file":
            path = tmp_path / "data"
            path.write_bytes(pattern(1, size).tobytes())
            host = np.memmap(path, np.uint8, mode="r")
        case "others' too":
            whole = mmap.mmap(-1, size)
            whole.write(pattern(2, size).tobytes())
            host = np.frombuffer(whole, np.uint8)
        case _:
            host = pattern(3, size)
            host.setflags(write=False)
    for _ in turns(session) if kind in ("never touched", "read-only") else range(TURNS):
        assert np.array_equal(device.put(host).get(), host)
    if native is not None and kind in ("never touched", "read-only"):
        assert lent(session) > 0
    del host
    if whole is not None:
        whole.close()


def test_a_peer_that_takes_no_more_for_a_while(session: Session) -> None:
    """What the kernel was lent and did not take is sent again, from where it stopped."""
    device, stopped, host = session.devices[0], 0, pattern(0, 16 * MIB)
    for k in range(400):
        before = lent(session)
        remote = device.put(host)
        if k > 3 and lent(session) == before and native is not None:
            continue  # it was copied, and the next one will most likely be
        assert np.array_equal(remote.get(), host)
        host[:], before = ~host, lent(session)
        os.kill(session.worker_pid, signal.SIGSTOP)
        woken = threading.Timer(0.05, os.kill, (session.worker_pid, signal.SIGCONT))
        woken.start()
        try:
            remote = device.put(host)
        finally:
            woken.join()
        assert np.array_equal(remote.get(), host)
        stopped += lent(session) > before or native is None
        if k > 3 and stopped:
            break
    assert stopped
    assert session.stats().reconnects == 0


def test_connections_that_break_in_the_middle(session: Session) -> None:
    device, core = session.devices[0], session._core
    over = threading.Event()

    def breaks() -> None:
        while not over.wait(0.013):
            connection = core.peer.connection
            if connection is not None:
                connection.abort()

    thread = threading.Thread(target=breaks)
    thread.start()
    kept = []
    try:
        for k in range(40):
            host = pattern(k, 4 * MIB)
            kept.append(device.put(host))
            host[:] = 0
    finally:
        over.set()
        thread.join()
    for k, remote in enumerate(kept):
        assert np.array_equal(remote.get(), pattern(k, 4 * MIB))
    assert session.stats().reconnects > 0


@in_c
def test_no_pipe_to_be_had(session: Session) -> None:
    device, host = session.devices[0], pattern(0, MIB)
    device.put(host).get()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # every number below is in use
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        kept = [device.put(host) for _ in range(2 * TURNS)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(np.array_equal(remote.get(), host) for remote in kept)
    assert lent(session) == 0


@in_c
def test_a_program_that_a_broken_pipe_ends(server: RunningServer) -> None:
    """A splice can't be told to raise no signal: where that ends a program nothing is lent."""
    program = f"""
import os, signal, numpy as np, gpuremote
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with gpuremote.connect_sync("{server.url}?transport=tcp") as session:
    device, host = session.devices[0], np.arange(1 << 20, dtype=np.uint8)
    for k in range(20):
        assert np.array_equal(device.put(host).get(), host)
    print(session.stats().payload_lent)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "0\n"


@in_c
def test_its_files_are_given_back(server: RunningServer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with gpuremote.connect_sync(f"{server.url}?transport=tcp") as session:
        device, host = session.devices[0], pattern(0, MIB)
        for _ in turns(session):
            device.put(host)
        assert lent(session) > 0
        core = session._core
        connection = core.peer.connection
        assert connection is not None
        connection.abort()
        device.put(host)
    until = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before


@in_c
def test_records_that_go_out_with_it_are_not_lent(session: Session) -> None:
    """They lie on the stack, which is used again at once; however long they are."""
    device, core = session.devices[0], session._core
    host = pattern(0, MIB)
    device.put(host).get()
    one = device.put(np.ones(4, np.float32))
    head = 90 + len(next(iter(core._kinds.values()))[1])
    found = 0
    for _ in range(2000):
        made = []
        while head + len(core._buffer) < 4090:
            made.append(one + one)
        found += head + len(core._buffer) <= 4146
        remote = device.put(host)
        assert np.array_equal(remote.get(), host)
        assert made[-1].get().tolist() == [2.0] * 4
        if found >= 2 * TURNS and lent(session):
            break
    assert found >= 2 * TURNS
    assert lent(session) > 0
