"""The connection that is worse than its network. Its transport work is in test_conformance."""

from __future__ import annotations

import asyncio
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gpuremote.errors import ConfigError, ConnectionLost
from gpuremote.testing.driving import Ends, place
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.emulated import EmulatedConnection
from gpuremote.transport.tcp import TcpConnection, pair

MIB = 1 << 20
Make = Callable[..., tuple[EmulatedConnection, TcpConnection]]


@pytest.fixture(params=[True, False], ids=["blocking", "non-blocking"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[EmulatedConnection | TcpConnection] = []

    def make(**traits: float) -> tuple[EmulatedConnection, TcpConnection]:
        here, there = pair(request.param)
        made.extend((here, there))
        emulated = EmulatedConnection(
            here,
            delay=traits.get("delay") or 0.0,
            bandwidth=traits.get("bandwidth"),
            cut_after=int(traits["cut_after"]) if "cut_after" in traits else None,
        )
        made.append(emulated)
        return emulated, there

    yield make
    for connection in made:
        connection.abort()


def test_delay_of_each_message_and_no_less_throughput(make: Make) -> None:
    here, there = make(delay=0.1)
    begin = time.monotonic()
    for number in range(50):
        here.send(bytes([number]))
    assert here.pending_output
    assert not here.flush()
    due = here.due()
    assert due is not None
    assert 0.05 < due <= 0.1
    ends = Ends(here, there)
    assert [ends.receive(there).header[0] for _ in range(50)] == list(range(50))
    assert 0.1 <= time.monotonic() - begin < 1.0
    assert here.flush()
    assert here.due() is None


def test_other_direction_is_not_delayed(make: Make) -> None:
    here, there = make(delay=5.0)
    there.send(b"now")
    begin = time.monotonic()
    assert bytes(Ends(here, there).receive(here).header) == b"now"
    assert time.monotonic() - begin < 2.0


@pytest.mark.parametrize("wait", [0.05, 1.0])
def test_waiting_in_receive_is_enough(make: Make, wait: float) -> None:
    """What is held back goes out of a thread that only receives."""
    here, there = make(delay=0.1)
    begin = time.monotonic()
    here.send(b"question")
    answered = threading.Thread(target=_answer, args=(there,))
    answered.start()
    incoming = None
    while incoming is None:
        incoming = here.receive(wait)
    assert bytes(incoming.header) == b"answer"
    assert 0.1 <= time.monotonic() - begin < 1.0
    answered.join()


def _answer(connection: TcpConnection) -> None:
    while connection.receive(1.0) is None:
        pass
    connection.send(b"answer")


def test_bandwidth_out(make: Make) -> None:
    here, there = make(bandwidth=100e6)
    begin = time.monotonic()
    ends = Ends(here, there)
    here.send(b"", [Region(bytes(20 * MIB))])
    place(ends, ends.receive(there))
    # The first burst is on the house, and the last one is not waited for.
    assert 0.02 < time.monotonic() - begin < 1.0
    here.send(b"")
    ends.receive(there)
    assert time.monotonic() - begin > 0.2


def test_bandwidth_in(make: Make) -> None:
    here, there = make(bandwidth=100e6)
    begin = time.monotonic()
    ends = Ends(here, there)
    there.send(b"", [Region(bytes(20 * MIB))])
    place(ends, ends.receive(here))
    assert 0.15 < time.monotonic() - begin < 1.0


def test_waiting_costs_no_steps(make: Make) -> None:
    """A driver that watches the descriptor sleeps while everything is only a matter of time."""
    here, there = make(bandwidth=1e6, delay=0.05)
    there.send(bytes(200_000))
    here.send(b"x", [Region(bytes(1 * MIB))])
    steps = 0
    begin = time.monotonic()
    while time.monotonic() - begin < 0.3:
        here.flush()
        while (incoming := here.receive()) is not None:
            incoming.discard()
        while (arrived := there.receive()) is not None:
            arrived.discard()
        poll = select.poll()
        poll.register(here.fileno(), select.POLLIN | select.POLLOUT)
        due = here.due()
        poll.poll(1000 * min(0.1, 0.1 if due is None else due))
        steps += 1
    assert steps < 100


async def test_descriptor_in_an_event_loop() -> None:
    """Readable also means: what the kernel did not take before goes on."""
    inner, there = pair(blocking=False)
    here = EmulatedConnection(inner, delay=0.001)
    loop = asyncio.get_running_loop()
    size = 24 * MIB
    finished: asyncio.Future[None] = loop.create_future()

    def inform(_: Incoming) -> None:
        finished.set_result(None)

    def arrived() -> None:
        incoming = there.receive()
        if incoming is not None:
            incoming.discard(inform)

    def look() -> None:
        here.receive()
        due = here.due()
        if due is not None:
            loop.call_later(due, look)

    loop.add_reader(there.fileno(), arrived)
    loop.add_reader(here.fileno(), look)
    here.send(b"", [Region(bytes(size))])
    look()
    await asyncio.wait_for(finished, 10)
    loop.remove_reader(there.fileno())
    loop.remove_reader(here.fileno())
    assert there.stats.payload_received == size
    here.abort()
    there.abort()


def test_cut(make: Make) -> None:
    here, there = make(cut_after=3 * MIB)
    here.send(b"", [Region(bytes(MIB))])
    ends = Ends(here, there)
    place(ends, ends.receive(there))
    here.send(b"", [Region(bytes(4 * MIB))])
    incoming = ends.receive(there)
    incoming.discard()
    with pytest.raises(ConnectionLost, match="cut by the emulation"):
        ends.until(lambda: False)
    assert here.closed
    with pytest.raises(ConnectionLost):
        here.send(b"")


def test_callbacks_may_wait_for_a_sender(make: Make) -> None:
    """A callback that needs a lock does not wait for a thread that sends under this lock."""
    here, there = make(delay=0.001)
    lock = threading.RLock()
    called: list[int] = []

    def done() -> None:
        with lock:
            called.append(1)

    def receive() -> None:
        deadline = time.monotonic() + 10
        while len(called) < 200 and time.monotonic() < deadline:
            here.receive(0.01)
            there.receive()

    receiving = threading.Thread(target=receive)
    receiving.start()
    for _ in range(200):
        here.send(b"x", (), done)
        with lock:
            time.sleep(0.0001)
            here.send(b"y")
    receiving.join()
    assert len(called) == 200


def test_close_waits_for_the_distance(make: Make) -> None:
    here, there = make(delay=0.05)
    there.send(b"unread")
    here.send(b"last")
    here.close(2)
    assert there.receive(1.0) is not None
    here, _ = make(delay=60.0)
    here.send(b"too far")
    begin = time.monotonic()
    here.close(0.1)
    assert time.monotonic() - begin < 1.0
    assert here.closed


def test_says_what_it_is(make: Make) -> None:
    here, _ = make(delay=0.01, bandwidth=1e9, cut_after=5)
    assert here.name == "tcp"
    assert here.reason == "emulated: 10 ms, 1000 MB/s, cut after 5 bytes"
    assert here.describe()["reason"] == here.reason


def test_refuses_nonsense(make: Make) -> None:
    for traits in ({"delay": -1}, {"bandwidth": 0}, {"cut_after": -1}, {"delay": float("nan")}):
        with pytest.raises(ConfigError):
            make(**traits)
