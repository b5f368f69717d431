"""The connection is cut at every byte, in both directions; every op is applied exactly once.

The counters here are the proof: ``x += 1`` gives another value when it is applied twice or not
at all, and both sides count records and ops.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import SessionLost, TransportError
from gpuremote.testing.cutting import CuttingProxy, Direction
from gpuremote.testing.servers import RunningServer, device_server, start_server
from gpuremote.wire import caps
from tests.faults.processes import wait_until_gone
from tests.faults.sides import AsyncSide, Side, counted, pattern

pytestmark = pytest.mark.timeout(60)

OPS = 6


def url(proxy: CuttingProxy, **options: object) -> str:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"gpu://{proxy.host}:{proxy.port}" + (f"?{query}" if query else "")


def quiet(proxy: CuttingProxy) -> None:
    """Return when nothing is on its way: the next byte is the next thing that is sent."""
    seen = (-1, -1)
    while seen != (proxy.bytes_up, proxy.bytes_down):
        seen = (proxy.bytes_up, proxy.bytes_down)
        time.sleep(0.0015)


def forwarded(proxy: CuttingProxy, direction: Direction) -> int:
    return proxy.bytes_up if direction == "up" else proxy.bytes_down


def measure(proxy: CuttingProxy, direction: Direction, run: Callable[[], None]) -> int:
    """Bytes that ``run`` sends in this direction when nothing is cut."""
    run()  # the first time more travels, as plans have to be defined
    quiet(proxy)
    before = forwarded(proxy, direction)
    run()
    quiet(proxy)
    return forwarded(proxy, direction) - before


def cut_everywhere(
    proxy: CuttingProxy,
    direction: Direction,
    run: Callable[[], None],
    offsets: Callable[[int], Iterable[int]] = lambda size: range(size + 1),
) -> int:
    """Run again and again, cutting one byte later each time; the number of cuts."""
    size = measure(proxy, direction, run)
    done = 0
    for offset in offsets(size):
        quiet(proxy)
        cuts = proxy.cuts
        proxy.cut_after(forwarded(proxy, direction) + offset, direction)
        run()
        if proxy.cuts == cuts:
            # The last bytes are acknowledgements, which nobody waits for.
            quiet(proxy)
            proxy.cut_never()
        done += proxy.cuts - cuts
    return done


class Counter:
    """A number on the device that is only ever counted up."""

    def __init__(self, session: Any, side: Side) -> None:
        self.session = session
        self.side = side
        self.array = session.devices[0].zeros(4, np.int64)
        self.expected = 0

    def count(self, ops: int = OPS) -> None:
        for _ in range(ops):
            self.array += 1
        self.expected += ops

    def check(self) -> None:
        got = self.side.do(self.array.get())
        assert got.tolist() == [self.expected] * 4

    def run(self) -> None:
        self.count()
        self.session.flush()
        self.check()


def assert_once(session: Any, side: Side, ops: int) -> None:
    """Server and client counted the same, and the program issued ``ops``."""
    session.flush()
    there, records = counted(session, side)
    assert there["records"] == records
    assert there["ops"] == session.stats().ops == ops


@pytest.mark.parametrize("direction", ["up", "down"])
def test_every_byte_of_an_op_batch(side: Side, proxy: CuttingProxy, direction: Direction) -> None:
    with side.session(url(proxy)) as session:
        counter = Counter(session, side)
        cuts = cut_everywhere(proxy, direction, counter.run)
        assert cuts >= (220 if direction == "up" else 60)
        counter.check()
        assert session.stats().reconnects >= cuts
        assert_once(session, side, counter.expected + 1)


def test_every_byte_of_several_answers(side: Side, proxy: CuttingProxy) -> None:
    """Five results and a failure: each message of the server is cut everywhere."""
    with side.session(url(proxy)) as session:
        arrays = [side.do(session.devices[0].put(pattern(40 + k, k))) for k in range(5)]
        out = [np.zeros(40 + k, np.uint8) for k in range(5)]

        def run() -> None:
            for place in out:
                place[:] = 0
            side.do(session.get_many(arrays, out=out))
            for k, place in enumerate(out):
                assert np.array_equal(place, pattern(40 + k, k))

        assert cut_everywhere(proxy, "down", run, lambda size: range(0, size + 1, 3)) >= 100


@pytest.mark.parametrize("direction", ["up", "down"])
def test_every_byte_of_a_put(
    side: Side, proxy: CuttingProxy, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload with a message of its own, made small enough to cut it everywhere."""
    monkeypatch.setattr(caps, "INLINE_PAYLOAD", 0)
    with side.session(url(proxy)) as session:
        session._core.inline = 0
        counter = Counter(session, side)
        data = pattern(100)
        put: list[Any] = []

        def run() -> None:
            data[0] = counter.expected % 256
            counter.count(1)
            put[:] = [side.do(session.devices[0].put(data))]
            put[0] += 1
            counter.check()

        cuts = cut_everywhere(proxy, direction, run)
        assert cuts >= (250 if direction == "up" else 40)
        assert np.array_equal(side.do(put[0].get()), data + np.uint8(1))
        assert_once(session, side, 2 * counter.expected + 1)


def payload_offsets(size: int) -> Iterable[int]:
    """All of the beginning and the end, both ends of each chunk, and a part of what is between."""
    near = [range(110), range(size - 30, size + 1)]
    chunks = range(0, size, 2 << 20)
    near += [range(max(0, at - 12), min(size, at + 12)) for at in chunks]
    return sorted({*(n for part in near for n in part), *range(0, size, max(1, size // 30))})


def test_a_large_payload_down(side: Side, proxy: CuttingProxy) -> None:
    with side.session(url(proxy)) as session:
        counter = Counter(session, side)
        data = pattern(5 << 19)
        array = side.do(session.devices[0].put(data))
        out = np.zeros_like(data)

        def run() -> None:
            out[:] = 0
            counter.count(2)
            side.do(array.get(out=out))
            assert np.array_equal(out, data)
            counter.check()

        assert cut_everywhere(proxy, "down", run, payload_offsets) >= 150
        assert_once(session, side, counter.expected + 1)


def test_a_large_payload_up(side: Side, proxy: CuttingProxy) -> None:
    with side.session(url(proxy)) as session:
        counter = Counter(session, side)
        data = pattern(5 << 19)
        put: list[Any] = []

        def run() -> None:
            data[::4096] += 1
            counter.count(2)
            put[:] = [side.do(session.devices[0].put(data))]
            counter.check()
            put.append((put[0] == put[0]).all())
            if counter.expected % 32 == 0:
                assert np.array_equal(side.do(put[0].get()), data)

        assert cut_everywhere(proxy, "up", run, payload_offsets) >= 150
        assert np.array_equal(side.do(put[0].get()), data)


def test_cut_again_and_again_with_everything_under_way(side: Side, proxy: CuttingProxy) -> None:
    """Ops, uploads, downloads and streams in one session that never has a connection for long.

    The arrays go on where they were cut, a message begins anew: none may be longer than that.
    """
    with side.session(url(proxy)) as session:
        device = session.devices[0]
        counter = Counter(session, side)
        counter.check()
        proxy.cut_after(9_001, "up", repeat=True)
        proxy.cut_after(90_001, "down", repeat=True)
        other = device.stream()
        total = np.zeros(9000, np.int64)
        summed = device.zeros(9000, np.int64)
        for k in range(30):
            host = np.arange(k, k + 9000)
            total += host
            summed += side.do(device.put(host))
            counter.count(150)
            with other:
                doubled = device.arange(3000, dtype="i8") * 2
                got = side.do(doubled.get())
            assert np.array_equal(got, np.arange(3000) * 2)
            if k % 5 == 0:
                assert np.array_equal(side.do(summed.get()), total)
                counter.check()
        side.do(session.synchronize())
        assert np.array_equal(side.do(summed.get()), total)
        counter.check()
        proxy.cut_never()
        assert session.stats().reconnects >= 50


def test_a_copy_from_a_session_that_was_cut_off(
    side: Side, proxy: CuttingProxy, server: RunningServer
) -> None:
    """The program waits for the receiver only; somebody has to bring the sender back."""
    with side.session(url(proxy)) as sender, side.session(server.url) as receiver:
        values = sender.devices[0].arange(10_000)
        side.do(values.get())
        for _ in range(3):
            proxy.cut()
            copied = values.copy_to(receiver.devices[0])
            assert np.array_equal(side.do(copied.get(timeout=10)), np.arange(10_000))


def test_issuing_while_the_loop_is_coming_back(
    proxy: CuttingProxy, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The task that resumes is in its handshake, and the program issues ops until the credit is
    out, which makes it resume by itself: only one of the two may go on."""
    side = AsyncSide(loop_factory)
    with side.session(url(proxy)) as session:
        counter = Counter(session, side)
        counter.run()
        rounds = 0
        # On a busy machine the way may be back before the credit is out.
        while session.stats().credit_waits < 3:
            assert (rounds := rounds + 1) < 20
            proxy.delay = 0.03
            proxy.cut()
            side.do(asyncio.sleep(0.02))
            counter.count(60_000)
            proxy.delay = 0.0
            counter.check()
        assert_once(session, side, counter.expected + 1)
    side.close()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cuts_in_the_handshake_of_a_resume(
    side: Side, proxy: CuttingProxy, direction: Direction
) -> None:
    """The way back is cut as well, at bytes all over the handshake and right behind it."""
    with side.session(url(proxy)) as session:
        counter = Counter(session, side)
        counter.run()
        quiet(proxy)
        before = forwarded(proxy, direction)
        counter.count()
        proxy.cut()
        counter.run()
        quiet(proxy)
        size = forwarded(proxy, direction) - before
        for offset in range(0, size, 19 if direction == "up" else 23):
            side.do(session.synchronize())  # the last cut may have come behind the answer
            cuts = proxy.cuts
            counter.count()
            proxy.cut()
            quiet(proxy)
            proxy.cut_after(forwarded(proxy, direction) + offset, direction)
            counter.run()
            proxy.cut_never()
            assert proxy.cuts >= cuts + 1
        assert_once(session, side, counter.expected + 1)


def test_several_cuts_in_a_row_while_coming_back(side: Side, proxy: CuttingProxy) -> None:
    with side.session(url(proxy)) as session:
        counter = Counter(session, side)
        counter.run()
        for gap in (1, 40, 250, 480):
            counter.count()
            proxy.cut_after(gap, "up", repeat=True)
            timer = threading.Timer(0.3, proxy.cut_never)
            timer.start()
            counter.run()
            timer.join()
        assert_once(session, side, counter.expected + 1)


def test_cut_in_the_first_handshake(side: Side, proxy: CuttingProxy, server: RunningServer) -> None:
    """Nothing has begun, so the caller is told, with an error of the connection's own kind."""
    for direction, offset in (("up", 0), ("up", 60), ("down", 0), ("down", 5), ("down", 100)):
        proxy.cut_after(forwarded(proxy, direction) + offset, direction)  # type: ignore[arg-type]
        with pytest.raises(TransportError) as caught:
            side.do(side.connect(url(proxy)))
        assert caught.value.retryable or "gpuremote server" in str(caught.value)
    with side.session(url(proxy)) as session:
        Counter(session, side).run()


# -- no way back ----------------------------------------------------------------------------------


def test_past_the_grace_period_everything_pending_fails(side: Side, proxy: CuttingProxy) -> None:
    with side.session(url(proxy, grace=0.6)) as session:
        device = session.devices[0]
        counter = Counter(session, side)
        counter.run()
        big = side.do(device.put(pattern(1 << 20)))
        proxy.refusing = True
        counter.count()
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(SessionLost, match="grace period"):
            side.do(counter.array.get())
        assert 0.4 < time.monotonic() - began < 5
        # From now on every call fails at once, whatever it is.
        for call in (
            lambda: counter.count(1),
            lambda: side.do(big.get()),
            lambda: side.do(device.put(pattern(100_000))),
            lambda: side.do(session.synchronize()),
            lambda: side.do(session.server_stats()),
            lambda: device.zeros(3),
        ):
            began = time.monotonic()
            with pytest.raises(SessionLost):
                call()
            assert time.monotonic() - began < 0.5  # not another grace period
        proxy.refusing = False
        with side.session(url(proxy)) as another:
            Counter(another, side).run()


def test_every_task_that_waits_is_told(
    proxy: CuttingProxy, loop_factory: Callable[[], Any], server: RunningServer
) -> None:
    side = AsyncSide(loop_factory)
    with side.session(url(proxy, grace=0.5)) as session:
        device = session.devices[0]
        arrays = [device.full(5000, k) for k in range(4)]
        side.do(session.synchronize())

        proxy.refusing = True
        proxy.cut()

        async def all_of_them() -> list[Any]:
            waits = [
                *(array.get() for array in arrays),
                *(device.put(pattern(50_000)) for _ in range(4)),
                session.synchronize(),
                arrays[0].wait(),
            ]
            return await asyncio.gather(*waits, return_exceptions=True)

        ends = side.do(all_of_them())
        assert [type(end) for end in ends] == [SessionLost] * 10
    side.close()


def test_every_thread_that_waits_is_told(proxy: CuttingProxy) -> None:
    with gpuremote.connect_sync(url(proxy, grace=0.5)) as session:
        device = session.devices[0]
        arrays = [device.full(50_000, k) for k in range(4)]
        session.synchronize()
        proxy.refusing = True
        proxy.cut()
        ends: list[type] = []

        def wait(call: Callable[[], object]) -> None:
            try:
                call()
            except BaseException as error:
                ends.append(type(error))

        calls: list[Callable[[], object]] = [array.get for array in arrays]
        calls.append(session.synchronize)
        calls.append(lambda: device.put(pattern(100_000)))
        threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert ends == [SessionLost] * 6


def test_a_program_that_only_issues_is_told_as_well(side: Side, proxy: CuttingProxy) -> None:
    """It never waits: the credit runs out, and with it the grace period."""
    with side.session(url(proxy, grace=0.5)) as session:
        counter = Counter(session, side)
        counter.run()
        proxy.refusing = True
        proxy.cut()

        def issue() -> None:
            for _ in range(1_000_000):
                counter.array += 1

        began = time.monotonic()
        with pytest.raises(SessionLost):
            issue()
        assert time.monotonic() - began < 10


def test_a_timeout_holds_while_the_server_can_not_be_reached(
    side: Side, server: RunningServer
) -> None:
    """Also where connecting hangs, because what listens there does not answer."""
    with CuttingProxy(server.host, server.port) as proxy, side.session(url(proxy)) as session:
        counter = Counter(session, side)
        counter.run()
        proxy.delay = 30.0  # accepts, and forwards nothing for now
        proxy.cut()
        counter.count()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            side.do(counter.array.get(timeout=0.4))
        assert time.monotonic() - began < 3
        proxy.delay = 0.0
        proxy.cut()
        counter.check()


def test_the_session_ends_at_the_server_when_the_client_stays_away(side: Side) -> None:
    with (
        device_server("--grace", "0.7") as server,
        CuttingProxy(server.host, server.port) as proxy,
        side.session(url(proxy, grace=30)) as session,
    ):
        counter = Counter(session, side)
        counter.run()
        proxy.refusing = True
        proxy.cut()
        wait_until_gone(session.worker_pid, seconds=5)
        proxy.refusing = False
        began = time.monotonic()
        with pytest.raises(SessionLost):
            side.do(counter.array.get())
        assert time.monotonic() - began < 2


def test_a_restarted_server_knows_no_session(side: Side) -> None:
    first = start_server("--drain", "0")
    try:
        session = side.do(side.connect(first.url + "?grace=30"))
        counter = Counter(session, side)
        counter.run()
        first.kill()
        second = start_server("--drain", "0", port=first.port)
        try:
            began = time.monotonic()
            with pytest.raises(SessionLost):
                side.do(counter.array.get())
            assert time.monotonic() - began < 3
            side.do(session.close())
            with side.session(second.url) as another:
                Counter(another, side).run()
        finally:
            second.terminate()
    finally:
        first.kill()
