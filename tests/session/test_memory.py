"""The session's memory limit, and memory that comes back when arrays are dropped."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer
from tests.faults.processes import wait_until_gone
from tests.faults.sides import Side
from tests.session.comparing import case

MiB: Final = 1 << 20
LIMIT: Final = 64 * MiB


@pytest.fixture(scope="module")
def session(side: Side, server: RunningServer) -> Iterator[Any]:
    opened = side.do(side.connect(f"{server.url}?memory=64MiB"))
    try:
        yield opened
    finally:
        side.do(opened.close())


def used(session: Any, side: Side) -> int:
    """Bytes in use on the server once everything issued has run and what was dropped is back."""
    gc.collect()
    side.do(session.synchronize())
    stats = side.do(session.server_stats())
    assert stats["memory_peak"] <= stats["memory_limit"] == session.memory_limit == LIMIT
    assert isinstance(stats["memory_used"], int)
    return stats["memory_used"]


def resident(session: Any) -> int:
    """Most memory the worker has had, in bytes."""
    lines = Path(f"/proc/{session.worker_pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def numbered(error: OutOfDeviceMemory, wanted: int, held: int) -> None:
    """The text names what was asked for, what is in use and the limit."""
    for number in (wanted, held, LIMIT):
        assert str(number) in str(error)
    assert isinstance(error, MemoryError)
    assert error.retryable


MAKERS: list[tuple[str, Callable[[Any], Any], int]] = [
    ("zeros", lambda x: x.device.zeros(40 * MiB, "u1"), 40 * MiB),
    ("full", lambda x: x.device.full(5 * MiB, 1.5), 40 * MiB),
    ("arange", lambda x: x.device.arange(5 * MiB), 40 * MiB),
    ("empty", lambda x: x.device.empty(1 << 50, "u1"), 1 << 50),
    ("add", lambda x: x + 1, 40 * MiB),
    ("sqrt", lambda x: np.sqrt(x), 40 * MiB),
    ("astype", lambda x: x.astype("c8"), 40 * MiB),
    ("matmul", lambda x: x.reshape(-1, 1) @ x.reshape(1, -1), (5 * MiB) ** 2 * 8),
    ("concat", lambda x: np.concatenate([x, x[:1]]), 40 * MiB + 8),
    ("copy", lambda x: x.copy(), 40 * MiB),
    ("sort", lambda x: np.sort(x), 40 * MiB),
    ("copy_to", lambda x: x.copy_to(x._core.devices[1]), 40 * MiB),
]


def test_checked_before_anything_is_allocated(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    x = side.do(device.zeros(5 * MiB).wait())
    high = resident(session)
    for name, make, wanted in MAKERS:
        with case(name):
            y = make(x)
            with pytest.raises(OutOfDeviceMemory) as caught:
                side.do(y.wait())
            numbered(caught.value, wanted, held + 40 * MiB)
            assert caught.value.op == name
            assert "test_memory.py" in (caught.value.origin or "")
            with pytest.raises(OutOfDeviceMemory):
                side.do((y + 1).wait())
            del y
            assert side.do(x[0].item()) == 0
            assert used(session, side) == held + 40 * MiB
    assert resident(session) < high + 8 * MiB
    del x
    assert used(session, side) == held


def test_results_whose_size_depends_on_values(side: Side, session: Any) -> None:
    """The most that they may be has to fit while the op runs; what they need is kept."""
    device = session.devices[0]
    held = used(session, side)
    x = device.arange(3 * MiB)  # 24 MiB
    few = side.do(x.compress(x < 10))
    assert few.shape == (10,)
    assert used(session, side) == held + 24 * MiB + 80
    y = device.zeros(2 * MiB)
    with pytest.raises(OutOfDeviceMemory):
        side.do(x.compress(x < 10))
    assert side.do(few.sum().item()) == 45
    del x, y, few, device
    assert used(session, side) == held


def upload(session: Any, side: Side, host: npt.NDArray[Any]) -> None:
    """Over shared memory nothing is waited for; the next wait tells."""
    side.do(session.devices[0].put(host))
    side.do(session.synchronize())


def test_uploads(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    host = np.ones(40 * MiB, np.uint8)
    x = side.do(device.put(host))
    with pytest.raises(OutOfDeviceMemory) as caught:
        upload(session, side, host)
    numbered(caught.value, 40 * MiB, held + 40 * MiB)
    assert caught.value.op == "put"
    with pytest.raises(OutOfDeviceMemory):
        upload(session, side, np.ones(LIMIT + 1, np.uint8))
    # Of several arrays that do not all fit there is none.
    with pytest.raises(OutOfDeviceMemory):
        side.do(device.put_many([host[:MiB], host, host[:MiB]]))
    assert used(session, side) == held + 40 * MiB
    filler = side.do(device.put(np.ones(24 * MiB - held, np.uint8)))
    assert used(session, side) == LIMIT
    tiny = side.do(device.put(np.ones(1)))  # travels with the next batch
    with pytest.raises(OutOfDeviceMemory):
        side.do(tiny.get())
    assert used(session, side) == LIMIT
    assert side.do(x.get()).min() == 1
    assert side.do(filler[:3].tolist()) == [1, 1, 1] if held > 24 else True
    del x, filler, tiny
    assert used(session, side) == held


def test_what_was_dropped_makes_room_at_once(side: Side, session: Any) -> None:
    """More than half of the limit each time. Ops need no wait in between; an upload, for which
    room is made when it comes and not in its turn, needs what is before it to have run."""
    device = session.devices[0]
    held = used(session, side)
    host = np.ones(40 * MiB, np.uint8)
    for k in range(6):
        x = side.do(device.put(host))
        x += k
        assert side.do(x[-1].item()) == k + 1
        del x
    for _ in range(6):
        y = device.zeros(40 * MiB, "u1")
        y += 1
        del y
    assert used(session, side) == held
    x = side.do(device.put(host))
    del x
    assert used(session, side) == held


def test_in_place_and_views_take_nothing(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    x = device.zeros(60 * MiB // 8)
    x += 1
    x[::2] *= 3
    x[:10] = x[10:20]
    wide: Any = np.broadcast_to(x.reshape(2, -1)[0, :4], (1 << 40, 4))
    assert wide.nbytes == 1 << 45
    assert used(session, side) == held + 60 * MiB
    assert side.do(x[:3].tolist()) == [3, 1, 3]
    with pytest.raises(OutOfDeviceMemory):
        side.do((wide + 1).wait())
    del x, wide
    assert used(session, side) == held


def test_a_strided_get_near_the_limit(side: Side, session: Any) -> None:
    """It is packed on the device first; where there is no room for that, the get fails."""
    device = session.devices[0]
    held = used(session, side)
    x = device.arange(5 * MiB).reshape(1024, -1)
    with pytest.raises(OutOfDeviceMemory) as caught:
        side.do(x.T.get())
    assert caught.value.op == "get"
    assert side.do(x[:, :1].T.get()).tolist() == [list(range(0, 5 * MiB, 5 * 1024))]
    assert np.array_equal(side.do(x.get()), np.arange(5 * MiB).reshape(1024, -1))
    del x, caught  # whose traceback holds it
    assert used(session, side) == held


def test_failed_ops_keep_no_memory(side: Side, session: Any) -> None:
    device = session.devices[0]
    held = used(session, side)
    x = device.arange(MiB)
    for _ in range(5):
        bad = x ** (device.zeros(MiB, np.int64) - 1)
        worse = [bad + k for k in range(3)]
        with pytest.raises(RuntimeError, match="negative integer"):
            side.do(worse[1].get())
        del bad, worse
    del x
    assert used(session, side) == held


def test_handles_come_back_in_batches(side: Side, session: Any) -> None:
    device = session.devices[0]
    side.do(session.synchronize())
    before, handles = session.stats(), side.do(session.server_stats())["handles"]
    arrays = [device.full(4, k) for k in range(5000)]
    side.do(session.synchronize())
    assert side.do(session.server_stats())["handles"] == handles + 5000
    del arrays
    side.do(session.synchronize())
    assert side.do(session.server_stats())["handles"] == handles
    after = session.stats()
    assert after.freed - before.freed >= 5000
    assert after.messages_sent - before.messages_sent < 500


def test_arrays_in_a_circle(side: Side, session: Any) -> None:
    held = used(session, side)
    x = session.devices[0].zeros(MiB)
    circle: list[Any] = [x]
    circle.append(circle)
    del x, circle
    assert used(session, side) == held


def test_all_comes_back_when_a_session_ends(side: Side, server: RunningServer) -> None:
    """Also with arrays that are still there, which are of no use afterwards."""
    with side.session(server.url) as session:
        kept = [session.devices[0].zeros(MiB) for _ in range(20)]
        side.do(session.synchronize())
        pid = session.worker_pid
    wait_until_gone(pid, seconds=5)
    assert kept[0].shape == (MiB,)
