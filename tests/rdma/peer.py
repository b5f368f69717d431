"""A peer in a process of its own: takes a payload of the size it is told, again and again.

Usage: ``python -m tests.rdma.peer PORT``
"""

from __future__ import annotations

import sys

from gpuremote import _clock
from gpuremote.transport.base import Incoming
from gpuremote.transport.rdma import Options, default_provider
from gpuremote.transport.rdma.setup import bring_up
from gpuremote.transport.setup import Setup
from gpuremote.transport.tcp import TcpConnection, open_tcp
from tests.rdma.ends import SECONDS, host


def main() -> None:
    first = TcpConnection(open_tcp(host(), int(sys.argv[1]), timeout=10), blocking=True)
    setup = Setup(first, blocking=True, deadline=_clock.now() + SECONDS)
    path = bring_up(setup, default_provider(), Options(piece=1 << 20), client=True)
    setup.conclude("ready")
    connection = path.connection()
    taken: list[Incoming] = []
    while True:
        incoming = connection.receive(1.0)
        if incoming is not None:
            taken.append(incoming)
            incoming.into([memoryview(bytearray(size)) for size in incoming.sizes])
            connection.send(b"begun")


if __name__ == "__main__":
    main()
