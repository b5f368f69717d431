"""Peers made by hand, over plain sockets: clients and servers that do what they should not."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from gpuremote._clock import now
from gpuremote.rpc.dial import read_hello
from gpuremote.transport._framing import FRAME, MESSAGE
from gpuremote.wire.batch import PREFIX, Op, blob_record, fixed_record
from gpuremote.wire.frames import HEADER, Kind, pack_info
from gpuremote.wire.hello import Hello, Refusal, Welcome

__all__ = ["FakeServer", "RawClient", "fake_server", "frame", "message"]


def frame(body: bytes, kind: int = MESSAGE) -> bytes:
    """One frame of the TCP transport."""
    return FRAME.pack(len(body), kind, 0, 0) + body


def message(kind: int, seq: int, body: bytes = b"", *, arg: int = 0, ack: int = 0) -> bytes:
    """One message without payload, in its frame."""
    return frame(HEADER.pack(kind, 0, 0, arg, seq, ack) + body)


class RawClient:
    """A session spoken by hand.

    Attributes
    ----------
    sock : socket.socket
    welcome : Welcome
    number : int
        Of the next record.
    """

    def __init__(self, host: str, port: int, hello: Hello | None = None) -> None:
        self.sock = socket.create_connection((host, port), timeout=10.0)
        self.seq = 0
        self.number = 1
        try:
            self.sock.sendall((hello or Hello(transports={"tcp": ""})).encode())
            answer = read_hello(self.sock, now() + 10.0, f"{host}:{port}")
        except BaseException:
            self.sock.close()
            raise
        if not isinstance(answer, Welcome):
            self.sock.close()
            raise AssertionError(f"refused: {answer}")
        self.welcome = answer
        self.sock.settimeout(10.0)

    def batch(self, *records: bytes) -> bytes:
        """A message with these records, numbered on."""
        self.seq += 1
        body = PREFIX.pack(self.number) + b"".join(records)
        self.number += len(records)
        return message(Kind.BATCH, self.seq, body)

    def put(self, data: bytes) -> bytes:
        """A record that uploads bytes as an array of uint8."""
        return blob_record(Op.PUT_INLINE, blob=pack_info([[len(data)], "u1", 0, data]))

    def get(self, handle: int) -> bytes:
        return fixed_record(Op.GET, handle)

    def read_messages(self) -> Iterator[tuple[int, bytes]]:
        """Kind and body of what comes, without payloads, until the end."""
        with self.sock.makefile("rb") as stream:
            while len(head := stream.read(FRAME.size)) == FRAME.size:
                length, kind, _, _ = FRAME.unpack(head)
                body = stream.read(length)
                if kind == MESSAGE:
                    yield body[0], body[HEADER.size :]

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """End it without a goodbye, as a process that is killed."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FakeServer:
    """Listens, and does with each connection what it is told; in threads of its own.

    Parameters
    ----------
    behave : callable
        Gets each accepted socket; it is closed afterwards.
    """

    def __init__(self, behave: Callable[[socket.socket], object]) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()[:2]
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"gpu://{self.host}:{self.port}"

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._socks.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._behave(sock)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def fake_server(behave: Callable[[socket.socket], object]) -> Iterator[FakeServer]:
    server = FakeServer(behave)
    try:
        yield server
    finally:
        server.close()


def greet(sock: socket.socket, answer: Welcome | Refusal) -> Hello:
    """The server's half of a handshake."""
    hello = read_hello(sock, now() + 10.0, "client")
    assert isinstance(hello, Hello)
    sock.sendall(answer.encode())
    return hello
