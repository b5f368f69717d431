"""What a card does with memory, over real verbs."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpuremote import _clock
from gpuremote.errors import ConnectionLost, GpuRemoteError, ProtocolError
from gpuremote.testing.driving import Ends
from gpuremote.transport.base import Connection, Incoming
from gpuremote.transport.rdma import Options, Rdma, RdmaConnection, default_provider, payload
from gpuremote.transport.rdma.frames import Piece
from gpuremote.transport.rdma.gpu import Stages
from gpuremote.transport.rdma.memory import Registry, address_of
from gpuremote.transport.rdma.payload import InPiece, RdmaIncoming
from gpuremote.transport.rdma.setup import bring_up
from gpuremote.transport.setup import Setup
from gpuremote.transport.tcp import TcpConnection
from gpuremote.transport.verbs.base import Access, Remote
from gpuremote.transport.verbs.gids import choose_gid
from tests.rdma.devices import in_machine
from tests.rdma.ends import LOOPBACK, SECONDS, connected, host

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
PR_SET_THP_DISABLE = 41

machine_only = pytest.mark.skipif(
    not in_machine(), reason="takes links down: only in the machine of `make test-rdma`"
)

Pair = tuple[RdmaConnection, RdmaConnection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = connected(blocking=False, options=Options(), over=LOOPBACK)
    yield here, there
    here.abort()
    there.abort()


def ip(*words: str) -> None:
    subprocess.run(["ip", "link", "set", *words], check=True)


def lost(ends: Ends) -> GpuRemoteError:
    """Step until the connection is lost; what it said."""
    try:
        ends.until(lambda: False)
    except (ConnectionLost, ProtocolError) as error:
        return error
    raise AssertionError("it goes on")


def receive_until_lost(end: Connection, seconds: float) -> ConnectionLost:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            end.receive(0.1)
            end.flush()
        except ConnectionLost as error:
            return error
    raise AssertionError(f"not noticed in {seconds} s")


def receive(ends: Ends, incoming: Incoming, target: memoryview) -> None:
    done: list[Incoming] = []
    incoming.into([target], done.append)
    ends.until(lambda: done)


@pytest.mark.timeout(400)
def test_a_gibibyte_by_one_sided_writes(pair: Pair) -> None:
    here, there = pair
    ends = Ends(here, there, limit=360)
    rounds, size = 16, 64 * MIB
    source = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    target = np.zeros(size, dtype=np.uint8)
    for number in range(rounds):
        source[:: 4096 + number] += 1
        target[::4096] = 0
        here.send(number.to_bytes(4, "little"), [here.register(source)])
        incoming = ends.receive(there)
        assert int.from_bytes(incoming.header, "little") == number
        receive(ends, incoming, target.data)
        assert zlib.crc32(target.data) == zlib.crc32(source.data)
    assert there.stats.payload_received == rounds * size >= 1 << 30
    assert there.stats.payload_copied == here.stats.payload_copied == 0
    # Each payload was cut for both lanes, and what it needs stayed registered.
    registries = [end._rails[0].registry for end in pair]
    assert all(registry.reused >= 2 * (rounds - 1) for registry in registries)
    assert all(registry.made <= 4 for registry in registries)


@pytest.mark.short
def test_memory_that_is_sent_without_being_registered(pair: Pair) -> None:
    here, there = pair
    ends = Ends(here, there, limit=60)
    memory = here.allocate(3 * MIB)
    assert memory is not None
    memory[:] = os.urandom(3 * MIB)
    before = here._rails[0].registry.made
    here.send(b"", [here.register(memory)])
    incoming = ends.receive(there)
    target = bytearray(3 * MIB)
    receive(ends, incoming, memoryview(target))
    assert target == memory
    assert here._rails[0].registry.made == before


def test_several_cards() -> None:
    if len(default_provider().devices()) < 2:
        pytest.skip("one device only")
    wanted = Options(lanes=4, rails=2, piece=MIB)
    here, there = connected(blocking=True, options=wanted, over=LOOPBACK)
    try:
        ends = Ends(here, there, limit=60)
        source = os.urandom(9 * MIB)
        here.send(b"", [here.register(source)])
        incoming = ends.receive(there)
        target = bytearray(len(source))
        receive(ends, incoming, memoryview(target))
        assert target == source
        assert all(rail.registry.made for rail in there._rails)
        assert len(there._rails) == 2
    finally:
        here.abort()
        there.abort()


# -- errors ----------------------------------------------------------------------------------------


def test_a_peer_that_lies_about_its_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = pair
    plan = RdmaIncoming.plan

    def lie(
        incoming: RdmaIncoming, piece: InPiece, largest: int, registry: Registry, stages: Stages
    ) -> Piece:
        wanted = plan(incoming, piece, largest, registry, stages)
        assert wanted is not None
        wrong = tuple(s._replace(rkey=s.rkey ^ 0xFF00) for s in wanted.segments)
        return wanted._replace(segments=wrong)

    monkeypatch.setattr(payload.RdmaIncoming, "plan", lie)
    ends = Ends(here, there, limit=60)
    here.send(b"", [here.register(bytes(MIB))])
    ends.receive(there).into([memoryview(bytearray(MIB))])
    said = lost(ends)
    assert "taken back" in said.message or "WR_FLUSH_ERR" in said.message


# Links are taken down on the second device: the conformance suite may be running on the first.
SECOND = Options(devices=("rxe1",), piece=MIB)


@pytest.mark.short
@machine_only
def test_a_link_that_goes_down() -> None:
    here, there = connected(blocking=False, options=SECOND, over=LOOPBACK)
    try:
        ends = Ends(here, there, limit=60)
        source = bytes(64 * MIB)
        here.send(b"", [here.register(source)])
        incoming = ends.receive(there)
        incoming.into([memoryview(bytearray(64 * MIB))])
        ends.until(lambda: here.stats.sends > 3)
        ip("ve1", "down")
        first = lost(ends)
        assert incoming.received < len(source)
        # RETRY_EXC_ERR from a card, LOC_QP_OP_ERR from software RoCE.
        assert "_ERR: " in first.message
        assert "is the link up" in first.message
        assert "port 1 of rxe1 is down" in first.message
        # Both ends learn it, and why.
        for end in here, there:
            assert "port 1 of rxe1 is down" in receive_until_lost(end, 10).message
    finally:
        here.abort()
        there.abort()
        ip("ve1", "up")
    for end in connected(blocking=True, options=SECOND, over=LOOPBACK):
        end.abort()


@machine_only
def test_ports_that_are_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rdma, "options", SECOND)
    ip("ve1", "down")
    try:
        assert Rdma.probe() == (False, "port 1 of rxe1 is down")
    finally:
        ip("ve1", "up")
    works, reason = Rdma.probe()
    assert works, reason
    assert "RoCE v2" in reason


@machine_only
def test_memory_that_may_not_be_locked() -> None:
    script = "from gpuremote.transport.rdma import Rdma; print(Rdma.probe())"
    without = ["setpriv", "--bounding-set", "-ipc_lock", "prlimit", "--memlock=65536"]
    done = subprocess.run(
        [*without, sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("(False")
    assert "ulimit -l" in done.stdout


@machine_only
def test_no_device() -> None:
    script = "from gpuremote.transport.rdma import Rdma; print(Rdma.probe())"
    hidden = f"mount -t tmpfs none /sys/class/infiniband && exec {sys.executable} -c '{script}'"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hidden], check=True, capture_output=True, text=True
    )
    assert "(False, 'no RDMA device on this machine')" in done.stdout


# -- the peer's death ------------------------------------------------------------------------------


def wait_for(connection: Connection, message: bytes) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        connection.flush()
        incoming = connection.receive(0.2)
        if incoming is not None:
            assert bytes(incoming.header) == message
            return
    raise AssertionError(f"no {message!r}")


@pytest.mark.timeout(120)
def test_a_peer_that_is_killed_in_the_middle() -> None:
    with socket.create_server((host(), 0)) as listener:
        port = listener.getsockname()[1]
        peer = subprocess.Popen([sys.executable, "-m", "tests.rdma.peer", str(port)], cwd=ROOT)
        try:
            listener.settimeout(60)
            sock, _ = listener.accept()
            first = TcpConnection(sock, blocking=True)
            setup = Setup(first, blocking=True, deadline=_clock.now() + SECONDS)
            path = bring_up(setup, default_provider(), Options(piece=MIB), client=False)
            assert setup.conclude("ready") == "ready"
            connection = path.connection()
            connection.send(b"", [connection.register(bytes(64 * MIB))])
            wait_for(connection, b"begun")
            peer.send_signal(signal.SIGKILL)
            receive_until_lost(connection, 5)
            assert default_provider().devices()
            connection.abort()
        finally:
            peer.kill()
            peer.wait()


# -- what stays ------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.timeout(400)
def test_memory_does_not_grow_over_many_messages(pair: Pair) -> None:
    """20,000 messages and 200 payloads that are registered and written: half a minute of an
    emulated machine. 100,000 operations are in the test below."""
    here, there = pair
    ends = Ends(here, there, limit=360)
    source, target = bytearray(32_768), bytearray(32_768)
    counts = {"messages": 0, "payloads": 0}

    def landed(_: Incoming) -> None:
        counts["payloads"] += 1

    def take(_: Connection, incoming: Incoming) -> None:
        if incoming.sizes:
            incoming.into([memoryview(target)], landed)
        else:
            counts["messages"] += 1

    ends.take = take
    sizes = []
    for number in range(1, 21):
        for _ in range(1000):
            here.send(b"12345678")
        for _ in range(10):
            here.send(b"", [here.register(source)])
        wanted = {"messages": 1000 * number, "payloads": 10 * number}
        ends.until(partial(counts.__eq__, wanted))
        sizes.append(resident())
    assert sizes[-1] - sizes[4] < 2 * MIB, sizes
    assert len(here._rails[0].works) < 200


@pytest.mark.timeout(400)
def test_work_requests_do_not_leak() -> None:
    """100,000 writes on a bare queue pair."""
    device = default_provider().open(default_provider().devices()[0])
    port = device.port(1)
    gid = choose_gid(device.gids(port))
    assert gid is not None
    queue = device.completion_queue(256)
    memory = memoryview(mmap.mmap(-1, 4096))
    at = address_of(memory)
    region = device.register(at, 4096, Access.WRITE_HERE | Access.WRITE_THERE)
    ends = [device.queue_pair(queue, 64, 4) for _ in range(2)]
    try:
        for end in ends:
            end.prepare(port)
        for end, other in (ends, ends[::-1]):
            far = Remote(other.number, 7, gid.raw, port.lid, port.mtu)
            end.connect(port, gid, 7, far)
        sizes = []
        # The kernel may make a huge page of this process's memory meanwhile, which is no leak.
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        poll = select.poll()
        poll.register(queue.fileno(), select.POLLIN)
        for number in range(1, 100_001):
            last = number % 50 == 0
            ends[0].post_write(number, at, 8, region.lkey, at + 64, region.rkey, signaled=last)
            while last:
                queue.arm()
                if found := queue.poll(8):
                    assert [(c.work, c.status) for c in found] == [(number, 0)]
                    break
                assert poll.poll(5000)
            if number % 10_000 == 0:
                sizes.append(resident())
        assert sizes[-1] - sizes[1] < MIB, sizes
    finally:
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)
        for end in ends:
            end.close()
        region.close()
        queue.close()
        device.close()
