"""Opening and setting up stream sockets. Private; ``tcp`` offers what others need."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from gpuremote import _clock
from gpuremote.errors import ConnectionFailed, ConnectionLost
from gpuremote.transport import congestion

__all__ = [
    "BLOCKING_WAIT",
    "addresses",
    "broken",
    "drain",
    "flush_until",
    "join_address",
    "near",
    "open_tcp",
    "processors",
    "reset",
    "same_host",
    "set_blocking",
    "tune",
]

BLOCKING_WAIT: Final = 1.0
"""Seconds that a plain blocking receive waits."""
NEAR: Final = 0.001
"""Seconds of round trip of a short way."""

_OPTIONS: Final = [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 30_000),
        ("TCP_NOTSENT_LOWAT", 2 << 20),
    )
    if hasattr(socket, name)
]


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def addresses(sock: socket.socket) -> tuple[str, str]:
    """This side's and the other side's address, for people.

    Raises
    ------
    ConnectionLost
        The socket is not connected (any more).
    """
    try:
        return _text(sock.getsockname()), _text(sock.getpeername())
    except OSError as error:
        raise ConnectionLost(f"the socket is not connected ({error.strerror})") from error


def _text(address: object) -> str:
    if isinstance(address, tuple):
        return join_address(str(address[0]), int(address[1]))
    if isinstance(address, str | bytes) and address:
        return f"unix:{os.fsdecode(address)}"
    return "unix"


def same_host(sock: socket.socket) -> bool:
    """Whether both ends of a connected socket are on one host, as far as their addresses tell."""
    return sock.family not in (socket.AF_INET, socket.AF_INET6) or congestion.same_host(sock)


def near(sock: socket.socket) -> bool:
    """Whether the way between both ends of a connected socket is short."""
    if same_host(sock):
        return True
    seconds = congestion.round_trip(sock)
    return seconds is not None and seconds < NEAR


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_blocking(sock: socket.socket, seconds: float) -> None:
    """Have a receive block for that many whole seconds at most; with 0 nothing blocks."""
    if not seconds:
        sock.setblocking(False)
        return
    sock.settimeout(None)
    timeout = struct.pack("@ll", int(seconds), 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)


def tune(sock: socket.socket) -> str:
    """Set a connected socket up for this library. Never fails.

    No Nagle, keepalive, 30 s until unacknowledged data counts as a loss, congestion control
    by distance. On a slow way no more than 2 MiB wait in the kernel unsent, as every message
    has to wait for them. Buffer sizes stay: setting them turns the kernel's own tuning off.

    Returns
    -------
    str
        What was chosen and why, for people.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "Unix socket"
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for level, option, value in _OPTIONS:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
    algorithm, why = congestion.choose(sock)
    return f"congestion control {algorithm or 'unknown'}: {why}"


def broken(doing: str, error: OSError, peer: str) -> ConnectionLost:
    """What to raise for an error of a system call on an open connection."""
    text = error.strerror or error
    return ConnectionLost(f"the connection broke while {doing} ({text})", peer=peer)


def flush_until(flush: Callable[[], bool], sock: socket.socket, deadline: float) -> bool:
    """Repeat ``flush`` as the socket takes more; whether everything went out."""
    poll = select.poll()
    try:
        poll.register(sock, select.POLLOUT)
        while not flush():
            left = deadline - _clock.now()
            if left <= 0 or not poll.poll(left * 1000):
                return False
    except (OSError, ValueError):
        return False
    return True


def reset(sock: socket.socket) -> None:
    """End a connection at once, both ways. The descriptor stays."""
    with contextlib.suppress(OSError):
        # Nobody is to wait for what the kernel still holds: reset instead of FIN.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    with contextlib.suppress(OSError):
        # Wakes a thread that waits in a receive; close() alone would not.
        sock.shutdown(socket.SHUT_RDWR)


def drain(sock: socket.socket, buffer: memoryview, deadline: float) -> None:
    """Drop what came and was not read, as long as the peer lacks some of our bytes.

    Closing a socket with unread input resets it, which loses what the peer's kernel has not
    taken yet.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while poll.poll(0) and congestion.unacknowledged(sock) and _clock.now() < deadline:
        if not sock.recv_into(buffer, 0, socket.MSG_DONTWAIT):
            return
        poll.poll(1)


def open_tcp(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to a TCP address; every address that the name stands for is tried.

    Parameters
    ----------
    host : str
        Name or address, IPv4 or IPv6 (without brackets).
    port : int
    timeout : float
        Seconds for all of it (name resolution can't be interrupted).

    Returns
    -------
    socket.socket
        Connected, with a timeout set; not tuned.

    Raises
    ------
    ConnectionFailed
        No such host, refused, unreachable, or no answer in time.
    """
    deadline = _clock.now() + timeout
    peer = join_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        text = getattr(error, "strerror", None) or error
        raise ConnectionFailed(
            f"can't find the host {host!r} ({text}); is the name right?", peer=peer
        ) from error
    failures = []
    cause: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(found):
        left = deadline - _clock.now()
        if left <= 0:
            failures.append(f"no answer within {timeout:g} s")
            break
        try:
            # An address that swallows packets leaves time for those behind it.
            return _connect(family, kind, protocol, address, left / (len(found) - number))
        except OSError as error:
            cause = error
            late = isinstance(error, TimeoutError)
            text = f"no answer within {timeout:g} s" if late else error.strerror or str(error)
            failures.append(f"{address[0]}: {text}" if len(found) > 1 else text)
    raise ConnectionFailed(
        f"can't connect: {'; '.join(failures)}. Is a server running there "
        "(`gpuremote serve`), and does a firewall let this port through?",
        peer=peer,
    ) from cause


def _connect(
    family: int, kind: int, protocol: int, address: tuple[Any, ...], timeout: float
) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(timeout)
        congestion.prepare(sock)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock
