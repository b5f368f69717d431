"""Uploads for which a block of shared memory is at hand: the same as all others, in one step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote._speed import NATIVE, native
from gpuremote.client.issuing import NEVER
from gpuremote.client.uploading import STAGED
from gpuremote.memory.shared import Arena
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import BlockingSide, Side

SIZE = 100_000


@pytest.fixture
def shared(side: Side, server: RunningServer) -> Iterator[Any]:
    with side.session(f"{server.url}?transport=shm") as session:
        yield session


@pytest.fixture
def device(side: Side, shared: Any) -> Any:
    """Of a session that has seen such an array."""
    device = shared.devices[0]
    for _ in range(2 * STAGED):
        side.do(device.put(np.zeros(SIZE, np.int32)))
    side.do(shared.synchronize())
    return device


def calls_of(device: Any, host: Any) -> list[str]:
    """Functions of Python that run while it is put."""
    called = []

    def see(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(see)
    try:
        kept = device.put(host)
    finally:
        sys.setprofile(None)
    del kept
    return called


@pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")
def test_it_is_one_step(side: Side, shared: Any, device: Any) -> None:
    if not isinstance(side, BlockingSide):
        pytest.skip("the loop has functions of its own")
    host = np.ones(SIZE, np.int32)
    # One of them tells the driver that there is something to be sent, one sends it.
    assert [calls_of(device, host) for _ in range(9)].count(["put"]) >= 3
    made = [shared.empty(SIZE, np.int32) for _ in range(6)]
    assert [calls_of(device, array) for array in made].count(["put"]) >= 3


def _others() -> list[Any]:
    plain = np.arange(SIZE, dtype=np.int32)
    fixed = plain.copy()
    fixed.setflags(write=False)
    square = plain.reshape(100, -1)
    return [
        plain,
        fixed,
        plain[::-1],
        plain.copy().view(np.matrix),
        plain.astype(">i4"),
        plain.astype(np.float32),
        plain.astype(np.uint32),
        np.arange(2 * SIZE, dtype=np.int32)[::2],
        np.arange(2 * SIZE, dtype=np.int32)[SIZE // 2 : SIZE // 2 + SIZE],
        square,
        square.T,
        np.asfortranarray(square),
        plain.tobytes(),
        plain.data,
    ]


@pytest.mark.parametrize("number", range(len(_others())))
def test_arrays_that_are_like_it(side: Side, device: Any, number: int) -> None:
    for _ in range(2):
        host = _others()[number]
        expected = np.frombuffer(host, np.uint8) if isinstance(host, bytes) else np.array(host)
        remote = side.do(device.put(host))
        assert remote.shape == expected.shape
        assert remote.dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(side.do(remote.get()), expected)


def test_the_program_may_write_to_it_at_once(side: Side, device: Any) -> None:
    host = np.zeros(SIZE, np.int32)
    remotes = []
    for k in range(5 * STAGED):
        host[:] = k
        remotes.append(side.do(device.put(host)))
    assert [int(side.do(remote.sum().item())) for remote in remotes] == [
        k * SIZE for k in range(5 * STAGED)
    ]


def test_a_dtype_that_is_asked_for(side: Side, device: Any) -> None:
    remote = side.do(device.put(np.ones(SIZE, np.int32), np.float64))
    assert remote.dtype == np.float64
    assert side.do(remote.sum().item()) == SIZE


def test_handles_that_were_dropped_are_counted(side: Side, shared: Any, device: Any) -> None:
    host = np.ones(SIZE, np.int32)
    side.do(shared.synchronize())
    before = shared.stats()
    for _ in range(20):
        side.do(device.put(host))
    side.do(shared.synchronize())
    after = shared.stats()
    assert after.freed - before.freed == 20
    told = 20 - (after.withdrawn - before.withdrawn)
    assert after.payload_sent - before.payload_sent == told * host.nbytes


def test_ctrl_c_when_the_record_is_there(side: Side, shared: Any, device: Any) -> None:
    """Nobody has the array, so it is taken back."""
    core = shared._core
    side.do(shared.synchronize())
    told, core.on_buffered = core.on_buffered, _interrupt
    host = np.ones(SIZE, np.int32)
    try:
        with pytest.raises(Interrupt):
            side.do(device.put(host))
        made = shared.empty(SIZE, np.int32)
        made[:] = 5
        core._told = False
        with pytest.raises(Interrupt):
            side.do(device.put(made))
    finally:
        core.on_buffered = told
    assert not core._staged
    assert made.flags.writeable  # it is the program's still
    kept = [side.do(device.put(host * k)) for k in range(3)]
    assert [int(side.do(remote.max().item())) for remote in kept] == [0, 1, 2]
    side.do(shared.synchronize())


class Interrupt(BaseException):
    """As KeyboardInterrupt, which would end the loop of a task as well."""


def _interrupt() -> None:
    raise Interrupt


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_ctrl_c_where_it_has_to_wait_or_to_flush(server: RunningServer, transport: str) -> None:
    """The server keeps nothing that nobody has, and nothing is waited for at the end."""
    with gpuremote.connect_sync(f"{server.url}?transport={transport}") as session:
        device, core = session.devices[0], session._core
        host = np.ones(SIZE, np.int32)
        for _ in range(2 * STAGED + 1):
            device.put(host)
        session.synchronize()
        known: dict[str, Any] = {"_relieve": core._relieve, "_keep_origins": core._keep_origins}

        def interrupt(*arguments: int) -> None:
            for name, method in known.items():
                setattr(core, name, method)
            core._stalled = False
            for number in arguments:
                core._keep_origins(number)
            raise Interrupt

        for name in known:
            setattr(core, name, interrupt)
        core._stalled = True
        core.watch(lambda _: None, None)  # then records go out by themselves
        with pytest.raises(Interrupt):
            device.put(host)
        core.watch(None, None)
        session.synchronize()
        assert not core._waits
        assert core.flush_after < NEVER
        assert session.server_stats()["memory_used"] == 0
        assert device.put(host).max().item() == 1


def test_it_comes_over_the_next_connection(side: Side, shared: Any, device: Any) -> None:
    """Also what was copied when the last one was gone already."""
    host = np.arange(SIZE, dtype=np.int32)
    connection = shared._core.peer.connection
    remotes = [side.do(device.put(host))]
    connection.abort()
    remotes += [side.do(device.put(host + k)) for k in (1, 2)]
    found = [side.do(remote.get()) for remote in remotes]
    assert shared._core.peer.connection is not connection
    assert all(np.array_equal(one, host + k) for k, one in enumerate(found))
    again = [side.do(device.put(host + k)) for k in range(2 * STAGED)]
    assert all(np.array_equal(side.do(one.get()), host + k) for k, one in enumerate(again))


def test_a_session_that_ended(side: Side, server: RunningServer) -> None:
    host = np.ones(SIZE, np.int32)
    with side.session(f"{server.url}?transport=shm") as session:
        device = session.devices[0]
        kept = [side.do(device.put(host)) for _ in range(3)]
    with pytest.raises(Exception, match="closed"):
        side.do(device.put(host))
    del kept


def shelf_of(arena: Arena, nbytes: int) -> Any:
    first = arena.allocate(nbytes)
    assert first is not None
    return arena.shelf(nbytes)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(64 << 20, lambda *_: True, lambda _: None)
    yield made
    made.close()


def test_a_shelf_gives_out_what_fits(arena: Arena) -> None:
    shelf = shelf_of(arena, 1 << 20)
    for nbytes in (0, -1, (1 << 20) + 1):
        with pytest.raises(ValueError, match="of a block of"):
            shelf.take(nbytes)
    out = []
    while (found := shelf.take(1 << 20)) is not None:
        out.append(found)
    assert sorted(index for _, _, index in out) == [0, 1, 2, 3]
    segment = out[0][1]
    assert [segment.used(k) for k in range(4)] == 4 * [1 << 20]
    with pytest.raises(IndexError):
        segment.used(4)
    del found, out
    shelf.collect()
    assert segment.unused()
    assert shelf.take(5)[0].nbytes == 5


def test_a_block_that_outlives_its_shelf(arena: Arena) -> None:
    shelf = shelf_of(arena, 1 << 20)
    view, segment, _ = shelf.take(1 << 20)
    view[:] = bytes(range(256)) * 4096
    arena.close()
    assert shelf.take(1 << 20) is None
    del segment, shelf
    assert bytes(view[:3]) == b"\0\1\2"
