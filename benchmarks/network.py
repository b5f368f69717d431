"""One congestion control for everybody: a network of the run's own, and what sockets say.

Most libraries do not let their congestion control be chosen, so it is the system's default that
has to be the same. It belongs to the network namespace: a run in one of its own sets it for its
processes alone, and leaves nothing to be put back, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["force_congestion", "observed_congestion", "private_network"]

_DEFAULT: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET
_SET_FLAGS: Final = 0x8914  # SIOCSIFFLAGS
_UP: Final = 0x1 | 0x40  # IFF_UP | IFF_RUNNING
_PIDFD_GETFD: Final = 438


@contextlib.contextmanager
def private_network(congestion: str) -> Iterator[str]:
    """Children that this thread starts within have a loopback of their own.

    Parameters
    ----------
    congestion : str
        Its default TCP congestion control; "" changes nothing at all.

    Yields
    ------
    str
        "" if that is so; otherwise why not, and the system's network and default are used.
    """
    if not congestion:
        yield "not asked for"
        return
    with contextlib.ExitStack() as stack:
        reason = ""
        try:
            before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            stack.callback(os.close, before)
            _check(_libc().unshare(_NEW_NETWORK), "a network namespace needs CAP_SYS_ADMIN")
            stack.callback(_return_to, before)
            with socket.socket() as sock:
                fcntl.ioctl(sock, _SET_FLAGS, struct.pack("16sH14x", b"lo", _UP))
            _DEFAULT.write_text(congestion)
        except OSError as error:
            # Half of it would be worse than none: back to where everything else is.
            stack.close()
            reason = f"{error.strerror or error}"
        yield reason


def _return_to(namespace: int) -> None:
    _check(_libc().setns(namespace, _NEW_NETWORK), "the former network can't be entered")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what} ({os.strerror(number)})")


def observed_congestion(processes: Iterable[int]) -> list[str]:
    """Algorithms of the connected TCP sockets of these processes, sorted; each asked itself.

    Empty where they have none, or where the system does not allow to ask.
    """
    found = set()
    for process in processes:
        for sock in _tcp_sockets(process):
            found.add(_algorithm(sock))
    return sorted(found)


def force_congestion(process: int, algorithm: str) -> int:
    """Set the connected TCP sockets of a process; how many there were.

    Raises
    ------
    OSError
        The algorithm can't be set.
    """
    count = 0
    for sock in _tcp_sockets(process):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, algorithm.encode())
        count += 1
    return count


def _algorithm(sock: socket.socket) -> str:
    name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.split(b"\0", 1)[0].decode("ascii")


def _tcp_sockets(process: int) -> Iterator[socket.socket]:
    """Each connected one as a second descriptor of ours, open until the next is asked for."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        handle = os.pidfd_open(process)
        stack.callback(os.close, handle)
        for name in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{process}/fd/{name}").startswith("socket:"):
                    continue
                copy = _libc().syscall(_PIDFD_GETFD, handle, int(name), 0)
                if copy < 0:
                    continue
                with socket.socket(fileno=copy) as sock:
                    if _connected(sock):
                        yield sock


def _connected(sock: socket.socket) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return False
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
