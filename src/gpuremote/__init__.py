"""Use the accelerators of a remote pool from Python as if they were attached here.

>>> import gpuremote
>>> with gpuremote.connect_sync("local://") as session:
...     x = session.devices[0].arange(6).reshape(2, 3)
...     (x @ x.T).get().tolist()
[[5, 14], [14, 50]]

Importing this opens nothing, starts nothing and changes nothing.
"""

from __future__ import annotations

from gpuremote._version import __version__
from gpuremote.client.aio import AsyncArray, AsyncDevice, AsyncEvent, AsyncSession, AsyncStream
from gpuremote.client.array import RemoteArray
from gpuremote.client.blocking import (
    BlockingArray,
    BlockingDevice,
    BlockingEvent,
    BlockingStream,
    Session,
)
from gpuremote.client.connect import connect, connect_sync
from gpuremote.client.stats import SessionStats
from gpuremote.errors import GpuRemoteError
from gpuremote.rpc.transports import Explanation

__all__ = [
    "AsyncArray",
    "AsyncDevice",
    "AsyncEvent",
    "AsyncSession",
    "AsyncStream",
    "BlockingArray",
    "BlockingDevice",
    "BlockingEvent",
    "BlockingStream",
    "Explanation",
    "GpuRemoteError",
    "RemoteArray",
    "Session",
    "SessionStats",
    "__version__",
    "connect",
    "connect_sync",
]
