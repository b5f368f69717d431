"""Connected RDMA connections, both ends in this process."""

from __future__ import annotations

import socket

from gpuremote import _clock
from gpuremote.transport.rdma import Options, RdmaConnection, default_provider
from gpuremote.transport.rdma.setup import bring_up
from gpuremote.transport.setup import Setup
from gpuremote.transport.tcp import TcpConnection, open_tcp
from gpuremote.transport.verbs.base import VerbsProvider
from tests.rdma.devices import in_machine
from tests.transport.ends import both

SERVER = "10.77.0.1"
"""The address that the machine of ``machine.py`` gives to its first device."""
LOOPBACK = "127.0.0.1"
SECONDS = 60.0


def host() -> str:
    """Where the first connections go to: to a device's address, if it is known."""
    return SERVER if in_machine() else LOOPBACK


def first_pair(over: str, *, blocking: bool) -> tuple[TcpConnection, TcpConnection]:
    """The connections that others are brought up over."""
    with socket.create_server((over, 0)) as listener:
        here = open_tcp(over, listener.getsockname()[1], timeout=10)
        there, _ = listener.accept()
    return TcpConnection(here, blocking=blocking), TcpConnection(there, blocking=blocking)


def connected(
    *,
    blocking: bool,
    options: Options | None = None,
    over: str = "",
    provider: VerbsProvider | None = None,
) -> tuple[RdmaConnection, RdmaConnection]:
    """Two ends of one connection."""
    firsts = first_pair(over or host(), blocking=blocking)
    wanted = options or Options(piece=1 << 20)
    used = provider or default_provider()
    deadline = _clock.now() + SECONDS
    setups = [Setup(first, blocking=blocking, deadline=deadline) for first in firsts]

    def end(number: int) -> RdmaConnection:
        path = bring_up(setups[number], used, wanted, client=number == 0)
        theirs = setups[number].conclude("ready")
        assert theirs == "ready"
        return path.connection()

    found = both(lambda: end(0), lambda: end(1))
    here, there = found
    if isinstance(here, RdmaConnection) and isinstance(there, RdmaConnection):
        return here, there
    for one, first in zip(found, firsts, strict=True):
        if isinstance(one, RdmaConnection):
            one.abort()
        first.abort()
    raise AssertionError(found)
