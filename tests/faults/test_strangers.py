"""Peers that are not what they should be: each a clear error, raised where the caller is, and a
server that goes on serving everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.server
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

import gpuremote
from gpuremote.errors import (
    ConnectionFailed,
    ConnectionLost,
    GpuRemoteError,
    HandshakeTimeout,
    LimitExceeded,
    NotAGpuRemoteServer,
    ProtocolError,
    ServerBusy,
    SessionLost,
    TransportUnavailable,
    UnsupportedVersion,
    WorkerDied,
)
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.transport._framing import DATA, OPEN
from gpuremote.wire.batch import Op, fixed_record
from gpuremote.wire.frames import HEADER, Kind, ResultForm, encode_ack, pack_info
from gpuremote.wire.hello import Hello, Receipt, Refusal, Welcome
from tests.faults.processes import descendants, wait_until_gone
from tests.faults.raw import FakeServer, RawClient, fake_server, frame, greet, message
from tests.faults.sides import AsyncSide, Side, pattern

pytestmark = pytest.mark.timeout(60)

WELCOME = Welcome(
    session=b"s" * 16,
    secret=b"t" * 32,
    backend="numpy",
    devices=[{"kind": "cpu", "name": "fake", "memory": 1 << 30}],
    window=1 << 20,
    choice={"chosen": "tcp"},
    grace=30.0,
)


@contextlib.contextmanager
def listening_only() -> Iterator[str]:
    """A port where connections are taken by the kernel and by nobody else."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"gpu://127.0.0.1:{sock.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


# -- what a client finds at an address ------------------------------------------------------------


def test_nobody_listens(side: Side) -> None:
    with pytest.raises(ConnectionFailed, match="Is a server running there") as caught:
        side.do(side.connect(f"gpu://127.0.0.1:{free_port()}"))
    assert caught.value.retryable
    assert isinstance(caught.value, ConnectionError)


def test_no_such_host(side: Side) -> None:
    with pytest.raises(ConnectionFailed, match="host"):
        side.do(side.connect("gpu://no-such-host.invalid:7700?connect_timeout=5"))


def test_a_host_that_swallows_packets(side: Side) -> None:
    """TEST-NET-1: no answer, or the network is known to be unreachable."""
    began = time.monotonic()
    with pytest.raises((ConnectionFailed, NotAGpuRemoteServer, HandshakeTimeout)):
        side.do(side.connect("gpu://192.0.2.1:7700?connect_timeout=0.5"))
    assert time.monotonic() - began < 4


def test_a_server_that_says_nothing(side: Side) -> None:
    with listening_only() as url:
        began = time.monotonic()
        with pytest.raises(HandshakeTimeout, match="gpuremote server"):
            side.do(side.connect(url + "?connect_timeout=0.4"))
        assert 0.3 < time.monotonic() - began < 3


def test_a_server_that_says_everything_slowly(side: Side) -> None:
    """One byte at a time does not stretch the timeout."""

    def behave(sock: socket.socket) -> None:
        for byte in WELCOME.encode():
            sock.sendall(bytes([byte]))
            time.sleep(0.02)

    with fake_server(behave) as server:
        began = time.monotonic()
        with pytest.raises(HandshakeTimeout):
            side.do(side.connect(server.url + "?connect_timeout=0.4"))
        assert time.monotonic() - began < 3


def test_a_server_that_closes_at_once(side: Side) -> None:
    with (
        fake_server(lambda _: None) as server,
        pytest.raises(NotAGpuRemoteServer, match="is this a gpuremote server"),
    ):
        side.do(side.connect(server.url))


def test_a_web_server(side: Side) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            # It may wait for the end of a line that never comes.
            with pytest.raises((NotAGpuRemoteServer, HandshakeTimeout), match="gpuremote server"):
                side.do(side.connect(f"gpu://127.0.0.1:{server.server_port}?connect_timeout=0.5"))
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "greeting",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n", b"\0" * 64, b"gpuX"],
)
def test_a_server_of_another_kind(side: Side, greeting: bytes) -> None:
    with (
        fake_server(lambda sock: sock.sendall(greeting)) as server,
        pytest.raises(NotAGpuRemoteServer, match="first bytes") as caught,
    ):
        side.do(side.connect(server.url))
    assert not caught.value.retryable


def hello_frame(kind: int, body: object, versions: tuple[int, int] = (1, 1)) -> bytes:
    packed: bytes = body if isinstance(body, bytes) else msgpack.packb(body)
    return struct.pack("<4sBBHI", b"gpuR", *versions, kind, len(packed)) + packed


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (hello_frame(2, {"version": 9}, (7, 9)), UnsupportedVersion),
        (Refusal.of(UnsupportedVersion("versions 7 to 9")).encode(), UnsupportedVersion),
        (Refusal.of(ServerBusy("no place")).encode(), ServerBusy),
        (
            Refusal.of(TransportUnavailable("no", reasons={"rdma": "no NIC"})).encode(),
            TransportUnavailable,
        ),
        (Refusal(31337, "an error of a newer version").encode(), GpuRemoteError),
        (hello_frame(2, b"\xc1"), ProtocolError),
        (hello_frame(2, [1, 2]), ProtocolError),
        (hello_frame(2, {"devices": 7}), ProtocolError),
        (hello_frame(2, {"receipt": [5, []], "devices": []}), ProtocolError),
        (hello_frame(99, {}), ProtocolError),
        (Hello().encode(), ProtocolError),
        (hello_frame(2, b"")[:8] + b"\xff\xff\xff\xff", LimitExceeded),
        (WELCOME.encode()[:50], ConnectionLost),
    ],
)
def test_answers_to_the_handshake(side: Side, answer: bytes, error: type[GpuRemoteError]) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(answer)

    with fake_server(behave) as server:
        with pytest.raises(error) as caught:
            side.do(side.connect(server.url))
        assert type(caught.value) is error
        if error is TransportUnavailable:
            assert caught.value.reasons == {"rdma": "no NIC"}  # type: ignore[attr-defined]
        assert f"{server.host}:{server.port}" in str(caught.value)


def test_a_newer_server_that_speaks_our_version_too(side: Side) -> None:
    """What it says beyond this version is skipped."""

    def behave(sock: socket.socket) -> None:
        hello = greet(sock, Refusal(1, ""))
        assert hello.versions == (1, 1)

    body = {"version": 1, "devices": [], "news": {"x": [1, 2, 3]}, "window": 1 << 20}

    def newer(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(hello_frame(2, body, (1, 4)))
        sock.recv(1 << 16)

    with fake_server(newer) as server:
        session = side.do(side.connect(server.url + "?grace=0"))
        assert session.devices == ()
        close_quickly(side, session)
    with fake_server(behave) as server, pytest.raises(GpuRemoteError):
        side.do(side.connect(server.url))


def close_quickly(side: Side, session: object) -> None:
    began = time.monotonic()
    side.do(session.close(timeout=1.0, raise_failures=False))  # type: ignore[attr-defined]
    assert time.monotonic() - began < 4


# -- servers that break the protocol later --------------------------------------------------------


def result(seq: int, number: int, data: bytes = b"", form: int = ResultForm.BYTES) -> bytes:
    return message(Kind.RESULT, seq, struct.pack("<Q", number) + data, arg=form)


def opening(seq: int, number: int, sizes: list[int], channel: int = 0) -> bytes:
    head = HEADER.pack(Kind.RESULT, 0, 0, ResultForm.PAYLOAD, seq, 0) + struct.pack("<Q", number)
    body = struct.pack(f"<H{len(sizes)}Q", len(sizes), *sizes) + head
    return struct.pack("<IBBH", len(body), OPEN, 0, channel) + body


def await_batch(sock: socket.socket) -> None:
    """The acknowledgement that begins every connection comes first."""
    received = 0
    while received < 60:
        received += len(sock.recv(1 << 16))


GARBAGE = {
    "noise": bytes(range(7, 200)),
    "zeros": bytes(64),
    "web page": b"HTTP/1.1 200 OK\r\n\r\n",
    "huge frame": struct.pack("<IBBH", 0xFFFFFFFF, 1, 0, 0),
    "unknown frame": struct.pack("<IBBH", 0, 77, 0, 0),
    "data without opening": struct.pack("<IBBH", 100, DATA, 0, 3) + bytes(100),
    "huge regions": opening(1, 3, [1 << 62]),
    "a thousand regions": opening(1, 3, [1] * 1000),
    "another size": opening(1, 3, [5]),
    "short header": frame(b"abc"),
    "out of order": result(2, 3, bytes(32)),
    "nobody asked": result(1, 999, bytes(32)),
    "too few bytes": result(1, 3, bytes(31)),
    "facts for an array": result(1, 3, pack_info(True), ResultForm.INFO),
    "unknown form": result(1, 3, bytes(32), 55),
    "a batch": message(Kind.BATCH, 1, b"x" * 20),
    "unknown kind": message(99, 1),
    "acknowledges the future": message(Kind.ACK, 0, encode_ack(1 << 20, 0, []), ack=1 << 40),
    "odd ack": message(Kind.ACK, 0, b"123"),
    "failure of nothing": message(Kind.FAILURE, 1, pack_info({"x": 1})),
    "not msgpack": message(Kind.FAILURE, 1, b"\xc1\xc1"),
    "facts that are not msgpack": result(1, 4, b"\xc1", ResultForm.INFO),
    "goodbye of nothing": message(Kind.GOODBYE, 1, pack_info("bye")),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_server_that_turns_strange(side: Side, garbage: bytes) -> None:
    """It is raised at the wait; the session is over, and nothing is left."""

    def behave(sock: socket.socket) -> None:
        greet(sock, WELCOME)
        await_batch(sock)
        sock.sendall(garbage)
        while sock.recv(1 << 16):
            pass

    with fake_server(behave) as server:
        session = side.do(side.connect(server.url))
        x = session.devices[0].zeros(4)  # records 1 (its plan) and 2
        get = x._ask_bytes(memoryview(bytearray(32)))  # record 3
        with pytest.raises(ProtocolError):
            side.do(session.server_stats())  # record 4
        with pytest.raises(ProtocolError):
            get.result()
        with pytest.raises(ProtocolError):
            x + 1
        close_quickly(side, session)


def test_a_server_that_ends_the_session_with_a_reason(side: Side) -> None:
    def behave(sock: socket.socket) -> None:
        greet(sock, WELCOME)
        await_batch(sock)
        sock.sendall(message(Kind.GOODBYE, 1, pack_info([LimitExceeded.code, "enough"])))
        while sock.recv(1 << 16):
            pass

    with fake_server(behave) as server:
        session = side.do(side.connect(server.url))
        with pytest.raises(LimitExceeded, match="enough"):
            side.do(session.devices[0].zeros(4).get(timeout=10))
        close_quickly(side, session)


@pytest.mark.parametrize(
    ("receipt", "error"),
    [
        (Receipt(seen=10_000), ProtocolError),
        (Receipt(seen=1, partial=[(1, 5)]), ProtocolError),
    ],
)
def test_a_server_whose_receipt_makes_no_sense(
    side: Side, receipt: Receipt, error: type[GpuRemoteError]
) -> None:
    """At the resume: it claims to have what was never sent."""
    connections = []

    def behave(sock: socket.socket) -> None:
        connections.append(sock)
        if len(connections) == 1:
            greet(sock, WELCOME)
            sock.recv(1 << 16)
            return  # the connection breaks
        answer = dataclasses.replace(WELCOME, receipt=receipt)
        greet(sock, answer)
        while sock.recv(1 << 16):
            pass

    with fake_server(behave) as server:
        session = side.do(side.connect(server.url + "?grace=5"))
        x = session.devices[0].zeros(4)
        if receipt.partial:
            # Message 1 has no payload: the claim is skipped, and the fake says nothing more.
            with pytest.raises(TimeoutError):
                side.do(x.get(timeout=0.3))
        else:
            with pytest.raises(error):
                side.do(x.get(timeout=10))
        close_quickly(side, session)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.9\r\n", WELCOME.encode()[:60], b""])
def test_a_server_that_is_another_one_when_the_client_comes_back(side: Side, answer: bytes) -> None:
    """Something else listens there now, or it breaks off in the middle of the handshake: tried
    again until the grace period is over."""
    connections = []

    def behave(sock: socket.socket) -> None:
        connections.append(sock)
        if len(connections) == 1:
            greet(sock, WELCOME)
            sock.recv(1 << 16)
        else:
            sock.sendall(answer)

    with fake_server(behave) as server:
        session = side.do(side.connect(server.url + "?grace=0.5"))
        began = time.monotonic()
        with pytest.raises(SessionLost):
            side.do(session.devices[0].zeros(4).get())
        assert time.monotonic() - began < 4
        close_quickly(side, session)
    assert len(connections) > 2


# -- clients that break the protocol --------------------------------------------------------------


def goodbye(client: RawClient) -> tuple[int, str]:
    """What the server says when it ends the session."""
    for kind, body in client.read_messages():
        if kind == Kind.GOODBYE:
            code, text = msgpack.unpackb(body)
            return code, text
    raise AssertionError("the server ended the session without a word")


def blob(op: Op, data: bytes) -> bytes:
    return struct.pack("<I", op) + struct.pack("<I", len(data)) + data


def first(*records: bytes) -> bytes:
    return message(Kind.BATCH, 1, struct.pack("<Q", 1) + b"".join(records))


HOSTILE = {
    "noise": bytes(range(7, 200)),
    "huge frame": struct.pack("<IBBH", 0xFFFFFFFF, 1, 0, 0),
    "huge region": opening(1, 1, [1 << 62]),
    "out of order": message(Kind.BATCH, 5, struct.pack("<Q", 1)),
    "acknowledges the future": message(Kind.BATCH, 1, struct.pack("<Q", 1), ack=77),
    "unknown kind": message(99, 1),
    "unknown record": first(struct.pack("<I", 60)),
    "unknown plan": first(struct.pack("<I", 9999)),
    "huge blob": first(struct.pack("<II", Op.PUT, 0xFFFFFFFF)),
    "deep msgpack": first(blob(Op.PUT, b"\x91" * 20000)),
    "huge msgpack list": first(blob(Op.DEFINE, b"\xdd\xff\xff\xff\xff")),
    "no such device": first(blob(Op.PUT, pack_info([[1], "u1", 9]))),
    "object dtype": first(blob(Op.PUT, pack_info([[1], "O", 0]))),
    "define of eval": first(blob(Op.DEFINE, pack_info([64, "eval", [], {}, 0]))),
    "no such stream": first(fixed_record(Op.STREAM_USE, 5)),
    "copy to no device": first(fixed_record(Op.COPY, 1, 99)),
    "send to nonsense": first(struct.pack("<IQ", Op.SEND_TO, 1) + blob(Op.SEND_TO, b"\x01")[4:]),
    "expect with a short ticket": first(blob(Op.EXPECT, pack_info([[1], "u1", 0, b"x"]))),
    "a few bytes to be kept": first(blob(Op.PUT, pack_info([[1], "u1", 0, True]))),
    "offer without a digest": first(blob(Op.OFFER, pack_info([[1 << 20], "u1", 0]))),
    "offer of a few bytes": first(blob(Op.OFFER, pack_info([[1], "u1", 0, bytes(32)]))),
    "payload of no put": message(Kind.PAYLOAD, 1, bytes(8)),
}


@pytest.fixture(scope="module")
def well_stocked() -> Iterator[RunningServer]:
    """Each hostile client costs it a worker."""
    with device_server("--warm", "4") as running:
        yield running


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_client_that_breaks_the_protocol(well_stocked: RunningServer, hostile: bytes) -> None:
    """It is told so, with a code; its worker ends, and nobody else notices."""
    with RawClient(well_stocked.host, well_stocked.port) as client:
        client.sock.sendall(hostile)
        code, text = goodbye(client)
        assert code in {
            ProtocolError.code,
            LimitExceeded.code,
            *(e.code for e in op_errors()),
        }, text
        assert text
        wait_until_gone(client.welcome.worker, seconds=3)


def op_errors() -> list[type[GpuRemoteError]]:
    return [
        gpuremote.errors.UnsupportedOp,
        gpuremote.errors.DTypeError,
        gpuremote.errors.ShapeError,
    ]


def test_other_sessions_go_on_beside_a_hostile_one(side: Side, well_stocked: RunningServer) -> None:
    with side.session(well_stocked.url) as session:
        x = session.devices[0].zeros(3)
        for hostile in (HOSTILE["noise"], HOSTILE["huge frame"], HOSTILE["unknown plan"]):
            with RawClient(well_stocked.host, well_stocked.port) as client:
                client.sock.sendall(hostile)
                x += 1
                goodbye(client)
        assert side.do(x.get()).tolist() == [3, 3, 3]


def test_a_stranger_does_not_get_into_a_session(server: RunningServer) -> None:
    with gpuremote.connect_sync(server.url) as session:
        ident = session._link.welcome.session
        for hello in (
            Hello(session=ident, secret=b"guess" * 6),
            Hello(session=ident),
            Hello(session=b"no such session!", secret=session._link.welcome.secret),
            Hello(session=ident, ticket=b"no such ticket at all...", transports={"tcp": ""}),
        ):
            with pytest.raises(AssertionError, match="refused"):
                RawClient(server.host, server.port, hello)
        assert session.devices[0].ones(2).get().tolist() == [1, 1]
        assert session.stats().reconnects == 0


# -- handshakes that are meant badly --------------------------------------------------------------


def knock(server: RunningServer, data: bytes) -> bytes:
    """Send something instead of a handshake; all that the server answers."""
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        answer = b""
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            while received := sock.recv(65536):
                answer += received
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        bytes(100),
        hello_frame(1, b"")[:8] + b"\xff\xff\xff\xff",
        hello_frame(1, b"\xc1"),
        hello_frame(1, b"\x91" * 20000),
        hello_frame(1, b"\xdd\xff\xff\xff\xff"),
        hello_frame(1, {"session": 5}),
        hello_frame(1, {"receipt": [1, [[0, 0]]]}),
        hello_frame(1, {}, (9, 12)),
        hello_frame(1, {}, (0, 0)),
        hello_frame(2, {}),
        hello_frame(77, {}),
        hello_frame(1, {"receipt": [1 << 63, []], "transports": {"tcp": ""}}),
    ],
)
def test_a_handshake_of_garbage(server: RunningServer, data: bytes) -> None:
    answer = knock(server, data)
    assert not answer or answer.startswith(b"gpuR")


def test_after_all_that_garbage(server: RunningServer) -> None:
    with gpuremote.connect_sync(server.url) as session:
        assert session.devices[0].ones(1).get()[0] == 1


def test_silent_connections_do_not_keep_others_out(side: Side, server: RunningServer) -> None:
    """More of them than the server takes at a time, some of which begin and go no further."""
    silent = [socket.create_connection((server.host, server.port)) for _ in range(150)]
    try:
        for sock in silent[::3]:
            sock.sendall(b"gpu")
        began = time.monotonic()
        with side.session(server.url) as session:
            assert side.do(session.devices[0].ones(2).get()).tolist() == [1, 1]
        assert time.monotonic() - began < 6
    finally:
        for sock in silent:
            sock.close()


def test_a_client_that_resets_in_the_handshake(server: RunningServer) -> None:
    for count in range(0, 60, 4):
        sock = socket.create_connection((server.host, server.port))
        sock.sendall(Hello(transports={"tcp": ""}).encode()[:count])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        sock.close()
    with gpuremote.connect_sync(server.url) as session:
        assert session.devices[0].ones(1).get()[0] == 1


def test_more_sessions_than_allowed(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Also when all of them come at once: some get in, the others are told."""
    side = AsyncSide(loop_factory)
    with device_server("--max-sessions", "2", "--warm", "1") as server:

        async def all_at_once() -> list[Any]:
            connecting = (_connected(server.url) for _ in range(7))
            return await asyncio.gather(*connecting, return_exceptions=True)

        ends = side.do(all_at_once())
        sessions = [end for end in ends if isinstance(end, gpuremote.AsyncSession)]
        assert (len(sessions), sum(isinstance(end, ServerBusy) for end in ends)) == (2, 5)
        side.do(sessions.pop().close())
        deadline = time.monotonic() + 5
        while len(sessions) < 2 and time.monotonic() < deadline:
            with contextlib.suppress(ServerBusy):
                sessions.append(side.do(_connected(server.url)))
        assert len(sessions) == 2
        for session in sessions:
            side.do(session.close())
    side.close()


async def _connected(url: str) -> gpuremote.AsyncSession:
    return await gpuremote.connect(url)


# -- dropped in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["get", "put"])
def test_a_server_that_vanishes_in_the_middle_of_a_payload(side: Side, way: str) -> None:
    """SessionLost after the grace period; the buffer is free, and may be used at once."""
    with (
        device_server() as server,
        CuttingProxy(server.host, server.port, bandwidth=60e6) as proxy,
    ):
        session = side.do(side.connect(f"gpu://127.0.0.1:{proxy.port}?grace=0.5"))
        # Far more than the buffers on the way hold: that arrives whatever becomes of the server.
        data = pattern(96 << 20)
        array = session.devices[0].zeros(data.shape, np.uint8)
        side.do(array.wait())
        workers = descendants(server.process.pid)
        killer = threading.Timer(0.15, server.kill)
        killer.start()
        call: Callable[[], object] = (
            (lambda: side.do(array.get(out=data)))
            if way == "get"
            else (lambda: side.do(session.devices[0].put(data)))
        )
        with pytest.raises(SessionLost) as caught:
            call()
        killer.join()
        assert not isinstance(caught.value, WorkerDied)
        data[:] = 1
        close_quickly(side, session)
        wait_until_gone(*workers, seconds=20)  # one may be in the middle of its start


def test_fake_servers_end(side: Side) -> None:
    """The tool of these tests: nothing of it stays when a client does not come."""
    server = FakeServer(lambda _: None)
    server.close()
