"""Shared memory by hand: a memfd that both sides have mapped, and a message on a Unix socket.

What same-host memory can do at all: a put is one copy into pages that are there, a get one copy
out of them, either with a message there and back.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
from collections.abc import Callable
from typing import Final

import numpy as np

from benchmarks.contenders._requests import ACK, ECHO, GET, PUT, REQUEST
from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now
from benchmarks.contenders.sockets import receive
from benchmarks.workloads import MIB

__all__ = ["Memfd", "serve"]

ARENA: Final = 256 * MIB


class Memfd(Contender):
    """``numpy.copyto`` and a message."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        self._peer = Peer("memfd", self.setup.congestion)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(_name(self._peer.pid))
        descriptor = os.memfd_create("gpuremote-benchmarks", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, ARENA)
        self._mapping = mmap.mmap(descriptor, ARENA)
        self._arena = np.frombuffer(self._mapping, np.uint8)
        self._arena[:] = 0  # touched
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._sock.sendmsg([b"m"], rights)
        os.close(descriptor)
        self._answer = memoryview(bytearray(len(ACK)))
        receive(self._sock, self._answer)

    def close(self) -> None:
        self._sock.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        sock, data = self._sock, bytes(size)
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
        target = self._arena[: source.nbytes]
        times = []
        for _ in range(count):
            begin = now()
            np.copyto(target, source)
            self._tell(PUT, source.nbytes)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        source = self._arena[: out.nbytes]
        times = []
        for _ in range(count):
            begin = now()
            self._tell(GET, out.nbytes)
            np.copyto(out, source)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        """The mapping stays; that it is warm is the point."""

    def _tell(self, what: int, size: int) -> None:
        self._sock.sendall(REQUEST.pack(what, 1, size))
        receive(self._sock, self._answer)


def _name(process: int) -> str:
    """An address without a file, gone with its socket."""
    return f"\0gpuremote-benchmarks-{process}"


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(_name(os.getpid()))
        listener.listen()
        ready(0)
        sock, _ = listener.accept()
    with sock:
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        with mmap.mmap(descriptors[0], ARENA) as mapping:
            os.close(descriptors[0])
            touched = mapping[:: mmap.PAGESIZE]  # the pages of this side's mapping
            assert len(touched) == ARENA // mmap.PAGESIZE
            sock.sendall(ACK)
            try:
                _answer(sock)
            except (EOFError, ConnectionError):
                pass  # the client is done


def _answer(sock: socket.socket) -> None:
    request = memoryview(bytearray(REQUEST.size))
    while True:
        receive(sock, request)
        what, count, size = REQUEST.unpack(request)
        if what != ECHO:
            sock.sendall(ACK)
            continue
        buffer = memoryview(bytearray(size))
        for _ in range(count):
            receive(sock, buffer)
            sock.sendall(buffer)
