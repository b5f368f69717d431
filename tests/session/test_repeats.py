"""On a long way a step that repeats is named instead of sent, and nothing else changes."""

from __future__ import annotations

import contextlib
import dis
import itertools
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

import gpuremote
from benchmarks.contenders.base import RelayProcess
from gpuremote.client import issuing
from gpuremote.client.issuing import NEVER, Issuer
from gpuremote.ops.plan import encode_definition
from gpuremote.rpc import dial
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer
from gpuremote.transport.lanes.rule import LONG_WAY
from gpuremote.wire.batch import PREFIX, Op, blob_record
from gpuremote.wire.frames import Kind, pack_info
from gpuremote.wire.repeats import ON, offered
from tests.faults.processes import gone
from tests.faults.raw import RawClient, message

pytestmark = [
    pytest.mark.skipif(not offered(), reason="the part in C is not used"),
    pytest.mark.timeout(60),
]


def far(url: str) -> Any:
    """A session that takes any way for a long one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "LONG_WAY", 0.0)
        session = gpuremote.connect_sync(f"{url}?transport=tcp&lanes=1")
    assert session._core.far
    return session


class Program:
    """A few layers with weights, and a state that one step takes from the other."""

    def __init__(self, device: Any) -> None:
        rng = np.random.default_rng(0)
        self.weights = [device.put(rng.standard_normal(64)) for _ in range(8)]
        self.state = device.put(np.ones(64))
        self.velocity = device.put(np.zeros(64))

    def step(self, number: int, branch: bool = False) -> Any:
        x = self.state
        for weight in self.weights:
            x = np.tanh(x * weight + 0.5)
            if branch:
                x = x - weight
        self.velocity = self.velocity * 0.9 + x
        self.weights[number % 8] += 0.01
        self.state = x + 1.0 / (1 + number)
        return x.sum()


def outcome(session: Any, steps: int, branch: Callable[[int], bool]) -> list[float]:
    program = Program(session.devices[0])
    sums = [program.step(k, branch(k)) for k in range(steps)]
    velocity: list[float] = program.velocity.get().tolist()
    return [float(one.item()) for one in sums] + velocity


def test_a_way_that_is_long(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "LONG_WAY", LONG_WAY)
    relay = RelayProcess(server.port, 30)
    try:
        url = f"gpu://127.0.0.1:{relay.port}?transport=tcp&lanes=1"
        with gpuremote.connect_sync(url) as session:
            program = Program(session.devices[0])
            for k in range(8):
                program.step(k)
            session.synchronize()
            before = session.stats()
            for k in range(8, 72):
                program.step(k)
            session.flush()
            after = session.stats()
    finally:
        relay.close()
    ops = after.ops - before.ops
    assert after.plans == before.plans
    assert after.repeated - before.repeated > 0.8 * ops
    assert (after.bytes_sent - before.bytes_sent) / ops < 14  # it takes 45 without


def test_a_way_that_is_short(server: RunningServer) -> None:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp&lanes=1") as session:
        assert not session._core.far
        outcome(session, 5, lambda k: False)
        assert session.stats().repeated == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_program_that_goes_other_ways(server: RunningServer, seed: int) -> None:
    """Also where somebody else gives up its arrays, and batches end anywhere."""
    rng = random.Random(seed)
    turns = [rng.random() < 0.3 for _ in range(60)]
    with far(server.url) as there, gpuremote.connect_sync(server.url) as plain:
        assert outcome(there, 60, turns.__getitem__) == outcome(plain, 60, turns.__getitem__)
        assert there.stats().repeated > 200
        assert plain.stats().repeated == 0
        assert there.stats().ops == plain.stats().ops


def test_connections_that_break(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "LONG_WAY", 0.0)  # also for those that come later
    # A batch that is larger than what a connection lets by never comes through.
    monkeypatch.setattr(issuing, "FLUSH_BYTES", 4096)
    with (
        CuttingProxy(server.host, server.port) as proxy,
        far(f"gpu://{proxy.host}:{proxy.port}") as session,
    ):
        wanted = outcome(session, 50, lambda k: k % 7 == 3)
        before = session.stats().repeated
        proxy.cut_after(8000, "up", repeat=True)
        assert outcome(session, 50, lambda k: k % 7 == 3) == wanted
        proxy.cut_never()
        assert session.stats().reconnects > 0
        assert session.stats().repeated - before > 200


def test_an_interruption_anywhere_in_sending(server: RunningServer) -> None:
    """Wherever Ctrl-C comes, each op runs once: what was noted and not sent is made good."""
    with gpuremote.connect_sync(server.url) as session:
        wanted = outcome(session, 60, lambda k: False)
    code = Issuer._send_records.__code__
    # Where Python looks for signals: behind a call.
    checks = {
        this.offset
        for before, this in itertools.pairwise(dis.get_instructions(code))
        if before.opname.startswith("CALL")
    }
    with far(server.url) as session:
        program = Program(session.devices[0])
        sums, seen, at, hits = [], 0, 0, 0

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal seen, hits
            if frame.f_code is not code:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and frame.f_lasti in checks:
                seen += 1
                if seen == at:
                    hits += 1
                    raise KeyboardInterrupt
            return trace

        for k in range(60):
            with session._core.lock:  # nobody else sends meanwhile
                session._core.flush_after = NEVER
                sums.append(program.step(k))
                if k > 9:
                    seen, at = 0, k - 9
                    sys.settrace(trace)
                    try:
                        with contextlib.suppress(KeyboardInterrupt):
                            session.flush()
                    finally:
                        sys.settrace(None)
            if k % 4 == 3:
                session.synchronize()
        found = [float(one.item()) for one in sums] + program.velocity.get().tolist()
        assert hits > 7
        assert session.stats().repeated > 200
    assert found == wanted


def test_threads_that_issue_at_a_time(server: RunningServer) -> None:
    with far(server.url) as session:
        found: dict[int, list[float]] = {}

        def work(number: int) -> None:
            found[number] = outcome(session, 20, lambda k: (k + number) % 5 == 0)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with gpuremote.connect_sync(server.url) as session:
        for number, there in found.items():
            turns = [(k + number) % 5 == 0 for k in range(20)]
            assert there == outcome(session, 20, turns.__getitem__)
        assert len(found) == 4


def test_what_is_named_needs_credit(server: RunningServer) -> None:
    """A few bytes that stand for many calls: a client that goes on beyond its credit is ended."""
    with RawClient(server.host, server.port) as client:
        pid = client.welcome.worker
        with gpuremote.connect_sync(server.url) as other:
            x = other.devices[0].ones(4)
            doubled = x + x
            plan = next(p for p in other._core.plans.values() if p.layout.format == "<IQQ")
            client.sock.sendall(client.batch(client.put(bytes(32))))
            client.sock.sendall(
                client.batch(
                    blob_record(Op.DEFINE, blob=pack_info([64, *encode_definition(plan)[1:]]))
                )
            )
            call = plan.layout.pack(64, 1, 1)
            many = struct.pack("<III", 25, 1, 40_000)

            def squeezed(data: bytes, calls: int) -> bytes:
                client.seq += 1
                body = PREFIX.pack(client.number) + data
                client.number += calls
                return message(Kind.BATCH, client.seq, body, arg=ON)

            client.sock.sendall(squeezed(call, 1))
            deadline = time.monotonic() + 20
            try:
                while not gone(pid):
                    assert time.monotonic() < deadline
                    client.sock.sendall(squeezed(many, 40_000))
            except OSError:
                pass  # it has ended the session
            while not gone(pid):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert doubled.get().tolist() == [2, 2, 2, 2]


def test_a_batch_that_makes_no_sense(server: RunningServer) -> None:
    with RawClient(server.host, server.port) as client:
        client.seq += 1
        body = PREFIX.pack(1) + struct.pack("<III", 25, 7, 1)
        client.sock.sendall(message(Kind.BATCH, client.seq, body, arg=ON))
        kinds = [(kind, body) for kind, body in client.read_messages()]
        assert kinds[-1][0] == Kind.GOODBYE
        assert b"not kept" in kinds[-1][1]
