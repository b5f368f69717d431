"""Congestion control of a TCP socket: which algorithm, and why.

Set per socket, without privilege. ``bbr`` paces: right for long ways with loss, and a cost of
nearly half of the throughput (and of the CPU per byte) inside one host or one rack, where
``reno`` just sends.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import sys
import termios
from pathlib import Path
from typing import Final

__all__ = ["available", "choose", "current", "prepare", "round_trip", "same_host", "unacknowledged"]

SHORT_WAY: Final = 0.005
"""Seconds of round trip below which both ends are taken to be in one network."""

_PACES: Final = "bbr"
_TCP_CONGESTION: Final[int | None] = getattr(socket, "TCP_CONGESTION", None)
_TCP_INFO: Final[int | None] = getattr(socket, "TCP_INFO", None)
# Offsets in Linux's struct tcp_info: tcpi_rtt (u32, microseconds), tcpi_last_data_recv (u32,
# milliseconds).
_RTT: Final = struct.Struct("=68xI")
_RECEIVED: Final = struct.Struct("=52xI")
_TICK: Final = 4e-3  # seconds of most kernels' clock, in which that is measured


def available() -> list[str]:
    """Algorithms that this system has loaded; empty where it does not say."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    except OSError:
        return []


def round_trip(sock: socket.socket) -> float | None:
    """Smoothed round trip in seconds as the kernel has it; None where it can't be had."""
    microseconds = _told(sock, _RTT)
    return microseconds / 1e6 if microseconds else None


def since_received(sock: socket.socket) -> float:
    """Seconds since the latest bytes came, read or not, at least; 0.0 where unknown."""
    return max(0.0, (_told(sock, _RECEIVED) or 0) / 1e3 - _TICK)


def _told(sock: socket.socket, place: struct.Struct) -> int | None:
    """A number of the kernel's ``tcp_info``; None where it can't be had."""
    if _TCP_INFO is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, place.size)
    except OSError:
        return None
    return int(place.unpack(info)[0]) if len(info) == place.size else None


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that the kernel holds because the peer's has not got them; 0 where unknown."""
    if sys.platform != "linux":
        return 0
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    except (OSError, ValueError):
        return 0
    return int.from_bytes(answer, sys.byteorder)


def current(sock: socket.socket) -> str:
    """The socket's algorithm, or "" where it can't be had."""
    if _TCP_CONGESTION is None:
        return ""
    try:
        name = sock.getsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, 16)
    except OSError:
        return ""
    return name.split(b"\0", 1)[0].decode("ascii", "replace")


def prepare(sock: socket.socket) -> None:
    """Before a socket is connected, or listens: have its connections begin without ``bbr``.

    Where that is the system's default, a connection is paced from its first moment on, and stays
    so whatever :func:`choose` sets later: ``bbr`` has the kernel pace the socket as it takes it on
    (``bbr_init`` in Linux' net/ipv4/tcp_bbr.c), and nothing takes that back. Never fails.
    """
    if _TCP_CONGESTION is not None and current(sock).startswith(_PACES):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, b"reno")


def choose(sock: socket.socket) -> tuple[str, str]:
    """Set the algorithm that suits the way to the peer.

    Never fails: where nothing can be set, the system's default stays.

    Parameters
    ----------
    sock : socket.socket
        A connected TCP socket.

    Returns
    -------
    algorithm : str
        What the socket uses now; "" if unknown.
    reason : str
        Why, as a phrase for people.
    """
    before = current(sock)
    if _TCP_CONGESTION is None or not before:
        return before, "the system's default (this platform offers no choice)"
    wanted, why = _wanted(sock)
    if wanted == before:
        return before, why
    try:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_CONGESTION, wanted.encode())
    except OSError as error:
        return before, f"the system's default ({wanted} can't be set: {error.strerror}; {why})"
    return wanted, why


def _wanted(sock: socket.socket) -> tuple[str, str]:
    if same_host(sock):
        return "reno", "same host"
    rtt = round_trip(sock)
    if rtt is None:
        return "reno", "round trip unknown, taken as short"
    text = f"round trip {rtt * 1e3:.2f} ms"
    return ("reno", f"{text}, short") if rtt < SHORT_WAY else ("bbr", f"{text}, long")


def same_host(sock: socket.socket) -> bool:
    """Whether both ends of a connected TCP socket have the same address."""
    try:
        here, there = sock.getsockname(), sock.getpeername()
    except OSError:
        return False
    if not isinstance(here, tuple) or not isinstance(there, tuple):
        return False
    return bool(here[0] == there[0])
