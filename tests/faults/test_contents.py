"""Uploads that a server has already do not travel: within a tenant, bounded, and whoever dies."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.errors import DeadlineExceeded, OutOfDeviceMemory
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.wire.batch import Op
from gpuremote.wire.digests import sketch_of
from tests.certificates import Authority
from tests.faults.processes import wait_until_gone
from tests.faults.sides import Side, pattern

pytestmark = pytest.mark.timeout(60)

MiB: Final = 1 << 20
ON: Final = "?dedupe=on"
MORE: Final = "&dedupe=on"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with device_server("--warm", "2", "--content-cache", "96MiB") as running:
        yield running


def data(side: Side, nbytes: int, seed: int = 0) -> Any:
    """Bytes that the other driver's tests, on the same server, do not have."""
    return pattern(nbytes, seed + 1000 * (side.name == "asyncio"))


def put(side: Side, session: Any, *hosts: Any) -> list[Any]:
    """Upload, and see that what is there is what was given."""
    arrays = [side.do(session.devices[0].put(host)) for host in hosts]
    for array, host in zip(arrays, hosts, strict=True):
        assert np.array_equal(side.do(array.get()), host)
    return arrays


def bring(side: Side, url: str, *hosts: Any) -> tuple[int, int]:
    """Upload in a session of its own: bytes that travelled, and that did not."""
    with side.session(url) as session:
        put(side, session, *hosts)
        found = session.stats()
        return found.payload_sent, found.payload_spared


def ask(side: Side, session: Any, op: Op, blob: Any = None) -> Any:
    core = session._core
    return side.do(core.wait(core.ask(op, kind="test", blob=blob)))


def offered(side: Side, session: Any, host: Any) -> bool:
    """Whether the server says that it has these bytes."""
    digest = hashlib.sha256(host).digest()
    wait = session._core.ask(Op.OFFER, kind="test", blob=[[host.nbytes], "u1", 0, digest])
    there = bool(side.do(session._core.wait(wait)))
    session._core.withdraw([wait.number])
    return there


def kept(server: RunningServer) -> list[int]:
    """Sizes of the files in memory that the daemon has."""
    sizes = []
    for entry in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:gpuremote-upload" in os.readlink(entry):
                sizes.append(entry.stat().st_size)
    return sizes


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_session_sends_nothing(side: Side, server: RunningServer) -> None:
    hosts = [data(side, 2 * MiB, 1), data(side, 3 * MiB, 2).view(np.int16).reshape(-1, 1024)]
    sent = sum(host.nbytes for host in hosts)
    assert bring(side, server.url + ON, *hosts) == (sent, 0)
    with side.session(server.url + ON) as session:
        first, second = put(side, session, *hosts)
        many = side.do(session.devices[0].put_many([*hosts, np.ones(3), data(side, 2 * MiB, 77)]))
        first += 1  # nobody else's memory
        second *= 0
        found = session.stats()
        assert found.payload_spared == 2 * sent
        assert found.payload_sent == 24 + 2 * MiB
        assert np.array_equal(side.do(many[1].get()), hosts[1])
        assert side.do(many[2].get()).tolist() == [1, 1, 1]
        assert np.array_equal(side.do(many[3].get()), data(side, 2 * MiB, 77))
        counted = side.do(session.server_stats())
        assert counted["uploads_taken"] == found.payload_spared
        assert counted["memory_used"] == 2 * sent + 24 + 2 * MiB
    assert bring(side, server.url + ON, *hosts) == (0, sent)


def test_what_is_uploaded_twice_in_one_session(side: Side, server: RunningServer) -> None:
    host = data(side, 2 * MiB, 3)
    with side.session(server.url + ON) as session:
        first, _ = put(side, session, host, host)
        first += 1
        put(side, session, host)
        assert session.stats().payload_sent <= host.nbytes
        assert session.stats().payload_spared >= 2 * host.nbytes


def test_unasked_nothing_is_hashed_on_a_fast_way(side: Side, server: RunningServer) -> None:
    for query in ("", "?dedupe=off"):
        with side.session(server.url + query) as session:
            put(side, session, data(side, 2 * MiB, 4))
            assert not {"offer", "contents"} & session.stats().round_trips.keys()
            assert not offered(side, session, data(side, 2 * MiB, 4))


def test_unasked_it_is_so_on_a_slow_way(side: Side, server: RunningServer) -> None:
    host = data(side, 2 * MiB, 5)
    with CuttingProxy(server.host, server.port, delay=0.02, bandwidth=20e6) as proxy:
        assert bring(side, proxy.url, host) == (host.nbytes, 0)
        up = proxy.bytes_up
        assert bring(side, proxy.url, host) == (0, host.nbytes)
        assert proxy.bytes_up - up < 1.5 * MiB  # most of it measures the way


def test_a_server_that_keeps_nothing(side: Side) -> None:
    host = data(side, 2 * MiB, 6)
    with device_server() as server:
        for _ in range(2):
            assert bring(side, server.url + ON, host) == (host.nbytes, 0)
        with side.session(server.url) as session:
            assert not offered(side, session, host)
            assert ask(side, session, Op.CONTENTS) == b""


def test_the_bound_holds(side: Side) -> None:
    hosts = [data(side, 2 * MiB, seed) for seed in range(10, 16)]
    with device_server("--warm", "2", "--content-cache", "6MiB") as server:
        # A session does not push out what it brought itself.
        bring(side, server.url + ON, *hosts[:5], data(side, 8 * MiB))
        until(lambda: kept(server) == 3 * [2 * MiB])
        assert bring(side, server.url + ON, *hosts[:3]) == (0, 6 * MiB)
        # Another one does, and what was used longest ago goes first.
        assert bring(side, server.url + ON, hosts[0]) == (0, 2 * MiB)
        assert bring(side, server.url + ON, hosts[5]) == (2 * MiB, 0)
        until(lambda: kept(server) == 3 * [2 * MiB])
        with side.session(server.url + ON) as session:
            there = [offered(side, session, host) for host in hosts]
        assert there == [True, False, True, False, False, True]
        for seed in range(20, 23):
            bring(side, server.url + ON, data(side, 3 * MiB, seed))
            assert sum(kept(server)) <= 6 * MiB
        with side.session(server.url) as session:
            assert side.do(session.server_stats())["memory_used"] == 0  # counted apart


def test_a_digest_that_is_wrong(side: Side, server: RunningServer) -> None:
    """Who offers one thing and brings another has done neither to others."""
    host, claimed = data(side, 2 * MiB, 30), data(side, 2 * MiB, 31)
    with side.session(server.url + ON) as session:
        core = session._core
        blob = [[host.nbytes], "u1", 0, hashlib.sha256(claimed).digest()]
        wait = core.ask(Op.OFFER, kind="test", blob=blob)
        assert side.do(core.wait(wait)) is False
        side.do(core.wait(core.bring([wait.number], [memoryview(host)])))
    with side.session(server.url + ON) as session:
        assert not offered(side, session, claimed)
        assert offered(side, session, host)  # it is kept as what it is
        put(side, session, claimed, host)
        assert session.stats().payload_sent == claimed.nbytes


def test_two_that_look_alike(side: Side, server: RunningServer) -> None:
    """A sketch does not look at everything."""
    host = data(side, 2 * MiB, 35)
    other = host.copy()
    other[MiB + 12345] ^= 1
    assert sketch_of(memoryview(host)) == sketch_of(memoryview(other))
    bring(side, server.url + ON, host)
    assert bring(side, server.url + ON, other) == (2 * MiB, 0)
    assert bring(side, server.url + ON, host, other) == (0, 4 * MiB)


def test_another_tenant_finds_nothing(
    side: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with ``--client-ca`` tells its clients apart."""
    authority = Authority(tmp_path)
    own = authority.issue("server")
    token = secrets.token_urlsafe(32)
    monkeypatch.setenv("GPUREMOTE_TOKEN", token)
    (tmp_path / "token").write_text(token)
    host = data(side, 2 * MiB, 40)
    with device_server(
        *("--certfile", own.certfile, "--keyfile", own.keyfile, "--client-ca", authority.cafile),
        *("--token-file", str(tmp_path / "token"), "--warm", "2"),
    ) as server:
        urls: list[str] = []
        for name in ("here", "there", "here"):
            mine = authority.issue(name)  # a new one each time, as when one has expired
            (tmp_path / mine.certfile).rename(to := tmp_path / f"{len(urls)}.pem")
            (tmp_path / mine.keyfile).rename(key := tmp_path / f"{len(urls)}.key")
            options = f"{ON}&cafile={authority.cafile}&certfile={to}&keyfile={key}"
            urls.append(f"gpu://127.0.0.1:{server.port}{options}")
        assert bring(side, urls[0], host) == (host.nbytes, 0)
        with side.session(urls[1]) as session:
            assert ask(side, session, Op.CONTENTS) == b""
            assert not offered(side, session, host)
            put(side, session, host)
            assert session.stats().payload_sent == host.nbytes
        until(lambda: len(kept(server)) == 2)  # one each
        assert bring(side, urls[2], host) == (0, host.nbytes)
        assert bring(side, urls[1], host) == (0, host.nbytes)


def test_a_worker_that_is_killed_takes_nothing_along(side: Side, server: RunningServer) -> None:
    host = data(side, 2 * MiB, 50)
    with side.session(server.url + ON) as session, side.session(server.url + ON) as other:
        put(side, session, host)
        os.kill(session.worker_pid, signal.SIGKILL)
        wait_until_gone(session.worker_pid, seconds=5)
        put(side, other, host)
        assert other.stats().payload_spared in (0, host.nbytes)  # it had asked before, or not
        # Where the one that is gone was about to bring it, the next one that comes is kept.
        until(lambda: bool(offered(side, other, host) or not put(side, other, host)))
    assert bring(side, server.url + ON, host) == (0, host.nbytes)


def test_workers_that_are_killed_while_they_bring(side: Side) -> None:
    """The room that they had reserved is free again."""
    with device_server("--warm", "2", "--content-cache", "12MiB") as server:
        for seed in range(3):
            with side.session(server.url + ON) as session:
                host = data(side, 12 * MiB, seed)
                core = session._core
                meta = core.metas.get(host.shape, host.dtype, 0)
                core.put_many([(meta, memoryview(host))], [True])
                time.sleep(0.01 * seed)
                os.kill(session.worker_pid, signal.SIGKILL)
                wait_until_gone(session.worker_pid, seconds=5)
        until(lambda: sum(kept(server)) <= 12 * MiB)
        host = data(side, 12 * MiB, 65)
        assert bring(side, server.url + ON, host) == (host.nbytes, 0)
        assert bring(side, server.url + ON, host) == (0, host.nbytes)


def test_a_connection_that_breaks_on_the_way(side: Side, server: RunningServer) -> None:
    host = data(side, 4 * MiB, 70)
    with CuttingProxy(server.host, server.port) as proxy:
        with side.session(proxy.url + MORE) as session:
            proxy.cut_after(proxy.bytes_up + MiB, "up")
            put(side, session, host)
            assert session.stats().reconnects == 1
        with side.session(proxy.url + MORE) as session:
            proxy.cut()
            put(side, session, host)
            assert session.stats().payload_sent == 0


def test_one_that_takes_too_long_is_taken_back(side: Side, server: RunningServer) -> None:
    host, more = data(side, 4 * MiB, 80), data(side, 4 * MiB, 81)
    bring(side, server.url + ON, host)
    with CuttingProxy(server.host, server.port, delay=0.1) as proxy:
        with side.session(proxy.url + MORE + "&lanes=1") as session:
            put(side, session, data(side, 2 * MiB, 82))
            for one in (host, more):
                with pytest.raises(DeadlineExceeded):
                    side.do(session.devices[0].put(one, timeout=0.05))
            gc.collect()
            put(side, session, host)
            until(lambda: (gc.collect(), side.do(session.server_stats())["memory_used"])[1] == 0)
            began = time.monotonic()
        assert time.monotonic() - began < 5  # the server waits for nothing


def test_one_that_is_given_up_while_it_asks(side: Side, server: RunningServer) -> None:
    host = data(side, 4 * MiB, 83)
    bring(side, server.url + ON, host)
    with (
        CuttingProxy(server.host, server.port, delay=0.1) as proxy,
        side.session(proxy.url + MORE + "&lanes=1") as session,
    ):
        with pytest.raises(DeadlineExceeded):
            side.do(session.devices[0].put(host, timeout=0.05))
        put(side, session, host)
        assert session.stats().payload_spared == host.nbytes


def test_what_does_not_fit_says_so(side: Side, server: RunningServer) -> None:
    host = data(side, 4 * MiB, 90)
    bring(side, server.url + ON, host)
    with side.session(server.url + ON + "&memory=6MiB") as session:
        held = put(side, session, host)
        for one in (host, data(side, 4 * MiB, 91)):
            with pytest.raises(OutOfDeviceMemory):
                side.do(session.devices[0].put(one))
        del held
        gc.collect()
        side.do(session.synchronize())
        put(side, session, host)


def test_copies_that_wait_take_no_room(side: Side, server: RunningServer) -> None:
    """The daemon stands still, so what came before is still to be copied for it."""
    known = data(side, 4 * MiB, 95)
    bring(side, server.url + ON, known)
    with side.session(server.url + ON + "&memory=6MiB") as session:
        put(side, session, data(side, 2 * MiB, 96))
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            for seed in range(97, 100):
                gc.collect()
                put(side, session, data(side, 4 * MiB, seed))
            gc.collect()
            side.do(session.devices[0].ones(MiB, np.float32).get())
            gc.collect()
            with pytest.raises(DeadlineExceeded):
                side.do(session.devices[0].put(known, timeout=0.1))
            gc.collect()
            put(side, session, data(side, 4 * MiB, 94))
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
    with side.session(server.url + ON) as session:
        assert offered(side, session, data(side, 4 * MiB, 94))  # nothing had to fit after it
        assert not offered(side, session, data(side, 4 * MiB, 98))
        assert offered(side, session, known)


def test_nothing_is_left_open(side: Side, server: RunningServer) -> None:
    host = data(side, 2 * MiB, 100)
    bring(side, server.url + ON, host)
    before: list[int] = []
    while (seen := sorted(kept(server))) != before:
        before = seen  # what another test has uploaded last may still be on its way there
        time.sleep(0.3)
    with side.session(server.url + ON) as session:
        put(side, session, host)
        side.do(session.synchronize())
        descriptors = Path(f"/proc/{session.worker_pid}/fd")
        opened = len(list(descriptors.iterdir()))
        for _ in range(5):
            put(side, session, host)
        assert len(list(descriptors.iterdir())) == opened
    until(lambda: sorted(kept(server)) == before)
