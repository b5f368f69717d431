"""What ``gpuremote bench`` compares with: plain sockets, both ends.

``python -m gpuremote.cli._sockets KIND`` is the other end. It prints its port and serves one
connection:

``blocking SIZE``
    ``p`` and a length take so many bytes and answer one, ``g`` and a length send so many (at
    most ``SIZE``).
``echo``
    Sends back what arrives, on uvloop if that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final, cast

import numpy as np

from gpuremote.errors import InternalError
from gpuremote.server.daemon import new_loop
from gpuremote.transport import congestion

__all__ = ["Blocking", "Echo"]

START_TIMEOUT: Final = 30.0
REQUEST: Final = struct.Struct("<cQ")


class _Reference:
    """A connection to another process of ours.

    Attributes
    ----------
    pid : int
        The other process.
    congestion : str
        Congestion control of the connection.
    """

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpuremote.cli._sockets", *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt is for the command alone
        )
        self.pid = self._process.pid
        try:
            assert self._process.stdout is not None
            with self._process.stdout as said:
                port = said.readline().strip()
            if not port.isdigit():
                raise InternalError("the other end of the plain sockets did not start")
            self._socket = socket.create_connection(("127.0.0.1", int(port)), START_TIMEOUT)
        except BaseException:
            self._end(0)
            raise
        self._socket.settimeout(None)
        _tune(self._socket)
        self.congestion = congestion.current(self._socket)

    def close(self) -> None:
        """End the connection, and with it the other process."""
        self._socket.close()
        self._end(10)

    def _end(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Blocking(_Reference):
    """Blocking sockets: what the kernel gives without a library.

    Parameters
    ----------
    largest : int
        Bytes that a transfer may have.
    """

    def __init__(self, largest: int) -> None:
        super().__init__("blocking", str(largest))

    def put(self, data: memoryview) -> None:
        self._socket.sendall(REQUEST.pack(b"p", data.nbytes))
        self._socket.sendall(data)
        self._socket.recv(1)

    def get(self, out: memoryview) -> None:
        self._socket.sendall(REQUEST.pack(b"g", out.nbytes))
        done = 0
        while done < out.nbytes:
            count = self._socket.recv_into(out[done:])
            if not count:
                raise InternalError("the other end of the plain sockets has gone")
            done += count


class Echo(_Reference):
    """A raw echo on an event loop.

    Attributes
    ----------
    loop : str
        What it runs on.
    """

    def __init__(self) -> None:
        super().__init__("echo")
        self._runner = asyncio.Runner(loop_factory=new_loop())
        self.loop = type(self._runner.get_loop()).__module__.partition(".")[0]
        self._client = self._runner.run(self._connect())

    def close(self) -> None:
        self._client.transport.abort()
        self._runner.close()
        super().close()

    def round_trips(self, nbytes: int, count: int) -> list[float]:
        """Seconds of each of ``count`` round trips: the callback that receives also sends."""
        return self._runner.run(self._called_back(nbytes, count))

    def awaited(self, nbytes: int, count: int) -> list[float]:
        """The same as a coroutine has it, which awaits a future each time."""
        return self._runner.run(self._awaited(nbytes, count))

    async def _connect(self) -> _EchoClient:
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        # The loop gets a descriptor of its own: this object closes the socket.
        _, client = await loop.create_connection(_EchoClient, sock=self._socket.dup())
        return client

    async def _called_back(self, nbytes: int, count: int) -> list[float]:
        client, data, clock = self._client, bytes(nbytes), time.perf_counter
        write = client.transport.write
        client.over = asyncio.get_running_loop().create_future()
        times: list[float] = []
        began = 0.0

        def arrived() -> None:
            nonlocal began
            times.append(clock() - began)
            if len(times) == count:
                client.over.set_result(None)
                return
            began = clock()
            write(data)

        client.expect(nbytes, arrived)
        began = clock()
        write(data)
        await client.over
        return times

    async def _awaited(self, nbytes: int, count: int) -> list[float]:
        client, data, clock = self._client, bytes(nbytes), time.perf_counter
        write, new_future = client.transport.write, asyncio.get_running_loop().create_future
        client.expect(nbytes, lambda: client.over.set_result(None))
        times = []
        for _ in range(count):
            began = clock()
            client.over = new_future()
            write(data)
            await client.over
            times.append(clock() - began)
        return times


class _EchoClient(asyncio.Protocol):
    """Calls back whenever a whole echo has arrived."""

    over: asyncio.Future[None]

    def expect(self, nbytes: int, arrived: Callable[[], None]) -> None:
        self._nbytes, self._arrived = nbytes, arrived
        self._got = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._got += len(data)
        if self._got >= self._nbytes:
            self._got = 0
            self._arrived()

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "over") and not self.over.done():
            self.over.set_exception(InternalError("the other end of the echo has gone"))


class _EchoServer(asyncio.Protocol):
    def __init__(self, over: asyncio.Future[None]) -> None:
        self._over = over

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over.set_result(None)


def _tune(sock: socket.socket) -> None:
    """As our own connections: no delay, and the congestion control of short ways."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # not loaded, or not allowed: the default stays
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _serve_blocking(sock: socket.socket, largest: int) -> None:
    memory = np.ones(largest, np.uint8).data  # touched, and in huge pages if it is large
    while request := sock.recv(REQUEST.size, socket.MSG_WAITALL):
        kind, length = REQUEST.unpack(request)
        if kind == b"g":
            sock.sendall(memory[:length])
            continue
        done = 0
        while done < length:
            count = sock.recv_into(memory[done:length])
            if not count:
                return
            done += count
        sock.sendall(b"k")


async def _serve_echo(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    sock.setblocking(False)
    await loop.connect_accepted_socket(lambda: _EchoServer(over), sock)
    await over


def _main(arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        listener.settimeout(START_TIMEOUT)  # whoever started this may have gone
        sock, _ = listener.accept()
    sock.settimeout(None)
    _tune(sock)
    with contextlib.suppress(ConnectionError):  # the command was stopped in between
        if arguments[0] == "echo":
            with asyncio.Runner(loop_factory=new_loop()) as runner:
                runner.run(_serve_echo(sock))
        else:
            with sock:
                _serve_blocking(sock, int(arguments[1]))


if __name__ == "__main__":
    _main(sys.argv[1:])
