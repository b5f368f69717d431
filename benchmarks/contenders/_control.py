"""A plain connection beside the one that is measured: addresses, and who is where.

For libraries that leave the exchange of these to their users; nothing of it is timed.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from benchmarks.contenders.sockets import receive
from benchmarks.machine import tcp_socket

__all__ = ["Control", "accept", "connect"]

_SIZE: Final = struct.Struct("<Q")


class Control:
    """Small values, one after the other, between two processes of this suite."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, value: Any) -> None:
        data = pickle.dumps(value)
        self._sock.sendall(_SIZE.pack(len(data)) + data)

    def receive(self) -> Any:
        """The next value.

        Raises
        ------
        EOFError
            The other side has gone.
        """
        head = bytearray(_SIZE.size)
        receive(self._sock, memoryview(head))
        data = bytearray(_SIZE.unpack(head)[0])
        receive(self._sock, memoryview(data))
        return pickle.loads(data)

    def wait(self) -> None:
        """Return when the other side has gone."""
        try:
            self.receive()
        except (EOFError, ConnectionError):
            pass

    def close(self) -> None:
        self._sock.close()


def connect(port: int) -> Control:
    sock = tcp_socket("")
    sock.connect(("127.0.0.1", port))
    return Control(sock)


def accept(ready: Callable[[int], None]) -> Control:
    """Wait for the one that connects."""
    with tcp_socket("") as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ready(listener.getsockname()[1])
        return Control(listener.accept()[0])
