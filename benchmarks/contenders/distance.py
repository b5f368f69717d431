"""Blocking sockets over emulated long ways: one connection, or several with a part each."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.contenders._requests import ACK, ECHO, GET, PUT, REQUEST
from benchmarks.contenders.base import Bytes, Contender, Peer, RelayProcess, now
from benchmarks.contenders.sockets import answer, receive
from benchmarks.machine import tcp_socket
from benchmarks.workloads import DISTANCES

__all__ = ["FarSockets", "serve"]


class FarSockets(Contender):
    """The option says how many connections; each has a thread on either side."""

    kinds = frozenset({"put", "get", "intact", "round_trip"})

    def open(self) -> None:
        self._peer = Peer("distance", self.setup.congestion)
        count = int(self.setup.option)
        self._pool = ThreadPoolExecutor(count)
        self._relays = {d: RelayProcess(self._peer.port, d) for d in DISTANCES}
        self._lines = {d: [_connect(r.port) for _ in range(count)] for d, r in self._relays.items()}
        self.move_to(DISTANCES[0])

    def close(self) -> None:
        for lines in self._lines.values():
            for sock in lines:
                sock.close()
        self._pool.shutdown()
        for relay in self._relays.values():
            relay.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def move_to(self, distance: int) -> None:
        self._socks = self._lines[distance]

    def round_trips(self, size: int, count: int) -> list[int]:
        sock, data = self._socks[0], bytes(size)
        buffer = memoryview(bytearray(size))
        sock.sendall(REQUEST.pack(ECHO, count, size))
        times = []
        for _ in range(count):
            begin = now()
            sock.sendall(data)
            receive(sock, buffer)
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._times(_put, source, count)

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._times(_get, out, count)

    def forget(self) -> None:
        """Each connection's part stays until another one comes."""

    def _times(
        self, transfer: Callable[[socket.socket, Bytes], None], memory: Bytes, count: int
    ) -> list[int]:
        parts = np.array_split(memory, len(self._socks))
        times = []
        for _ in range(count):
            begin = now()
            list(self._pool.map(transfer, self._socks, parts))
            times.append(now() - begin)
        return times


def _connect(port: int) -> socket.socket:
    sock = tcp_socket("")
    sock.connect(("127.0.0.1", port))
    return sock


def _put(sock: socket.socket, part: Bytes) -> None:
    sock.sendall(REQUEST.pack(PUT, 1, part.nbytes))
    sock.sendall(part.data)
    receive(sock, memoryview(bytearray(len(ACK))))


def _get(sock: socket.socket, part: Bytes) -> None:
    sock.sendall(REQUEST.pack(GET, 1, part.nbytes))
    receive(sock, part.data)


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    with tcp_socket("") as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ready(listener.getsockname()[1])
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=_serve_one, args=(sock,), daemon=True).start()


def _serve_one(sock: socket.socket) -> None:
    with sock:
        try:
            answer(sock)
        except (EOFError, ConnectionError):
            pass  # the client is done
