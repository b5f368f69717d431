"""Arrays of gigabytes, and how much memory a transfer takes on either side."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import gpuremote
from gpuremote.testing.servers import RunningServer

MiB: Final = 1 << 20
SPARE: Final = 64 * MiB

pytestmark = pytest.mark.timeout(180)


def sparse(nbytes: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Zeros that take no memory, except in some places; and those places."""
    places = np.unique(
        np.r_[0, 1, nbytes - 2, nbytes - 1, np.linspace(0, nbytes - 1, 50, dtype=int)]
    )
    places = np.unique(np.r_[places, 2**31 - 1, 2**31, 2**32 - 1, 2**32])
    places = places[places < nbytes]
    host = np.zeros(nbytes, np.uint8)
    host[places] = np.arange(1, len(places) + 1)
    return host, places


def verify(got: np.ndarray[Any, Any], places: np.ndarray[Any, Any]) -> None:
    """The places hold what they should, and a sample of the rest is zero."""
    assert got[places].tolist() == list(range(1, len(places) + 1))
    sample = np.setdiff1d(np.arange(0, got.size, 65_537), places)
    assert not got[sample].any()
    got[places] = 0
    assert not got[-4096:].any()
    assert not got[:4096].any()


def peak(pid: int) -> int:
    """Most memory that a process has had in use, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


@contextmanager
def no_copy_of(nbytes: int) -> Iterator[None]:
    """Fail if Python or NumPy allocate anything that is in the order of the payload."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < min(SPARE, nbytes // 16)
    finally:
        tracemalloc.stop()


def test_two_gib_blocking(server: RunningServer) -> None:
    nbytes = 2 << 30
    host, places = sparse(nbytes)
    with gpuremote.connect_sync(server.url) as session:
        with no_copy_of(nbytes):
            remote = session.devices[0].put(host)
        assert remote.shape == (nbytes,)
        picked = remote[np.sort(places)[-3:]]
        assert picked.tolist() == host[np.sort(places)[-3:]].tolist()
        host[places] = 0
        with no_copy_of(nbytes):
            remote.get(out=host)
        verify(host, places)
        stats = session.stats()
        assert stats.payload_sent == stats.payload_received == nbytes
        assert peak(session.worker_pid) <= nbytes + SPARE


@pytest.mark.skipif(
    os.environ.get("GPUREMOTE_NATIVE") == "0", reason="half a minute: the other half does it"
)
async def test_four_gib_asyncio(server: RunningServer) -> None:
    """More than 32 bits can count; meanwhile the loop goes on with other things."""
    nbytes = (4 << 30) + (64 << 20)
    host, places = sparse(nbytes)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with gpuremote.connect(server.url) as session:
        with no_copy_of(nbytes):
            remote = await session.devices[0].put(host)
        host[places] = 0
        assert ticks > 10
        small = await session.devices[0].put(np.arange(4))
        with no_copy_of(nbytes):
            getting = asyncio.create_task(remote.get(out=host))
            assert (await small.get()).tolist() == [0, 1, 2, 3]
            await getting
        verify(host, places)
        stats = session.stats()
        assert stats.payload_sent == stats.payload_received == nbytes
        assert peak(session.worker_pid) <= nbytes + SPARE
    ticking.cancel()


SCRIPT = """
import asyncio, json, sys
import numpy as np
import gpuremote

def peak(pid="self"):  # getrusage would also count what the parent had when it forked
    lines = open(f"/proc/{pid}/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) << 10

url, kind, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])

def blocking():
    with gpuremote.connect_sync(url) as session:
        host = np.full(nbytes, 5, np.uint8)
        remote = session.devices[0].put(host)
        del host
        assert remote.get().min() == 5
        for _ in range(3):
            remote = None
            remote = session.devices[0].put(np.full(nbytes, 6, np.uint8))
        assert remote.get()[-1] == 6
        return peak(), peak(session.worker_pid)

async def loop():
    async with gpuremote.connect(url) as session:
        host = np.full(nbytes, 5, np.uint8)
        remote = await session.devices[0].put(host)
        del host
        assert (await remote.get()).min() == 5
        for _ in range(3):
            remote = None
            remote = await session.devices[0].put(np.full(nbytes, 6, np.uint8))
        assert (await remote.get())[-1] == 6
        return peak(), peak(session.worker_pid)

print(json.dumps(blocking() if kind == "blocking" else asyncio.run(loop())))
"""


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_peak_memory_on_both_sides(server: RunningServer, kind: str) -> None:
    """The payload once, and little else: whole processes, interpreter and NumPy included. (What
    is in shared memory counts at both ends.)"""
    nbytes = 192 * MiB
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{server.url}?transport=tcp", kind, str(nbytes)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    client, worker = json.loads(done.stdout)
    assert nbytes < client <= nbytes + SPARE
    assert nbytes < worker <= nbytes + SPARE
