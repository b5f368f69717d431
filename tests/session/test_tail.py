"""What a blocking session leaves unsent goes out while the program does something else."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.client.tail import PAUSE, TAIL, Tail
from gpuremote.testing.servers import RunningServer


def until(condition: Callable[[], object]) -> None:
    """Without asking the session for anything."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gpuremote-tail"]


@pytest.fixture
def session(server: RunningServer) -> Any:
    with gpuremote.connect_sync(server.url) as opened:
        yield opened


def test_the_last_ops_of_a_burst(session: Any) -> None:
    device = session.devices[0]
    x = device.ones(8)
    for pause in (0.0, 0.2):  # also after the thread has gone to sleep
        session.synchronize()
        time.sleep(pause)
        before, begin = session.stats().messages_sent, time.monotonic()
        for _ in range(20):
            x = x + 1
        until(lambda: not session._core.unsent)
        looks = (time.monotonic() - begin) / PAUSE
        # All of them, and in no more messages than the burst was long enough for.
        assert 1 <= session.stats().messages_sent - before <= looks + 3
    assert x.tolist() == [41.0] * 8


def test_results_that_were_dropped_are_given_back(session: Any) -> None:
    x = session.devices[0].ones(1 << 16)
    session.synchronize()
    held = session.server_stats()["memory_used"]
    y = x + 1
    session.synchronize()
    del y
    z = x[:1] + 1  # an op, with which the handle travels
    until(lambda: not session._core.unsent)
    assert session.server_stats()["memory_used"] <= held + 4096
    assert z.tolist() == [2.0]


def test_the_rest_of_an_upload(server: RunningServer) -> None:
    with gpuremote.connect_sync(f"{server.url}?transport=tcp&lanes=1") as session:
        host = np.random.default_rng(0).random(1 << 23)
        x = session.devices[0].put_lent(host)
        connection: Any = session._core.peer.connection
        assert connection.pending_output  # more than the kernel takes at once
        until(lambda: not connection.pending_output)
        np.testing.assert_array_equal(x.get(), host)


def test_one_thread_as_long_as_there_are_sessions(server: RunningServer) -> None:
    others = len(threads())
    with gpuremote.connect_sync(server.url) as first:
        with gpuremote.connect_sync(server.url) as second:
            assert len(threads()) == 1
            (first.devices[0].ones(3), second.devices[0].ones(3))
        assert len(threads()) == 1
        x = first.devices[0].ones(3) + 1
        until(lambda: not first._core.unsent)
        assert x.tolist() == [2, 2, 2]
    assert len(threads()) == others


def test_a_session_that_was_forgotten() -> None:
    """The thread holds none."""

    class Left:
        def send_rest(self) -> bool:
            return False

    tail = Tail()
    left = Left()
    tail.add(left)
    thread = tail._thread
    assert thread is not None
    del left
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    tail.remove(Left())  # one that it does not know


def test_one_that_fails_does_not_end_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def send_rest(self) -> bool:
            raise RuntimeError("out of order")

    class Left:
        looks = 0

        def send_rest(self) -> bool:
            self.looks += 1
            return False

    tail = Tail()
    broken, left = Broken(), Left()
    called = tail.add(broken)
    tail.add(left)
    called()
    until(lambda: left.looks > 2)
    assert "not looked after any more" in caplog.text
    until(lambda: tail._asleep)  # and is woken again
    seen = left.looks
    called()
    until(lambda: left.looks > seen)
    tail.remove(left)


def test_a_forked_child_has_none(session: Any) -> None:
    assert TAIL._thread is not None
    child = os.fork()
    if not child:
        os._exit(len(threads()) + len(TAIL._leavers))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_threads_issue_while_it_sends(session: Any) -> None:
    device = session.devices[0]
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        x = device.full(4, float(seed))
        for step in range(300):
            x = x + 1
            if step % 50 == seed % 50:
                time.sleep(0.003)
        results[seed] = x

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed, x in results.items():
        assert x.tolist() == [seed + 300.0] * 4


def test_a_result_is_acknowledged_by_what_is_asked_next(session: Any) -> None:
    """Nothing but the questions is sent, but for a look of the thread in between."""
    device = session.devices[0]
    x = device.put(np.arange(1 << 16, dtype=np.float64))
    out = np.empty(1 << 16)
    for array in (x, x + 1):  # memory that the client gave, where it is shared, and other
        array.get(out=out)
        sent, begin = session.stats().messages_sent, time.monotonic()
        for _ in range(100):
            array.get(out=out)
        looks = (time.monotonic() - begin) / PAUSE
        assert session.stats().messages_sent - sent <= 100 + looks + 1
    assert np.array_equal(out, np.arange(1, (1 << 16) + 1, dtype=np.float64))


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_result_that_nothing_follows_is_acknowledged(session: Any, pause: float) -> None:
    x = session.devices[0].ones(1 << 16) + 1
    session.synchronize()
    time.sleep(pause)
    sent = session.stats().messages_sent
    x.get()
    until(lambda: not session._core.peer.owing)
    assert session.stats().messages_sent - sent == 2


def test_an_op_that_writes_to_a_result_does_not_wait_for_the_program(session: Any) -> None:
    """One that was issued before the bytes came, which the server keeps it from until then."""
    x = session.devices[0].put(np.ones(1 << 18))
    out = np.empty(1 << 18)
    for turn in range(20):
        wait = x._ask_bytes(out.view(np.uint8).data)
        x += 1
        session._core.wait(wait)
        assert not session._core.peer.owing, turn
        assert out[0] == turn + 1
    assert x.get()[0] == 21.0


async def test_a_loop_acknowledges_in_its_next_turn(server: RunningServer) -> None:
    async with await gpuremote.connect(server.url) as session:
        x = session.devices[0].ones(1 << 16) + 1
        await session.synchronize()
        sent = session.stats().messages_sent
        for _ in range(50):
            await x.get()
        deadline = time.monotonic() + 10
        while session._core.peer.owing:
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        assert 51 <= session.stats().messages_sent - sent <= 75
