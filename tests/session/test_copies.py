"""Copies between devices, sessions and servers: directly, and nothing waited for."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.errors import (
    GpuRemoteError,
    OpFailed,
    OutOfDeviceMemory,
    PeerCopyFailed,
    SessionClosed,
)
from gpuremote.testing.servers import RunningServer, device_server
from tests.faults.sides import AsyncSide, BlockingSide, Side, pattern, slow
from tests.session.comparing import DTYPES, case, numbers, same

MiB: Final = 1 << 20


@pytest.fixture(scope="module")
def second_server() -> Iterator[RunningServer]:
    with device_server("--warm", "1") as running:
        yield running


@pytest.fixture(scope="module")
def far(side: Side, second_server: RunningServer) -> Iterator[Any]:
    """A session on another server."""
    opened = side.do(side.connect(second_server.url))
    try:
        yield opened
    finally:
        side.do(opened.close())


@pytest.fixture(scope="module")
def near(side: Side, server: RunningServer) -> Iterator[Any]:
    """Another session on the same server."""
    opened = side.do(side.connect(server.url))
    try:
        yield opened
    finally:
        side.do(opened.close())


@pytest.fixture(params=["device", "session", "server"])
def target(request: pytest.FixtureRequest, session: Any, near: Any, far: Any) -> Any:
    """A device to copy to: of this session, of another, of another server."""
    devices = {"device": session.devices[1], "session": near.devices[0], "server": far.devices[0]}
    return devices[request.param]


Swallowed = tuple[Side, Any, Any, Any, float]
"""A side, its session with the source, its session with the target, the copy, and since when."""


@pytest.fixture(scope="module", autouse=True)
def swallowed(
    server: RunningServer, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> Iterator[list[Swallowed]]:
    """Copies to a server whose address leads to nobody who answers. They take their time, so
    they begin with the first test and are looked at in the last."""
    sides: tuple[Side, ...] = (AsyncSide(loop_factory), BlockingSide())
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        hidden = stack.enter_context(device_server("--warm", "2", "--advertise", address))
        begun = []
        for side in sides:
            source = stack.enter_context(side.session(server.url))
            target = stack.enter_context(side.session(hidden.url))
            copied = source.devices[0].arange(10).copy_to(target.devices[0])
            begun.append((side, source, target, copied, time.monotonic()))
        yield begun
    for side in sides:
        side.close()


def payload(*sessions: Any) -> int:
    """Array bytes that have passed this process, in messages of their own or inside of others."""
    return sum(
        s.payload_sent + s.payload_received + s.payload_copied
        for s in (session.stats() for session in sessions)
    )


def told(side: Side, session: Any) -> GpuRemoteError | None:
    """The failure that a session tells of, soon: copies that it sends are not waited for."""
    for _ in range(200):
        try:
            side.do(session.synchronize())
        except GpuRemoteError as error:
            return error
        time.sleep(0.02)
    return None


def settle(side: Side, *sessions: Any) -> None:
    for session in sessions:
        side.do(session.synchronize())


def test_values(side: Side, device: Any, target: Any) -> None:
    for dtype in DTYPES:
        for shape in ((), (0, 3), (5,), (40, 300)):
            with case(dtype, shape):
                host = numbers(shape, dtype)
                copied = side.do(device.put(host)).copy_to(target)
                assert copied.device is target
                same(side, copied, host)
                same(side, copied.copy_to(device), host)


def test_views_are_copied_as_they_look(side: Side, device: Any, target: Any) -> None:
    host = numbers((60, 70, 8), "float32")
    x = side.do(device.put(host))
    parts: list[Any] = [np.s_[::2, ::-1], np.s_[3], np.s_[..., None, 5], np.s_[:0]]
    for k, index in enumerate(parts):
        with case(k):
            same(side, x[index].copy_to(target), host[index])
    same(side, x.T.copy_to(target), host.T)
    wide: Any = np.broadcast_to(x[0, 0], (100, 8))
    same(side, wide.copy_to(target), np.broadcast_to(host[0, 0], (100, 8)))


def test_nothing_passes_the_client(
    side: Side, session: Any, near: Any, far: Any, target: Any
) -> None:
    x = session.devices[0].arange(MiB)  # 8 MiB
    settle(side, session, near, far)
    before = payload(session, near, far)
    waited = [s.stats().round_trips.total() for s in (session, near, far)]
    sent = [s.stats().bytes_sent for s in (session, near, far)]
    y = x.copy_to(target)
    total = (y * 2).sum()
    assert [s.stats().round_trips.total() for s in (session, near, far)] == waited
    assert side.do(total.item()) == MiB * (MiB - 1)
    assert payload(session, near, far) == before + 8  # the sum
    for s, bytes_sent in zip((session, near, far), sent, strict=True):
        assert s.stats().bytes_sent - bytes_sent < 4096


def test_a_copy_is_what_it_was_when_it_was_asked_for(side: Side, device: Any, target: Any) -> None:
    """Ops in place on the source come after; the copy is memory of its own."""
    for count in (10, 2 * MiB):
        x = device.zeros(count)
        x += 1
        y = x.copy_to(target)
        x += 1
        x[:] = 7
        y -= 0.5
        assert side.do(y.min().item()) == side.do(y.max().item()) == 0.5
        assert side.do(x.min().item()) == 7


def test_the_source_need_not_exist_yet(side: Side, device: Any, target: Any) -> None:
    y = (slow(device, 3_000_000)[:4] * 0 + 3).copy_to(target)  # and is dropped at once
    z = (y + 1).copy_to(device)
    assert side.do(z.tolist()) == [4] * 4


def test_round_and_round(side: Side, session: Any, near: Any, far: Any) -> None:
    x = session.devices[0].arange(1000)
    for _ in range(5):
        for place in (session.devices[1], far.devices[0], near.devices[1], session.devices[0]):
            x = x.copy_to(place) + 1
    assert side.do((x - session.devices[0].arange(1000)).tolist()) == [20] * 1000


def test_many_at_a_time(side: Side, session: Any, target: Any) -> None:
    """More than are under way at once, small ones among large ones."""
    hosts = [pattern(2 * MiB if k % 8 == 0 else 50 + k, k) for k in range(60)]
    arrays = side.do(session.devices[0].put_many(hosts))
    copies = [array.copy_to(target) for array in arrays]
    del arrays
    got = side.do(target._core.owner.get_many(copies))
    for k, (copied, host) in enumerate(zip(got, hosts, strict=True)):
        with case(k):
            assert np.array_equal(copied, host)


def test_two_servers_with_many_copies_for_each_other(side: Side, session: Any, far: Any) -> None:
    """More than either has under way at a time, so that they could wait for each other."""
    here, there = session.devices[0], far.devices[0]
    ours = [here.full(100_000, k) for k in range(40)]
    theirs = [there.full(100_000, -k) for k in range(40)]
    begun = time.monotonic()
    sent, taken = [], []
    for a, b in zip(ours, theirs, strict=True):
        sent.append(a.copy_to(there))
        taken.append(b.copy_to(here))
    assert [int(a[-1]) for a in side.do(far.get_many([x[-1:] for x in sent]))] == list(range(40))
    got = side.do(session.get_many([x[-1:] for x in taken]))
    assert [int(a[-1]) for a in got] == [-k for k in range(40)]
    assert time.monotonic() - begun < 8


def test_memory_comes_back(side: Side, session: Any, near: Any, far: Any) -> None:
    places = (session.devices[1], near.devices[0], far.devices[0])
    settle(side, session, near, far)
    used = [side.do(s.server_stats())["memory_used"] for s in (session, near, far)]
    x = session.devices[0].zeros(MiB)
    copies = [x.copy_to(place) for place in places for _ in range(3)]
    for copied in copies:
        side.do(copied.wait())
    del x, copies, copied
    settle(side, session, near, far)
    left: list[int] = []
    for _ in range(100):  # a sender learns a moment later that its bytes have come
        left = [side.do(s.server_stats())["memory_used"] for s in (session, near, far)]
        if all(now <= before for now, before in zip(left, used, strict=True)):
            break
        time.sleep(0.02)
    # Less than before where something of an earlier test went meanwhile.
    assert all(now <= before for now, before in zip(left, used, strict=True)), (used, left)


def test_a_source_that_failed(side: Side, session: Any, target: Any) -> None:
    """The copy fails too; inside of one session with the original error."""
    bad = session.devices[0].arange(3) ** -1
    copied = bad.copy_to(target)
    expected = OpFailed if target in session.devices else PeerCopyFailed
    with pytest.raises(expected):
        side.do(copied.get())
    with pytest.raises(GpuRemoteError):
        side.do(bad.get())
    if expected is PeerCopyFailed:  # the copy was this session's as well
        assert "negative integer" in str(told(side, session))
    side.do(session.synchronize())


def test_a_target_without_room(side: Side, session: Any, server: RunningServer) -> None:
    x = session.devices[0].zeros(MiB)
    with side.session(f"{server.url}?memory=1MiB") as small:
        copied = x.copy_to(small.devices[0])
        with pytest.raises(OutOfDeviceMemory) as caught:
            side.do(copied.wait())
        assert caught.value.op == "copy_to"
        assert side.do(small.devices[0].arange(3).tolist()) == [0, 1, 2]
    assert isinstance(told(side, session), PeerCopyFailed)
    assert side.do(x.sum().item()) == 0


def test_a_session_that_is_closed_sends_what_it_was_asked_to(
    side: Side, server: RunningServer, far: Any
) -> None:
    with side.session(server.url) as leaving:
        y = (slow(leaving.devices[0], 2_000_000) * 0 + 1).copy_to(far.devices[0])
    assert side.do(y.sum().item()) == 2_000_000
    with side.session(server.url) as leaving:
        gone = leaving.devices[0].zeros(3)
    with pytest.raises(SessionClosed, match="gone with its session"):
        gone.copy_to(far.devices[0])


def test_a_target_that_is_closed(side: Side, session: Any, server: RunningServer) -> None:
    """It takes first what is on its way."""
    with side.session(server.url) as leaving:
        y = slow(session.devices[0], 2_000_000).copy_to(leaving.devices[0])
    assert y.shape == (2_000_000,)
    side.do(session.synchronize())
    with pytest.raises(GpuRemoteError, match="closed"):
        session.devices[0].zeros(3).copy_to(leaving.devices[0])


def test_a_server_that_others_cannot_reach(side: Side, session: Any) -> None:
    """Nobody listens where it says that it is."""
    x = session.devices[0].arange(100_000)
    with (
        device_server("--warm", "1", "--advertise", "127.0.0.1:1") as hidden,
        side.session(hidden.url) as apart,
    ):
        begun = time.monotonic()
        y = x.copy_to(apart.devices[0])
        z = y + 1
        with pytest.raises(PeerCopyFailed):
            side.do(z.get())
        assert time.monotonic() - begun < 5
        error = told(side, session)
        assert isinstance(error, PeerCopyFailed)
        assert "127.0.0.1:1: " in str(error)
        assert "--advertise" in str(error)
        assert error.op == "copy_to"
        assert f'File "{__file__}"' in (error.origin or "")
        # The other way it works.
        assert side.do(apart.devices[0].arange(3).copy_to(x.device).tolist()) == [0, 1, 2]
    assert side.do(x[:3].tolist()) == [0, 1, 2]


def test_an_address_that_swallows_everything(swallowed: list[Swallowed]) -> None:
    """The connect succeeds and nothing is ever said: the copy fails when its time is up."""
    for side, source, target, copied, begun in swallowed:
        for other in (source, target):  # nothing else is held up
            assert side.do(other.devices[0].arange(3).tolist()) == [0, 1, 2]
        with pytest.raises(PeerCopyFailed):
            side.do(copied.get())
        assert time.monotonic() - begun > 5
        assert isinstance(told(side, source), PeerCopyFailed)
