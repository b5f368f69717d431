"""asyncio's streams on its own loop, as a program would use them that knows them well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import process_time_ns
from typing import Final

import numpy as np

from benchmarks.contenders._requests import ACK, ECHO, FORGET, GET, MESSAGES, PUT, REQUEST
from benchmarks.contenders.base import Bytes, Contender, Ops, Peer, now
from benchmarks.machine import tcp_socket
from benchmarks.workloads import MIB

__all__ = ["Streams", "serve"]

STEP: Final = MIB
LIMIT: Final = 4 * MIB
"""Bytes that a reader holds before it stops the sender (the default, 64 KiB, is slower)."""


class Streams(Contender):
    """``open_connection``, ``write``, ``drain`` and ``read``."""

    def open(self) -> None:
        self._peer = Peer("streams", self.setup.congestion)
        self._runner = asyncio.Runner()
        self._runner.run(self._connect())

    async def _connect(self) -> None:
        sock = tcp_socket(self.setup.congestion)
        sock.connect(("127.0.0.1", self._peer.port))
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=LIMIT)

    def close(self) -> None:
        self._runner.run(self._disconnect())
        self._runner.close()
        self._peer.close()

    async def _disconnect(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        return self._runner.run(self._round_trips(size, count))

    async def _round_trips(self, size: int, count: int) -> list[int]:
        reader, writer, data = self._reader, self._writer, bytes(size)
        writer.write(REQUEST.pack(ECHO, count, size))
        times = []
        for _ in range(count):
            begin = now()
            writer.write(data)
            await reader.readexactly(size)
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._runner.run(self._puts(source, count))

    async def _puts(self, source: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._writer.write(REQUEST.pack(PUT, 1, source.nbytes))
            await send(self._writer, source.data)
            await self._reader.readexactly(len(ACK))
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._runner.run(self._gets(out, count))

    async def _gets(self, out: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._writer.write(REQUEST.pack(GET, 1, out.nbytes))
            await receive(self._reader, out.data)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        async def ask() -> None:
            self._writer.write(REQUEST.pack(FORGET, 0, 0))
            await self._reader.readexactly(len(ACK))

        self._runner.run(ask())

    def ops(self, size: int, count: int) -> Ops:
        return self._runner.run(self._ops(size, count))

    async def _ops(self, size: int, count: int) -> Ops:
        writer, data = self._writer, bytes(size)
        cpu, begin = process_time_ns(), now()
        writer.write(REQUEST.pack(MESSAGES, count, size))
        for _ in range(count):
            writer.write(data)
            await writer.drain()
        issued, cpu = now(), process_time_ns() - cpu
        await self._reader.readexactly(len(ACK))
        return Ops(issued - begin, now() - begin, cpu, 1)


async def send(writer: asyncio.StreamWriter, view: memoryview) -> None:
    """Write ``view`` in pieces: before Python 3.12 the transport copies what it can't send."""
    for begin in range(0, view.nbytes, STEP):
        writer.write(view[begin : begin + STEP])
        await writer.drain()


async def receive(reader: asyncio.StreamReader, view: memoryview) -> None:
    """Fill ``view``; twice as fast as one ``readexactly`` and a copy."""
    got = 0
    while got < view.nbytes:
        data = await reader.read(min(STEP, view.nbytes - got))
        if not data:
            raise EOFError("the other side has gone")
        view[got : got + len(data)] = data
        got += len(data)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    kept: Bytes = np.empty(0, np.uint8)
    while True:
        try:
            what, count, size = REQUEST.unpack(await reader.readexactly(REQUEST.size))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        if what == ECHO:
            for _ in range(count):
                writer.write(await reader.readexactly(size))
        elif what == PUT:
            if kept.nbytes != size:
                kept = np.empty(size, np.uint8)
            await receive(reader, kept.data)
            writer.write(ACK)
        elif what == GET:
            await send(writer, kept.data)
        elif what == MESSAGES:
            for _ in range(count):
                await reader.readexactly(size)
            writer.write(ACK)
        elif what == FORGET:
            kept = np.empty(0, np.uint8)
            writer.write(ACK)


def serve(congestion: str, ready: Callable[[int], None]) -> None:
    async def listen() -> None:
        sock = tcp_socket(congestion)
        sock.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(_answer, sock=sock, limit=LIMIT)
        ready(sock.getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())
