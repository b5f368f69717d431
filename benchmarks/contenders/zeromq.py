"""pyzmq: a PAIR of blocking sockets over TCP, frames without copies where it has them.

It chooses its own socket options; congestion control is the system's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time_ns
from typing import Any

import numpy as np
import zmq

from benchmarks.contenders._requests import ACK, ECHO, FORGET, GET, MESSAGES, PUT, REQUEST
from benchmarks.contenders.base import Bytes, Contender, Ops, Peer, now

__all__ = ["ZeroMQ", "serve"]


class ZeroMQ(Contender):
    """``send(copy=False)`` and ``recv(copy=False)``."""

    def open(self) -> None:
        self._peer = Peer("zeromq", self.setup.congestion)
        self._context, self._socket = _socket()
        self._socket.connect(f"tcp://127.0.0.1:{self._peer.port}")

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        sock, data = self._socket, bytes(size)
        sock.send(REQUEST.pack(ECHO, count, size))
        times = []
        for _ in range(count):
            begin = now()
            sock.send(data)
            sock.recv()
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        sock = self._socket
        times = []
        for _ in range(count):
            begin = now()
            sock.send(REQUEST.pack(PUT, 1, source.nbytes))
            sock.send(source, copy=False)
            sock.recv()
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        sock = self._socket
        times = []
        for _ in range(count):
            begin = now()
            sock.send(REQUEST.pack(GET, 1, out.nbytes))
            # It has no way to receive into memory that is there already.
            data = np.frombuffer(sock.recv(copy=False).buffer, np.uint8)
            self.handed.append(now() - begin)
            out[:] = data
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._socket.send(REQUEST.pack(FORGET, 0, 0))
        self._socket.recv()

    def ops(self, size: int, count: int) -> Ops:
        sock, data = self._socket, bytes(size)
        cpu, begin = process_time_ns(), now()
        sock.send(REQUEST.pack(MESSAGES, count, size))
        for _ in range(count):
            sock.send(data)
        issued, cpu = now(), process_time_ns() - cpu
        sock.recv()
        return Ops(issued - begin, now() - begin, cpu, 1)


def _socket() -> tuple[Any, Any]:
    context = zmq.Context()
    sock = context.socket(zmq.PAIR)
    # Without limits: all ops may be on their way at once, as with the others.
    sock.set_hwm(0)
    return context, sock


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    _, sock = _socket()
    ready(sock.bind_to_random_port("tcp://127.0.0.1"))
    kept: Any = b""
    while True:
        what, count, size = REQUEST.unpack(sock.recv())
        if what == ECHO:
            for _ in range(count):
                sock.send(sock.recv())
        elif what == PUT:
            # The frame's own memory is the new array.
            kept = np.frombuffer(sock.recv(copy=False).buffer, np.uint8)
            assert kept.nbytes == size
            sock.send(ACK)
        elif what == GET:
            sock.send(kept, copy=False)
        elif what == MESSAGES:
            for _ in range(count):
                sock.recv()
            sock.send(ACK)
        elif what == FORGET:
            kept = b""
            sock.send(ACK)
