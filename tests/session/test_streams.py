"""Streams and events mean what CUDA's mean: order within, none between, unless by an event."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any, Final

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import GpuRemoteError, OpError, OpFailed
from gpuremote.testing.servers import RunningServer
from gpuremote.wire import caps
from tests.faults.sides import BlockingSide, Side, slow
from tests.session.comparing import case

LONG: Final = 30_000_000
"""Random numbers that take a good fraction of a second, a thousand times as long as a small op."""


def late(device: Any, x: Any, value: float) -> None:
    """Write to ``x``, but only after a while (in the current stream)."""
    x[...] = slow(device, LONG)[0] * 0 + value


def test_order_within_a_stream(side: Side, device: Any) -> None:
    stream = device.stream()
    x = device.zeros(3)
    with stream:
        late(device, x, 1)
        for _ in range(10):
            x *= 2
            x += 1
        y = x * 10
        x[:] = 0
        z = x + y
    side.do(stream.synchronize())
    expected = 10 * (2**11 - 1)
    assert side.do(y.tolist()) == side.do(z.tolist()) == [expected] * 3
    assert side.do(x.tolist()) == [0, 0, 0]


def test_streams_do_not_wait_for_each_other(side: Side, device: Any) -> None:
    first, second = device.stream(), device.stream()
    x = side.do(device.arange(3).wait())
    with first:
        slow(device, LONG)
    finished = first.record()
    with second:
        y = x + 1
        assert side.do(y.tolist()) == [1, 2, 3]
    side.do(second.synchronize())
    assert side.do((x * 2).tolist()) == [0, 2, 4]  # in the default stream
    assert not side.do(finished.query())
    side.do(first.synchronize())
    assert side.do(finished.query())


def test_waiting_for_an_event(side: Side, device: Any) -> None:
    """Work behind the wait sees everything before the event, work in place included."""
    first, second = device.stream(), device.stream()
    x = side.do(device.zeros(3).wait())
    with first:
        late(device, x, 7)
    written = first.record()
    second.wait(written)
    with second:
        y = x + 1
    assert not side.do(written.query())  # nobody here was held up
    assert side.do(y.tolist()) == [8, 8, 8]
    # The default stream has no way to wait but in the program.
    with first:
        late(device, x, 9)
    side.do(first.record().synchronize())
    assert side.do(x.tolist()) == [9, 9, 9]


def test_an_event_is_the_point_where_it_was_recorded(side: Side, device: Any) -> None:
    """Waiting for it is not waiting for what comes after it."""
    stream = device.stream()
    with stream:
        x = device.ones(3)
        early = stream.record()
        slow(device, LONG)
        end = stream.record()
    side.do(early.synchronize())
    assert not side.do(end.query())
    other = device.stream()
    other.wait(early)
    with other:
        y = x + 1
    side.do(other.synchronize())
    assert not side.do(end.query())
    side.do(end.synchronize())
    assert side.do(y.tolist()) == [2, 2, 2]


def test_an_event_that_was_reached_long_ago(side: Side, device: Any) -> None:
    stream = device.stream()
    done = stream.record()
    side.do(done.synchronize())
    with stream:
        slow(device, LONG)
    end = stream.record()
    side.do(done.synchronize())
    assert side.do(done.query())
    assert not side.do(end.query())
    side.do(end.synchronize())


def test_arrays_of_other_streams_are_waited_for(side: Side, device: Any) -> None:
    first, second = device.stream(), device.stream()
    with first:
        x = slow(device, LONG)[:3] * 0 + 5
    with second:
        y = x * 2  # no event needed: it does not exist before
    z = y + x
    assert side.do(z.tolist()) == [15, 15, 15]


def test_what_is_ready_is_not_held_up_by_what_comes_later(
    side: Side, session: Any, device: Any
) -> None:
    """A stream that goes on working hands over what it has made."""
    stream, other = device.stream(), device.stream()
    x = side.do(device.ones(3).wait())
    with stream:
        slow(device, LONG // 3)
        y = x + 1
        slow(device, LONG)
        end = stream.record()
    with other:
        z = y * 2
    assert side.do((y + 1).tolist()) == [3, 3, 3]
    assert not side.do(end.query())
    assert side.do(z.tolist()) == [4, 4, 4]
    # And the default stream to others.
    slow(device, LONG // 3)
    made = x + 2
    slow(device, LONG)
    with other:
        doubled = made * 2
        assert side.do(doubled.tolist()) == [6, 6, 6]
    assert side.do(session.server_stats())["ops"] < session.stats().ops  # it has not caught up
    side.do(device.synchronize())


def test_elapsed_time(side: Side, device: Any) -> None:
    stream = device.stream()
    start = stream.record()
    with stream:
        slow(device, LONG)
    end = stream.record()
    with pytest.raises(OpError, match="not been reached"):
        side.do(start.elapsed_time(end))
    side.do(end.synchronize())
    took = side.do(start.elapsed_time(end))
    assert 5 < took < 20_000
    assert side.do(end.elapsed_time(start)) == pytest.approx(-took)
    assert side.do(start.elapsed_time(start)) == 0


def test_synchronize_waits_for_every_stream(side: Side, session: Any, device: Any) -> None:
    streams = [device.stream() for _ in range(3)]
    events = []
    for k, stream in enumerate(streams):
        with stream:
            slow(device, LONG // 4 * (k + 1))
        events.append(stream.record())
    side.do(session.synchronize())
    assert [side.do(event.query()) for event in events] == [True] * 3


def test_dropping_a_stream_keeps_its_work(side: Side, session: Any, device: Any) -> None:
    """What was issued is done, waited for by synchronize, and seen in what it made."""
    side.do(session.synchronize())
    x = side.do(device.zeros(3).wait())
    first = device.stream()
    with first:
        late(device, x, 1)
    event = first.record()
    second = device.stream()
    second.wait(event)
    with second:
        y = x + 1  # can't run yet
    del first, second
    gc.collect()
    session.flush()
    side.do(session.synchronize())
    assert side.do(event.query())
    assert side.do(x.tolist()) == [1, 1, 1]
    assert side.do(y.tolist()) == [2, 2, 2]
    third = device.stream()
    with third:
        late(device, x, 3)
        z = x + 1
    del third
    gc.collect()
    assert side.do(z.tolist()) == [4, 4, 4]


def test_a_session_that_ends_does_what_dropped_streams_have_left(
    side: Side, server: RunningServer
) -> None:
    with side.session(server.url) as session:
        stream = session.devices[0].stream()
        with stream:
            slow(session.devices[0], LONG)
            bad = session.devices[0].arange(3) ** -1
        del stream, bad
        gc.collect()
        session.flush()
        with pytest.raises(OpFailed, match="negative integer"):
            side.do(session.close())


def test_streams_and_events_are_given_back(side: Side, session: Any, device: Any) -> None:
    side.do(session.synchronize())
    gc.collect()
    for _ in range(3):
        streams = [device.stream() for _ in range(60)]
        arrays = []
        for k, stream in enumerate(streams):
            with stream:
                arrays.append(device.full(2, k))
            events = [stream.record() for _ in range(5)]
            streams[k - 1].wait(events[0])
            events.clear()
        assert [a[0] for a in side.do(session.get_many(arrays))] == list(range(60))
        assert side.do(session.server_stats())["streams"] >= 61
        del stream, streams
        gc.collect()
        side.do(session.synchronize())
    side.do(device.zeros(1).wait())
    assert side.do(session.server_stats())["streams"] == 1


def test_more_streams_than_a_session_may_have(side: Side, session: Any, device: Any) -> None:
    """Refused by the call, and the session lives on."""
    side.do(session.synchronize())
    streams = [device.stream() for _ in range(caps.MAX_STREAMS)]
    with pytest.raises(GpuRemoteError, match=f"{caps.MAX_STREAMS} streams"):
        device.stream()
    side.do(session.synchronize())
    with streams[-1]:
        x = device.arange(3) + 1
    assert side.do(x.tolist()) == [1, 2, 3]
    streams.clear()
    gc.collect()
    for _ in range(3 * caps.MAX_STREAMS):  # one at a time
        with device.stream():
            x += 1
    side.do(session.synchronize())
    assert side.do(x.tolist()) == [k + 3 * caps.MAX_STREAMS for k in (1, 2, 3)]


def test_nested_and_left_by_exceptions(side: Side, session: Any, device: Any) -> None:
    outer, inner = device.stream(), device.stream()
    current = []

    def note() -> None:
        device.zeros(1)
        current.append(session._core._stream)

    with outer:
        note()
        with inner, outer, inner:
            note()
        note()
        with pytest.raises(ZeroDivisionError), inner:
            raise ZeroDivisionError
        note()
    note()
    assert current == [outer.ident, inner.ident, outer.ident, outer.ident, 0]


def test_a_stream_belongs_to_its_session(side: Side, session: Any, fresh: Any) -> None:
    """Another session in the same block is not touched."""
    stream = session.devices[0].stream()
    with stream:
        slow(session.devices[0], LONG)
        assert side.do(fresh.devices[0].arange(3).tolist()) == [0, 1, 2]
        mine = fresh.devices[0].stream()
        with mine:
            assert side.do(fresh.devices[0].arange(2).tolist()) == [0, 1]
    assert not side.do(stream.record().query())
    side.do(stream.synchronize())


def test_streams_of_two_devices(side: Side, session: Any) -> None:
    first, second = session.devices
    a, b = first.stream(), second.stream()
    with a:
        x = slow(first, LONG)[:3] * 0 + 2
    with b:
        y = x.copy_to(second) + 1
        z = y.copy_to(first)
    b_done = b.record()
    with a:
        total = z + x
    assert (y.device, z.device) == (second, first)
    assert side.do(total.tolist()) == [5, 5, 5]
    side.do(b_done.synchronize())


def test_uploads_and_downloads_in_streams(side: Side, session: Any, device: Any) -> None:
    stream = device.stream()
    host = np.arange(300_000.0)
    with stream:
        x = side.do(device.put(host))
        x += 1
        y = side.do(device.put(np.arange(10)))
        y *= 3
        assert np.array_equal(side.do(x.get()), host + 1)
    assert np.array_equal(side.do(y.get()), np.arange(10) * 3)
    big, small = side.do(session.get_many([x, y]))
    assert big[-1] == host[-1] + 1
    assert small[-1] == 27


async def test_tasks_have_streams_of_their_own(server: RunningServer) -> None:
    async with gpuremote.connect(server.url) as session:
        device = session.devices[0]
        seen: dict[str, list[int]] = {"a": [], "b": []}
        streams = {"a": device.stream(), "b": device.stream()}

        async def work(name: str) -> None:
            with streams[name]:
                for _ in range(20):
                    x = device.arange(3) + 1
                    seen[name].append(session._core._stream)
                    assert (await x.get()).tolist() == [1, 2, 3]

        await asyncio.gather(work("a"), work("b"))
        assert seen == {name: [stream.ident] * 20 for name, stream in streams.items()}


async def test_tasks_share_a_stream(server: RunningServer) -> None:
    """They enter and leave it in any order; outside of it each has its own again."""
    async with gpuremote.connect(server.url) as session:
        device = session.devices[0]
        shared, own = device.stream(), device.stream()
        x = device.zeros(3)

        def current() -> int:
            nonlocal x
            x += 1
            return session._core._stream

        async def work(turns: int) -> list[int]:
            seen = []
            with own:
                with shared:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                        seen.append(current())
                seen.append(current())
            return [*seen, current()]

        found = await asyncio.gather(*(work(turns) for turns in (5, 1, 3)))
        for turns, seen in zip((5, 1, 3), found, strict=True):
            assert seen == [shared.ident] * turns + [own.ident, 0]
        await session.synchronize()


def test_threads_have_streams_of_their_own(server: RunningServer) -> None:
    with BlockingSide().session(server.url) as session:
        device = session.devices[0]
        results: dict[int, Any] = {}

        def work(k: int) -> None:
            stream = device.stream()
            with stream:
                x = device.zeros(50)
                for _ in range(200):
                    x += k
                results[k] = x.get()
            stream.synchronize()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k in range(6):
            with case(k):
                assert results[k].tolist() == [200 * k] * 50


def test_an_event_with_nothing_before_it_is_passed(side: Side, session: Any, device: Any) -> None:
    """Also if it comes in one batch with the question."""
    stream = device.stream()
    x = device.zeros(3)
    side.do(session.synchronize())
    for _ in range(20):
        event = session.devices[0].stream().record()
        assert side.do(event.query())
        with stream:
            x = device.ones(3)
        side.do(stream.synchronize())
        assert side.do(stream.record().query())
    assert side.do(x.tolist()) == [1, 1, 1]
