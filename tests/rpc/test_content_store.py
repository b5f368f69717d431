"""What the daemon keeps of uploads, without workers; and when a client looks for them there."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import socket
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import pytest

from gpuremote import _clock
from gpuremote.client import known
from gpuremote.client.known import Known
from gpuremote.client.waits import Wait
from gpuremote.rpc.peer import Connection
from gpuremote.server import contents, control
from gpuremote.server.contents import ContentStore, Desk, tenant_of
from gpuremote.server.sharing import _sealed
from gpuremote.wire.digests import digest_of, sketch_of

MiB: Final = 1 << 20


def sealed(data: bytes) -> int:
    return _sealed(len(data), lambda at, done: os.pwrite(at, data[done:], done))


class Worker:
    """A worker's end of a desk."""

    def __init__(self, store: ContentStore, tenant: bytes = b"a") -> None:
        self.desk = Desk(store)
        self.desk.tenant = tenant
        self.end = self.desk.theirs
        self.end.setblocking(False)

    async def hear(self) -> tuple[dict[str, Any], int]:
        for _ in range(500):
            try:
                return control.receive_file(self.end)
            except BlockingIOError:
                await asyncio.sleep(0.01)
        raise AssertionError("no answer")

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        control.send_file(self.end, request)
        answer, descriptor = await self.hear()
        if descriptor >= 0:
            answer["bytes"] = os.pread(descriptor, 64 * MiB, 0)
            os.close(descriptor)
        return answer

    async def have(self, data: bytes, digest: bytes = b"") -> int:
        sketch = sketch_of(memoryview(data))
        answer = await self.ask({"have": sketch, "nbytes": len(data), "digest": digest})
        return int(answer["ticket"])

    async def bring(self, data: bytes) -> bool:
        ticket = await self.have(data)
        if ticket:
            descriptor = sealed(data)
            control.send_file(self.end, {"bring": ticket}, descriptor)
            os.close(descriptor)
            await self.ask({"list": 1})  # the one before has been taken by now
        return bool(ticket)

    async def found(self, data: bytes) -> bool:
        answer = await self.ask({"want": digest_of(data)})
        assert answer.get("bytes", data) == data
        return "bytes" in answer

    def close(self) -> None:
        self.desk.close()
        self.end.close()


@pytest.fixture
async def store() -> AsyncIterator[ContentStore]:
    made = ContentStore(8 * MiB)
    yield made
    await made.close()
    assert made.used == 0
    await asyncio.get_running_loop().shutdown_default_executor()


def block(number: int, nbytes: int = 2 * MiB) -> bytes:
    return bytes([number]) * nbytes


async def test_one_brings_and_others_have_it(store: ContentStore) -> None:
    first, second, stranger = Worker(store), Worker(store), Worker(store, b"b")
    assert await first.bring(block(1))
    first.close()
    assert await second.found(block(1))  # waits for its digest
    assert not await second.found(block(2))
    assert await second.ask({"list": 1}) == {"sketches": sketch_of(memoryview(block(1)))}
    assert not await second.have(block(1))
    assert await stranger.ask({"list": 1}) == {"sketches": b""}
    assert not await stranger.found(block(1))
    assert await stranger.bring(block(1))
    assert await stranger.found(block(1))
    assert store.used == 4 * MiB
    second.close()
    stranger.close()


async def test_nobody_whose_tenant_is_unknown_gets_anything(store: ContentStore) -> None:
    first, nobody = Worker(store), Worker(store, b"")
    await first.bring(block(1))
    for request in (
        {"want": digest_of(block(1))},
        {"have": b"12345678", "nbytes": 2 * MiB, "digest": b""},
        {"nonsense": 1},
    ):
        assert await nobody.ask(request) == {}
    assert await nobody.ask({"list": 1}) == {"sketches": b""}
    first.close()
    nobody.close()


async def test_room_that_is_not_used_is_given_back(store: ContentStore) -> None:
    first, second = Worker(store), Worker(store)
    assert await first.have(block(1, 6 * MiB))
    assert store.used == 6 * MiB
    assert not await second.have(block(2, 4 * MiB))  # what is on its way is not pushed out
    first.close()
    ticket = await second.have(block(2, 4 * MiB))
    assert ticket
    control.send_file(second.end, {"bring": ticket})  # it could not
    assert await second.have(block(3, 8 * MiB))
    second.close()


async def test_a_file_that_could_change_is_not_kept(store: ContentStore) -> None:
    worker = Worker(store)
    for size, seals in ((2 * MiB, False), (MiB, True)):
        ticket = await worker.have(block(1))
        if seals:
            descriptor = sealed(bytes(size))
        else:
            descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            os.pwrite(descriptor, block(1), 0)
        control.send_file(worker.end, {"bring": ticket}, descriptor)
        os.close(descriptor)
        await worker.ask({"list": 1})
        assert not await worker.found(block(1))
    assert (store.refused, store.used) == (2, 0)
    worker.close()


async def test_what_was_kept_cant_be_changed(store: ContentStore) -> None:
    worker = Worker(store)
    await worker.bring(block(1))
    control.send_file(worker.end, {"want": digest_of(block(1))})
    _, descriptor = await worker.hear()
    try:
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
        worker.close()


async def test_who_gives_way(store: ContentStore) -> None:
    """What was used longest ago, of the tenant that has most; never a session's own."""
    small, large, other = Worker(store, b"small"), Worker(store, b"large"), Worker(store, b"large")
    await small.bring(block(1))
    for number in (2, 3, 4):
        assert await large.bring(block(number))
        assert await large.found(block(number))
    assert not await small.bring(block(0, 9 * MiB))
    assert not await large.bring(block(5))  # there are only its own, and who has less
    assert await other.bring(block(6))
    assert [await large.found(block(n)) for n in (2, 3, 4, 6)] == [False, True, True, True]
    assert await small.found(block(1))
    assert not await large.bring(block(5))  # it had all of them last
    assert await other.found(block(3))
    assert await large.bring(block(5))
    assert [await other.found(block(n)) for n in (3, 4, 5)] == [False, True, True]
    assert await small.found(block(1))
    for worker in (small, large, other):
        worker.close()


async def test_what_is_on_its_way_counts(store: ContentStore) -> None:
    """Who has nothing stored yet does not push out one who has less than what it brings."""
    small, large = Worker(store, b"small"), Worker(store, b"large")
    for number in range(3):
        assert await small.bring(block(number, MiB))
    tickets = [await large.have(block(number, MiB)) for number in range(10, 20)]
    assert [bool(ticket) for ticket in tickets] == [True] * 5 + [False] * 5
    assert [await small.found(block(number, MiB)) for number in range(3)] == [True] * 3
    # The other way round it gives way, until both have as much.
    large.close()
    large = Worker(store, b"large")
    for number in range(10, 15):
        assert await large.bring(block(number, MiB))
    another = Worker(store, b"small")
    assert [bool(await another.have(block(number, MiB))) for number in range(20, 23)] == [True] * 3
    assert [await large.found(block(n, MiB)) for n in range(10, 15)] == [False] + [True] * 4
    assert [await small.found(block(number, MiB)) for number in range(3)] == [False, False, True]
    for worker in (small, large, another):
        worker.close()


async def test_nothing_gives_way_for_what_does_not_fit(store: ContentStore) -> None:
    first, second = Worker(store), Worker(store)
    assert await first.bring(block(1))
    assert await second.bring(block(2, 6 * MiB))
    assert not await second.have(block(3, 4 * MiB))  # the first one's would not be enough
    assert await first.found(block(1))
    first.close()
    second.close()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no new threads"), OSError("gone")])
async def test_what_cant_be_looked_at_is_let_go(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def look(descriptor: int, nbytes: int) -> tuple[bytes, bytes]:
        raise error

    worker = Worker(store)
    with monkeypatch.context() as patch:
        patch.setattr(contents, "_look", look)
        assert await worker.bring(block(1))
        assert not await worker.found(block(1))
    assert (store.refused, store.used, store.count) == (1, 0, 0)
    assert await worker.bring(block(1))
    assert await worker.found(block(1))
    worker.close()


async def test_there_are_no_more_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, limits[1]))
    store = ContentStore(64 * MiB)
    worker = Worker(store)
    assert [await worker.bring(block(n)) for n in range(4)] == [True, True, False, False]
    worker.close()
    await store.close()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_an_end_that_sends_noise_is_closed(store: ContentStore) -> None:
    worker = Worker(store)
    socket.send_fds(worker.end, [b"\xc1"], [])
    with pytest.raises(EOFError):
        await worker.hear()
    worker.end.close()


def test_tenants() -> None:
    here = {"subject": ((("commonName", "here"),),), "issuer": ((("commonName", "us"),),)}
    found = [
        tenant_of(b"token", None, b""),
        tenant_of(b"another", None, b""),
        tenant_of(b"token", here, b"der"),
        tenant_of(b"token", {**here, "subject": ((("commonName", "there"),),)}, b"der"),
        tenant_of(b"token", {**here, "issuer": ((("commonName", "them"),),)}, b"der"),
        tenant_of(b"token", {**here, "subject": ()}, b"one"),
        tenant_of(b"token", {**here, "subject": ()}, b"two"),
    ]
    assert len(set(found)) == len(found)
    assert tenant_of(b"token", {**here, "serialNumber": "7"}, b"newer") == found[2]


# -- sketches -------------------------------------------------------------------------------------


def test_a_sketch_is_as_the_protocol_says() -> None:
    data = os.urandom(3 * MiB + 17)
    size = len(data)
    pieces = [data[k * (size - 4096) // 63 :][:4096] for k in range(64)]
    expected = hashlib.sha256(size.to_bytes(8, "little") + b"".join(pieces)).digest()[:8]
    assert sketch_of(memoryview(data)) == expected
    assert pieces[-1] == data[-4096:]
    assert sketch_of(memoryview(data[:-1])) != expected


# -- the client's rule ----------------------------------------------------------------------------


class Way:
    """A connection, as far as the rule looks at it."""

    def __init__(self, bandwidth: float | None = None, shared: bool = False) -> None:
        self.shared = shared
        self._bandwidth = bandwidth

    def describe(self) -> dict[str, object]:
        return {} if self._bandwidth is None else {"bandwidth": self._bandwidth}


def way(bandwidth: float | None = None, shared: bool = False) -> Connection:
    return cast("Connection", Way(bandwidth, shared))


def make(wish: str = "auto") -> Known:
    found = Known(wish)
    found.enabled = True
    return found


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GB/s."""
    monkeypatch.setattr(known, "seconds_per_byte", lambda: 1e-9)


@pytest.mark.parametrize(
    ("wish", "bandwidth", "worth"),
    [
        ("auto", 125e6, True),
        ("auto", 249e6, True),
        ("auto", 251e6, False),
        ("auto", None, False),
        ("on", 10e9, True),
        ("on", None, True),
        ("off", 1e6, False),
    ],
)
def test_by_what_the_transport_says(wish: str, bandwidth: float | None, worth: bool) -> None:
    assert make(wish).worth_it(MiB, way(bandwidth)) is worth
    assert not make(wish).worth_it(MiB - 1, way(bandwidth))
    assert make(wish).worth_it(MiB, way(bandwidth, shared=True)) is (wish == "on")
    assert not Known(wish).worth_it(MiB, way(bandwidth))  # the server keeps nothing


def test_by_what_uploads_took() -> None:
    rule = make()
    for _ in range(7):
        rule.sent(MiB, 0.01)
        assert not rule.worth_it(MiB, way())
    rule.sent(MiB, 0.01)
    assert rule.worth_it(MiB, way())
    for _ in range(40):
        rule.sent(16 * MiB, 0.016)
    assert not rule.worth_it(MiB, way(1e6))


def test_a_list_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, now, asked = make(), 100.0, []
    monkeypatch.setattr(_clock, "now", lambda: now)

    def ask() -> Wait:
        asked.append(Wait(1, "contents"))
        return asked[-1]

    assert rule.ask(ask) is asked[0]
    assert not rule.has(b"12345678")
    asked[0].finish(b"1234567887654321")
    assert rule.has(b"12345678")
    assert rule.has(b"87654321")
    now += 9
    assert rule.ask(ask) is None
    assert len(asked) == 1
    now += 2
    assert rule.ask(ask) is None
    assert len(asked) == 2
    assert rule.has(b"12345678")
    asked[1].finish(None)  # the server has not looked
    assert rule.has(b"12345678")
    now += 11
    assert rule.ask(ask) is None
    asked[2].finish(b"")
    assert not rule.has(b"12345678")


def test_a_list_that_was_not_waited_for_is_asked_for_again() -> None:
    rule, asked = make(), []

    def ask() -> Wait:
        asked.append(Wait(1, "contents"))
        return asked[-1]

    assert rule.ask(ask) is asked[0]
    assert rule.ask(ask) is None  # another upload meanwhile does not wait
    asked[0].cancelled = True  # a timeout, or Ctrl-C
    assert rule.ask(ask) is asked[1]
    asked[1].finish(None)
    assert rule.ask(ask) is asked[2]
    asked[2].finish(b"12345678")
    assert rule.has(b"12345678")
    assert rule.ask(ask) is None
