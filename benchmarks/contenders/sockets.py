"""Blocking TCP sockets: ``sendall`` and ``recv_into``, nothing else. The reference."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from time import process_time_ns

import numpy as np

from benchmarks.contenders._requests import ACK, ECHO, FORGET, GET, MESSAGES, PUT, REQUEST
from benchmarks.contenders.base import ALL, Bytes, Contender, Ops, Peer, now
from benchmarks.machine import tcp_socket

__all__ = ["Sockets", "answer", "receive", "serve"]


class Sockets(Contender):
    """Blocking sockets with the fastest congestion control that may be set."""

    kinds = ALL | {"busy_thread"}

    def open(self) -> None:
        self._peer = Peer("sockets", self.setup.congestion)
        self._sock = tcp_socket(self.setup.congestion)
        self._sock.connect(("127.0.0.1", self._peer.port))

    def close(self) -> None:
        self._sock.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        return self.rested_round_trips(size, count, 0.0)

    def rested_round_trips(self, size: int, count: int, rest: float) -> list[int]:
        sock, data = self._sock, bytes(size)
        buffer = memoryview(bytearray(size))
        sock.sendall(REQUEST.pack(ECHO, count, size))
        times = []
        for _ in range(count):
            if rest:
                time.sleep(rest)
            begin = now()
            sock.sendall(data)
            got = sock.recv_into(buffer)
            while got < size:
                got += sock.recv_into(buffer[got:])
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        sock, view = self._sock, source.data
        answer = memoryview(bytearray(len(ACK)))
        times = []
        for _ in range(count):
            begin = now()
            sock.sendall(REQUEST.pack(PUT, 1, view.nbytes))
            sock.sendall(view)
            receive(sock, answer)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        sock, view = self._sock, out.data
        times = []
        for _ in range(count):
            begin = now()
            sock.sendall(REQUEST.pack(GET, 1, view.nbytes))
            receive(sock, view)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._sock.sendall(REQUEST.pack(FORGET, 0, 0))
        receive(self._sock, memoryview(bytearray(len(ACK))))

    def ops(self, size: int, count: int) -> Ops:
        sock, data = self._sock, bytes(size)
        answer = memoryview(bytearray(len(ACK)))
        cpu, begin = process_time_ns(), now()
        sock.sendall(REQUEST.pack(MESSAGES, count, size))
        for _ in range(count):
            sock.sendall(data)
        issued, cpu = now(), process_time_ns() - cpu
        receive(sock, answer)
        return Ops(issued - begin, now() - begin, cpu, 1)


def receive(sock: socket.socket, view: memoryview) -> None:
    """Fill ``view``; every call asks for all that is missing, steps of 1 MiB may cost more."""
    got, size = 0, view.nbytes
    while got < size:
        count = sock.recv_into(view[got:])
        if not count:
            raise EOFError("the other side has gone")
        got += count


def serve(congestion: str, ready: Callable[[int], None]) -> None:
    with tcp_socket(congestion) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ready(listener.getsockname()[1])
        sock, _ = listener.accept()
    with sock:
        try:
            answer(sock)
        except (EOFError, ConnectionError):
            pass  # the client is done


def answer(sock: socket.socket) -> None:
    kept: Bytes = np.empty(0, np.uint8)
    request = memoryview(bytearray(REQUEST.size))
    while True:
        receive(sock, request)
        what, count, size = REQUEST.unpack(request)
        if what == ECHO:
            _echo(sock, count, size)
        elif what == PUT:
            if kept.nbytes != size:
                kept = np.empty(size, np.uint8)
            receive(sock, kept.data)
            sock.sendall(ACK)
        elif what == GET:
            sock.sendall(kept.data)
        elif what == MESSAGES:
            buffer = memoryview(bytearray(size))
            for _ in range(count):
                receive(sock, buffer)
            sock.sendall(ACK)
        elif what == FORGET:
            kept = np.empty(0, np.uint8)
            sock.sendall(ACK)


def _echo(sock: socket.socket, count: int, size: int) -> None:
    buffer = memoryview(bytearray(size))
    for _ in range(count):
        got = sock.recv_into(buffer)
        while got < size:
            got += sock.recv_into(buffer[got:])
        sock.sendall(buffer)
