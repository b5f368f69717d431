"""The relay of the benchmarks: a way that is longer, narrower and bounded, and loses nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from benchmarks.relay import Flow, Line, Relay

KIB = 1 << 10
WINDOW = 64 * KIB


def test_a_line_delays_and_limits() -> None:
    line = Line(rate=1000.0, delay=2.0)
    assert line.pass_on(500, 10.0) == 12.5
    # Behind the first, whoever sends it; the line is free again half a second later.
    assert line.pass_on(500, 10.0) == 13.0
    assert line.pass_on(1000, 20.0) == 23.0


def test_two_flows_share_a_line() -> None:
    line = Line(rate=1000.0, delay=0.0)
    first, second = Flow(line, 5000), Flow(line, 5000)
    for _ in range(5):
        first.hand_over(memoryview(bytes(1000)), 0.0)
        second.hand_over(memoryview(bytes(1000)), 0.0)
    for flow in (first, second):
        while (data := flow.arrived(5.0)) is not None:
            flow.deliver(len(data), 5.0)
    # Five seconds are five thousand bytes, of both together.
    assert not first.empty
    assert not second.empty
    first.settle(5.0)
    second.settle(5.0)
    assert first.in_flight + second.in_flight == 5000


def test_bytes_are_in_flight_until_their_acknowledgement_is_back() -> None:
    flow = Flow(Line(rate=float("inf"), delay=1.0), 100)
    flow.hand_over(memoryview(bytes(100)), 0.0)
    assert flow.room == 0
    assert flow.arrived(0.9) is None
    assert flow.due(blocked=False) == 1.0
    assert flow.arrived(1.0) is not None
    flow.deliver(60, 1.0)
    flow.settle(1.9)
    assert flow.room == 0
    flow.settle(2.0)
    assert flow.room == 60
    # What the receiver did not take waits for the receiver, not for a moment.
    assert flow.due(blocked=True) == float("inf")
    rest = flow.arrived(2.0)
    assert rest is not None
    assert len(rest) == 40


@contextlib.contextmanager
def running(target: int, rtt: float, rate: float) -> Iterator[Relay]:
    relay = Relay(target, rtt, rate, WINDOW)
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            relay.step(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield relay
    finally:
        stop.set()
        thread.join()
        relay.close()


def received(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(64 * KIB):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("connections", [1, 3])
def test_order_content_and_bound(connections: int) -> None:
    payloads = [(bytes(range(251)) * 1300)[n : n + 300 * KIB] for n in range(connections)]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        relay = stack.enter_context(running(listener.getsockname()[1], 0.004, 50e6))
        found: dict[int, bytes] = {}
        nears = []
        threads = []
        for number, payload in enumerate(payloads):
            near = stack.enter_context(socket.create_connection(("127.0.0.1", relay.port)))
            far = stack.enter_context(listener.accept()[0])
            nears.append(near)

            def send(near: socket.socket = near, payload: bytes = payload) -> None:
                near.sendall(payload)
                near.shutdown(socket.SHUT_WR)

            def answer(number: int = number, far: socket.socket = far) -> None:
                found[number] = received(far)
                # The end of one direction is not the end of the other.
                far.sendall(found[number][::-1])
                far.shutdown(socket.SHUT_WR)

            threads += [threading.Thread(target=send), threading.Thread(target=answer)]
        for thread in threads:
            thread.start()
        assert [received(near) for near in nears] == [payload[::-1] for payload in payloads]
        for thread in threads:
            thread.join()
        assert found == dict(enumerate(payloads))
    # So much was sent that the bound was reached, and it held.
    assert relay.peak == WINDOW


def test_a_connection_that_nobody_takes_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with (
        running(port, 0.0, 1e9) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as sock,
    ):
        assert sock.recv(1) == b""


def test_a_reset_of_one_side_is_one_for_the_other() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        running(listener.getsockname()[1], 0.0, 1e9) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as near,
    ):
        far, _ = listener.accept()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        with contextlib.suppress(ConnectionResetError):
            assert near.recv(1) == b""
