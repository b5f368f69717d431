"""Whole sessions over real verbs: a device server, its worker, and either driver."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import ServerBusy
from gpuremote.testing import servers
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.transport import select
from tests.faults.sides import AsyncSide, BlockingSide, Side
from tests.rdma.devices import in_machine

DOCUMENT = Path(__file__).parents[2] / "docs/transports.md"
MIB = 1 << 20
SLOW = "connect_timeout=60&grace=120"
"""The emulated machine runs Python some 20 times slower."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "START_TIMEOUT", 180.0)
        with device_server("--warm", "1") as running:
            yield running


@pytest.fixture(params=["asyncio", pytest.param("blocking", marks=pytest.mark.short)])
def side(
    request: pytest.FixtureRequest, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> Iterator[Side]:
    made: Side = AsyncSide(loop_factory) if request.param == "asyncio" else BlockingSide()
    yield made
    made.close()


def random(nbytes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)


@contextmanager
def opened(side: Side, url: str) -> Iterator[Any]:
    """A session; its worker may take longer to start than a server waits for one."""
    deadline = time.monotonic() + 150
    session = None
    while session is None:
        try:
            session = side.do(side.connect(url))
        except ServerBusy:
            assert time.monotonic() < deadline
    try:
        yield session
    finally:
        side.do(session.close(raise_failures=False))


def test_a_session_works(side: Side, server: RunningServer) -> None:
    with opened(side, f"{server.url}?transport=rdma&{SLOW}") as session:
        assert session.transport.name == "rdma"
        device = session.devices[0]
        for nbytes in (8, 20_000, 5 * MIB + 3):
            host = random(nbytes)
            remote = side.do(device.put(host))
            assert np.array_equal(side.do((remote + 1).get()), host + 1)
        assert session.stats().payload_copied < 100_000  # what travels inside messages


def test_a_session_resumes_over_verbs(side: Side, server: RunningServer) -> None:
    """The first connection is what shows that the other end lives; with it goes the path."""
    with CuttingProxy(server.host, server.port) as proxy:
        url = f"gpu://{proxy.host}:{proxy.port}?transport=rdma&{SLOW}"
        with opened(side, url) as session:
            device = session.devices[0]
            host = random(3 * MIB)
            total = device.zeros(3 * MIB, "u1")
            for _ in range(3):
                total += side.do(device.put(host))
                proxy.cut()
            assert np.array_equal(side.do(total.get()), host * np.uint8(3))
            assert session.transport.name == "rdma"
            assert session.stats().reconnects >= 1


@pytest.mark.skipif(not in_machine(), reason="shows the devices of the emulated machine")
def test_doctor_as_documented() -> None:
    (shown,) = re.findall(
        r"In the emulated machine.*?```text\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
    command = [sys.executable, "-m", "gpuremote", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=150)
    found = {row["name"]: row for row in json.loads(done.stdout)["transports"]}
    for line in shown.splitlines()[1:]:
        name, works, why = line.split(maxsplit=2)
        assert found[name] == {"name": name, "available": works == "yes", "reason": why}


@pytest.mark.skipif(not in_machine(), reason="takes a link down: only in the emulated machine")
def test_a_link_that_goes_down(
    side: Side, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mid-transfer; the session goes on over tcp, and verbs are back after the link is."""
    found = tuple(c for c in select.probe() if c.name != "shm")
    monkeypatch.setattr("gpuremote.rpc.transports.probe", lambda: found)
    with opened(side, f"{server.url}?{SLOW}") as session:
        assert session.transport.name == "rdma"
        device = session.devices[0]
        host = random(48 * MIB)
        changes: list[str] = []
        session.transport.subscribe(lambda explanation: changes.append(explanation.chosen))
        down = threading.Timer(0.2, link, args=("down",))
        down.start()
        try:
            remotes = [side.do(device.put(host)) for _ in range(3)]
            down.join()
            for remote in remotes:
                assert np.array_equal(side.do(remote.get()), host)
            assert session.transport.name == "tcp"
            candidates = {c["name"]: c for c in session.transport.explain().candidates}
            assert not candidates["rdma"]["available"]
            assert "rxe0" in candidates["rdma"]["reason"]
            assert session.stats().fallbacks >= 1
        finally:
            link("up")
        deadline = time.monotonic() + 120
        while session.transport.name != "rdma":
            assert time.monotonic() < deadline, session.transport.explain()
            side.do(device.zeros(4).get())
            side.do(session.synchronize())
            time.sleep(0.2)
        assert np.array_equal(side.do(side.do(device.put(host)).get()), host)
        assert changes[0] == "tcp"
        assert changes[-1] == "rdma"


def link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "ve0", state], check=True)
