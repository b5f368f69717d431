"""A raw echo on uvloop: protocols, no streams, no futures where none is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import uvloop

from benchmarks.contenders.base import Contender, Peer, now
from benchmarks.machine import tcp_socket

__all__ = ["Awaited", "CalledBack", "serve"]


class _Client(asyncio.Protocol):
    """Counts the bytes of one echo; the next one is begun by ``arrived``."""

    def __init__(self) -> None:
        self.arrived: Callable[[], None] = lambda: None
        self.size = 0
        self._got = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got >= self.size:
            self._got = 0
            self.arrived()


class Awaited(Contender):
    """What a coroutine has to do: write, and await the answer."""

    kinds = frozenset({"round_trip"})

    def open(self) -> None:
        self._peer = Peer("uvloop_echo", self.setup.congestion)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._client = self._runner.run(self._connect())

    async def _connect(self) -> _Client:
        sock = tcp_socket(self.setup.congestion)
        sock.connect(("127.0.0.1", self._peer.port))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(_Client, sock=sock)
        return client

    def close(self) -> None:
        self._client.transport.abort()
        self._runner.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        return self._runner.run(self._run(size, count))

    async def _run(self, size: int, count: int) -> list[int]:
        loop = asyncio.get_running_loop()
        client, data = self._client, bytes(size)
        client.size = size
        times = []
        for _ in range(count):
            begin = now()
            future: asyncio.Future[None] = loop.create_future()
            client.arrived = lambda future=future: future.set_result(None)  # type: ignore[misc]
            client.transport.write(data)
            await future
            times.append(now() - begin)
        return times


class CalledBack(Awaited):
    """The least that there is: the callback that receives also sends."""

    async def _run(self, size: int, count: int) -> list[int]:
        client, data = self._client, bytes(size)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        times: list[int] = []
        write = client.transport.write
        begin = 0

        def arrived() -> None:
            nonlocal begin
            times.append(now() - begin)
            if len(times) < count:
                begin = now()
                write(data)
            else:
                done.set_result(None)

        client.size = size
        client.arrived = arrived
        begin = now()
        write(data)
        await done
        return times


class _Server(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def serve(congestion: str, ready: Callable[[int], None]) -> None:
    async def listen() -> None:
        sock = tcp_socket(congestion)
        sock.bind(("127.0.0.1", 0))
        server = await asyncio.get_running_loop().create_server(_Server, sock=sock)
        ready(sock.getsockname()[1])
        await server.serve_forever()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(listen())
