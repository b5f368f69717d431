"""The other end of ``gpuremote bench``'s reference: a plain blocking socket.

``python -m gpuremote.cli._sockets`` prints its port and serves one connection: ``p`` and a length
take so many bytes and answer one, ``g`` and a length send so many.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

__all__ = ["REQUEST", "tune"]

REQUEST: Final = struct.Struct("<cQ")
LARGEST: Final = 256 << 20


def tune(sock: socket.socket) -> None:
    """As our own connections: no delay, and the congestion control of short ways."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # not loaded, or not allowed: the default stays
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        sock, _ = listener.accept()
    tune(sock)
    memory = memoryview(bytearray(LARGEST))
    memory[::4096] = bytes(len(memory[::4096]))
    with sock:
        while (request := sock.recv(REQUEST.size, socket.MSG_WAITALL)) != b"":
            kind, length = REQUEST.unpack(request)
            if kind == b"g":
                sock.sendall(memory[:length])
                continue
            done = 0
            while done < length:
                done += sock.recv_into(memory[done:length])
            sock.sendall(b"k")


if __name__ == "__main__":
    main()
