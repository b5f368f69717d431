"""The part in C: what it knows of the layouts is what the rest says, and both ways agree."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from gpuremote._speed import NATIVE, native
from gpuremote.client.waits import PythonWait, Wait
from gpuremote.memory import host
from gpuremote.rpc.lane import Lane, PythonLane
from gpuremote.rpc.peer import Peer
from gpuremote.server.storage import Failure, PythonSlot, Slot
from gpuremote.transport._framing import FRAME, MESSAGE
from gpuremote.transport._stream import PythonStream, Stream
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.tcp import pair
from gpuremote.wire.batch import Op
from gpuremote.wire.frames import HEADER, Kind, ResultForm
from tests.rpc.test_peer import End, connect

BOTH_WAYS = [
    pytest.param(False, id="python"),
    pytest.param(
        True, id="native", marks=pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")
    ),
]
SOURCES = Path(__file__).parent.parent / "src/gpuremote/native"


def test_it_is_used_where_it_can_be_built() -> None:
    """A machine with a compiler and Python's headers has it, unless it is switched off."""
    if os.environ.get("GPUREMOTE_NATIVE") == "0":
        assert "GPUREMOTE_NATIVE" in NATIVE
        return
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = subprocess.run(["cc", "--version"], capture_output=True, check=False).returncode
    if header.exists() and compiler == 0:
        assert NATIVE == "used"
        assert (Wait, Lane, Stream, Slot) == (
            native.Wait,
            native.Lane,
            native.Stream,
            native.Slot,
        )


def test_switched_off() -> None:
    program = (
        "import gpuremote.client.waits as w, gpuremote._speed as s; "
        "assert s.native is None and w.Wait is w.PythonWait; print(s.NATIVE)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "GPUREMOTE_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "switched off by GPUREMOTE_NATIVE=0\n"


def test_the_layouts_that_c_knows() -> None:
    defined = {}
    for source in [*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]:
        for line in source.read_text().splitlines():
            if line.startswith("#define ") and len(line.split()) > 2:
                name, value = line.split()[1:3]
                defined[name] = value
    assert defined["BATCH"] == str(int(Kind.BATCH))
    assert defined["RESULT"] == str(int(Kind.RESULT))
    assert defined["BYTES"] == str(int(ResultForm.BYTES))
    assert defined["GET"] == str(int(Op.GET))
    assert defined["KINDS"] == str(max(Kind))
    assert defined["HEADER"] == str(HEADER.size)
    assert defined["FRAME"] == str(FRAME.size)
    assert FRAME.pack(5, MESSAGE, 0, 0) == ((1 << 32) + 5).to_bytes(8, "little")
    assert HEADER.pack(1, 2, 0, 3, 4, 5) == (
        b"\1\2\0\0" + (3).to_bytes(4, "little") + b"".join(n.to_bytes(8, "little") for n in (4, 5))
    )


@pytest.mark.parametrize("fast", BOTH_WAYS)
def test_wait(fast: bool) -> None:
    make: Any = native.Wait if fast else PythonWait
    wait = make(7, "get")
    assert (wait.number, wait.kind, wait.into, wait.done, wait.cancelled) == (
        7,
        "get",
        None,
        False,
        False,
    )
    assert (wait.value, wait.error, wait.notify, wait.future, wait.entries) == (None,) * 5
    assert (wait.left, wait.refusal, wait.posted) == (0, None, False)
    told = []
    wait.notify = lambda: told.append(1)
    wait.finish([1])
    wait.finish([2])
    assert told == [1]
    assert wait.result() == [1]
    failed = make(1 << 40, "put", into=memoryview(bytearray(3)))
    failed.finish(error=ValueError("no"))
    assert failed.done
    with pytest.raises(ValueError, match="no"):
        failed.result()
    assert failed.error is None
    again = make(number=1, kind="x", into=None)
    again.finish(error=KeyError("k"))
    assert isinstance(again.take_error(), KeyError)
    with pytest.raises(TypeError):
        make()
    again.value = again  # a circle
    again.notify = weakref.WeakSet([PythonSlot]).clear
    del again
    gc.collect()


@pytest.mark.parametrize("fast", BOTH_WAYS)
def test_slot(fast: bool) -> None:
    slot: Any = native.Slot() if fast else PythonSlot()
    assert (slot.value, slot.meta, slot.storage, slot.failure) == (None,) * 4
    assert slot.pending
    slot.fill("value", "meta", "storage")
    assert (slot.value, slot.meta, slot.storage, slot.pending) == (
        "value",
        "meta",
        "storage",
        False,
    )
    failure = Failure(1, 2, "text", "op")
    slot.poison(failure)
    assert (slot.value, slot.storage, slot.failure, slot.pending) == (None, None, failure, False)
    slot.value = None
    assert slot.value is None


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("fast", BOTH_WAYS)
@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        4096,
        65537,
        (256 << 10) + 1,
        (2 << 20) - 1,
        (2 << 20) + 77,
        (8 << 20) - 1,
        (8 << 20) + 1,
        (17 << 20) + 4097,
    ],
)
@pytest.mark.parametrize(("there", "here"), [(0, 0), (1, 0), (16, 3), (5, 64)])
def test_copy(fast: bool, away: bool, size: int, there: int, here: int) -> None:
    copy: Any = native.copy if fast else host._python_copy
    source = np.random.default_rng(size).integers(0, 256, here + size, np.uint8)
    target = np.full(there + size + 64, 7, np.uint8)
    copy(target[there : there + size].data, source[here:].data, away)
    assert np.array_equal(target[there : there + size], source[here:])
    assert (target[:there] == 7).all()
    assert (target[there + size :] == 7).all()
    with pytest.raises(ValueError, match="exactly"):
        copy(target[: size + 1].data, source[here:].data, away)
    fixed = target[there : there + size]
    fixed.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        copy(fixed.data, source[here:].data, away)


@pytest.mark.parametrize(
    ("size", "turns"),
    [((300 << 10) + 5, 150), ((2 << 20) + 5, 50), ((4 << 20) + 5, 50), ((33 << 20) + 5, 12)],
)
@pytest.mark.parametrize("fast", BOTH_WAYS)
def test_copy_again_and_again(fast: bool, size: int, turns: int) -> None:
    """In C there are several ways, which all have their turn: in runs of 24, 8, 4 or 2."""
    copy: Any = native.copy if fast else host._python_copy
    source = np.random.default_rng(size).integers(0, 256, size + 1, np.uint8)
    for turn in range(turns):
        target = np.full(size, turn % 251, np.uint8)
        copy(target.data, source[turn % 2 :][:size].data, True)
        assert np.array_equal(target, source[turn % 2 :][:size])


@pytest.mark.parametrize("fast", BOTH_WAYS)
def test_copies_of_several_threads_at_a_time(fast: bool) -> None:
    """In C each has helpers, which may come when everything is copied and the memory gone."""
    copy_bytes: Any = native.copy if fast else host._python_copy
    size = (8 << 20) + 4097
    failed: list[int] = []

    def copy(seed: int) -> None:
        source = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
        for _ in range(10):
            target = np.zeros(size, np.uint8)
            copy_bytes(target.data, source.data, bool(seed % 2))
            if not np.array_equal(target, source):
                failed.append(seed)

    threads = [threading.Thread(target=copy, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("size", [1, 4096, (128 << 10) + 1, (3 << 20) + 77])
def test_one_that_follows_gets_what_the_other_leads(size: int, large: bool) -> None:
    source = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    between, target = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    counter = memoryview(bytearray(4))
    patience = 10_000_000_000
    got: list[int] = []

    def follow() -> None:
        got.append(native.follow(target.data, between.data, counter, 5, patience, large))

    for _ in range(5):
        counter[:] = bytes(4)
        target[:] = between[:] = 0
        follower = threading.Thread(target=follow)
        follower.start()
        native.lead(between.data, source.data, counter, 5, large)
        follower.join()
        assert got.pop() == size
        assert np.array_equal(target, source)
        assert int.from_bytes(counter, "little") == size + 5


@pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")
def test_following_ends_where_nothing_comes() -> None:
    source, target = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    counter = memoryview(bytearray(4))
    assert native.follow(target.data, source.data, counter, 0, 0, False) == 0
    counter[0] = 60
    assert native.follow(target.data, source.data, counter, 20, 1_000_000, False) == 40
    assert np.array_equal(target[:40], source[:40])
    assert not target[40:].any()
    assert native.follow(target.data, source.data, counter, 61, 0, False) == 0
    counter[:] = b"\xff" * 4  # more than there can be
    assert native.follow(target.data, source.data, counter, 0, 0, False) == 100
    for wrong in (source.data[:99], source.data):
        with pytest.raises((ValueError, TypeError)):
            native.follow(target.data, wrong, counter[:3], 0, 0, False)
    with pytest.raises(ValueError, match="99"):
        native.lead(target.data, source.data[:99], counter, 0, False)
    with pytest.raises((ValueError, BufferError)):
        native.lead(target.data, source.data, counter.toreadonly(), 0, False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
@pytest.mark.parametrize("fast", BOTH_WAYS)
def test_a_large_copy_on_one_processor(fast: bool) -> None:
    """There nobody helps."""
    copy: Any = native.copy if fast else host._python_copy
    allowed = os.sched_getaffinity(0)
    source = np.random.default_rng(0).integers(0, 256, 9 << 20, np.uint8)
    target = np.zeros_like(source)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        copy(target.data, source.data, True)
    finally:
        os.sched_setaffinity(0, allowed)
    assert np.array_equal(target, source)


@pytest.mark.parametrize("fast", BOTH_WAYS)
def test_fits(fast: bool) -> None:
    fits: Any = native.fits if fast else host._python_fits
    out = np.zeros((2, 3))
    view = fits(out, np.ndarray, (2, 3), out.dtype)
    assert view.nbytes == 48
    view.cast("B")[:8] = np.float64(5).tobytes()
    assert out[0, 0] == 5
    scalar = np.zeros(())
    assert fits(scalar, np.ndarray, (), scalar.dtype).nbytes == 8
    fixed = np.zeros(3)
    fixed.flags.writeable = False
    refused = [
        (out, np.ndarray, (3, 2), out.dtype),
        (out, np.ndarray, (2, 3), np.dtype("f4")),
        (fixed, np.ndarray, (3,), fixed.dtype),
        (out.T, np.ndarray, (3, 2), out.dtype),
        (np.zeros(0), np.ndarray, (0,), out.dtype),
        (bytearray(48), np.ndarray, (2, 3), out.dtype),
        (np.ma.masked_array(out), np.ndarray, (2, 3), out.dtype),
    ]
    for arguments in refused:
        assert fits(*arguments) is None


@pytest.fixture
def peer() -> Iterator[Peer]:
    """One of two that are connected."""
    a, b = End(), End()
    connect(a, b)
    connections = [a.peer.connection, b.peer.connection]
    yield a.peer
    for connection in connections:
        assert connection is not None
        connection.abort()


def test_messages_are_kept_until_they_are_acknowledged(peer: Peer) -> None:
    for number in range(50):
        assert peer.post(Kind.BATCH, b"%d" % number)
    assert peer.kept_count == 50
    assert [item[0] for item in peer.kept()] == list(range(1, 51))
    assert [bytes(item[4]) for item in peer.kept()] == [b"%d" % n for n in range(50)]
    peer.settle(20)
    assert [item[0] for item in peer.kept()] == list(range(21, 51))
    for number in range(50, 90):  # the ring has to grow with its beginning in the middle
        peer.post(Kind.BATCH, b"%d" % number)
    assert [bytes(item[4]) for item in peer.kept()] == [b"%d" % n for n in range(20, 90)]
    peer.settle(1 << 60)
    assert peer.kept() == []


def test_the_kept_body_is_the_one_that_was_given(peer: Peer) -> None:
    body = bytearray(b"as it is")
    peer.post(Kind.BATCH, body, 3, 128)
    assert peer.kept() == [(1, Kind.BATCH, 128, 3, body)]
    assert peer.kept()[0][4] is body


def test_post_tells_what_is_to_be_seen_to(peer: Peer) -> None:
    assert peer.post(Kind.BATCH, b"out")
    peer.credit = 10
    assert not peer.post(Kind.BATCH, b"no credit for more")
    peer.credit = 1 << 30
    while peer.post(Kind.BATCH, bytes(4000)):
        assert peer.kept_count < 10_000, "the kernel takes everything"
    connection = peer.connection
    assert connection is not None
    assert connection.pending_output
    assert not peer.post(Kind.BATCH, b"behind others")
    connection.abort()
    assert not peer.post(Kind.BATCH, b"no connection")
    assert peer.connection is None
    assert not peer.post(Kind.BATCH, b"no connection any more")


def test_take_refuses_nonsense(peer: Peer) -> None:
    with pytest.raises(TypeError):
        peer.take()  # type: ignore[call-arg]
    with pytest.raises((TypeError, AttributeError)):
        peer.take(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        peer.post(Kind.BATCH, "text")  # type: ignore[arg-type]
    assert peer.kept() == [] or native is None


def test_counters_of_a_connection() -> None:
    """The same whichever way a message went."""
    here, there = pair(blocking=False)
    try:
        for _ in range(3):
            here.send(b"small")
            assert there.receive() is not None
        stats = here.stats
        assert (stats.messages_sent, stats.sends, stats.bytes_sent) == (3, 3, 3 * 13)
        here.send(bytes(5000))
        assert there.receive() is not None
        assert (here.stats.messages_sent, here.stats.bytes_sent) == (4, 3 * 13 + 5008)
        assert (there.stats.messages_received, there.stats.bytes_received) == (4, 3 * 13 + 5008)
        assert there.stats is there.stats
    finally:
        here.abort()
        there.abort()


def test_chunks_of_a_payload_go_to_the_kernel_in_one_call() -> None:
    """The gaps between two calls are a few percent of a large upload within a host."""
    if native is None:
        pytest.skip(f"_native: {NATIVE}")
    here, there = pair(blocking=False)
    here._chunk_size = 40 << 10
    data = bytes(range(256)) * 400  # in three frames
    place = memoryview(bytearray(len(data)))
    try:
        here.send(b"header", [Region(data)])
        assert here.stats.sends == 1
        incoming = there.receive()
        assert incoming is not None
        placed: list[Incoming] = []
        incoming.into([place], placed.append)
        while not placed:
            here.flush()
            assert there.receive() is None
        assert place == data
        assert here.stats.bytes_sent == there.stats.bytes_received > len(data) + 4 * FRAME.size
    finally:
        here.abort()
        there.abort()


def test_nothing_is_sent_over_a_descriptor_that_was_given_back() -> None:
    here, there = pair(blocking=False)
    here.abort()
    other, end = socket.socketpair()  # may well get the same number
    with other, end, pytest.raises(ConnectionError):
        here.send(b"not for you")
    with pytest.raises(ConnectionError):
        here.receive()
    there.abort()


def test_the_twins_have_the_same_names() -> None:
    if native is None:
        pytest.skip(f"_native: {NATIVE}")
    for twin, fast in (
        (PythonWait, native.Wait),
        (PythonSlot, native.Slot),
    ):
        names = {n for n in (*vars(twin), *getattr(twin, "__annotations__", ())) if n[0] != "_"}
        assert names <= set(dir(fast)), (twin, names - set(dir(fast)))
    lane = set(PythonLane.__annotations__) | {n for n in vars(PythonLane) if not n.startswith("_")}
    assert lane - {"dispatch", "lost"} <= set(dir(native.Lane))
    stream = set(PythonStream.__annotations__) | {"send", "receive"}
    assert stream - {"_line", "_gaps"} <= set(dir(native.Stream))


def test_no_message_is_lost_to_a_signal() -> None:
    """One that comes together with a message: it is taken in, or the connection is given up, and
    then it comes again over the next one."""

    def interrupt(number: int, stack: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        for _ in range(60):
            here, there = End(), End()
            first, second = pair(blocking=True)
            here.peer.attach(first, there.peer.receipt())
            there.peer.attach(second, here.peer.receipt())
            while not here.peer.take(first, 1.0):
                pass

            def send(end: End = there) -> None:
                end.peer.post(Kind.BATCH, b"message")
                os.kill(os.getpid(), signal.SIGUSR1)

            sender = threading.Thread(target=send)
            try:
                sender.start()
                while not here.messages:
                    here.peer.take(first, 1.0)
                while True:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                pass
            sender.join()
            assert first.closed or here.messages or here.peer.take(first, 1.0)
            assert first.closed or here.messages == [(Kind.BATCH, 0, b"message")]
            first.abort()
            second.abort()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_credit_beyond_every_number(peer: Peer) -> None:
    peer.grant((1 << 64) - 1)
    assert peer.credit > 1 << 60
    assert peer.post(Kind.BATCH, b"goes out")


def test_a_lane_that_was_not_set_up() -> None:
    if native is None:
        pytest.skip(f"_native: {NATIVE}")
    here, there = pair(blocking=False)
    with pytest.raises(AttributeError):
        native.Lane().take(here)
    with pytest.raises(AttributeError):
        native.Stream().send(b"x")
    here.abort()
    there.abort()
