"""Between the daemon and its workers: msgpack over a Unix SEQPACKET pair, sockets attached."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from gpuremote.errors import ProtocolError
from gpuremote.wire.frames import pack_info, unpack_info

__all__ = [
    "pair",
    "receive",
    "receive_file",
    "receive_files",
    "send",
    "send_file",
    "send_files",
]

_MAX: Final = 128 * 1024


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends; message boundaries are kept."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(
    channel: socket.socket, request: dict[str, Any], sock: socket.socket | None = None
) -> None:
    """Send a message, and with it a socket (the sender keeps its own descriptor)."""
    send_file(channel, request, -1 if sock is None else sock.fileno())


def send_file(channel: socket.socket, request: dict[str, Any], descriptor: int = -1) -> None:
    """Send a message, and with it any open file (the sender keeps its own descriptor)."""
    send_files(channel, request, [descriptor] if descriptor >= 0 else [])


def send_files(channel: socket.socket, request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Send a message, and with it open files, four at most (the sender keeps its own)."""
    socket.send_fds(channel, [pack_info(request)], descriptors)


def receive(channel: socket.socket) -> tuple[dict[str, Any], socket.socket | None]:
    """The next message and the socket that came with it.

    Raises
    ------
    EOFError
        The other end is gone.
    """
    request, descriptor = receive_file(channel)
    return request, None if descriptor < 0 else socket.socket(fileno=descriptor)


def receive_file(channel: socket.socket) -> tuple[dict[str, Any], int]:
    """The next message, and the descriptor that came with it (-1: none), the caller's from then on.

    Raises
    ------
    EOFError
        The other end is gone.
    """
    request, descriptors = receive_files(channel)
    for extra in descriptors[1:]:
        os.close(extra)
    return request, descriptors[0] if descriptors else -1


def receive_files(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message, and the descriptors that came with it, the caller's from then on.

    Raises
    ------
    EOFError
        The other end is gone.
    """
    data, descriptors, _, _ = socket.recv_fds(channel, _MAX, 4, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            raise EOFError("the other end of the control channel is gone")
        request = unpack_info(data, _MAX)
        if not isinstance(request, dict):
            raise ProtocolError("a control message that is not a map")
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return request, descriptors
