"""Which device arrays are made on: the one in use, else the first of the default session."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from gpuremote.client.blocking import BlockingDevice, Session
from gpuremote.client.connect import connect_sync
from gpuremote.errors import DeviceMismatch, GpuRemoteError, UnsupportedOp

__all__ = ["chosen", "close", "current", "device_of", "is_default", "session", "use", "using"]

_lock = threading.RLock()
_default: Session | None = None
_in_use: ContextVar[BlockingDevice | None] = ContextVar("gpuremote_cupy_device", default=None)


def session() -> Session:
    """The default session: opened on first use, by ``GPUREMOTE_URL``, else ``local://``."""
    global _default
    with _lock:
        if _default is None or _default.closed:
            _default = connect_sync()
        return _default


def use(target: str | Session | None = None) -> Session:
    """Make another session the default: an open one, or one that a URL names.

    Arrays of the one before live on, for as long as it does.
    """
    global _default
    opened = target if isinstance(target, Session) else connect_sync(target)
    with _lock:
        _default = opened
    return opened


def close() -> None:
    """Close the default session; the next array opens another."""
    global _default
    with _lock:
        ending, _default = _default, None
    if ending is not None:
        ending.close(raise_failures=False)


def current() -> BlockingDevice:
    """The device in use by this thread or task; by default the first of the default session."""
    found = _in_use.get()
    if found is not None:
        return found
    default = _default  # read once: another thread may close it
    return (session() if default is None or default.closed else default).devices[0]


def chosen() -> BlockingDevice | None:
    """The device that the program has put in use, if it has."""
    return _in_use.get()


def is_default(device: BlockingDevice) -> bool:
    """Whether new arrays would be made there."""
    found = _in_use.get()
    if found is not None:
        return device is found
    return _default is not None and device is _default.devices[0]


def device_of(device: Any) -> BlockingDevice:
    """The device that an argument names: a device, a number, or None for the one in use.

    Raises
    ------
    DeviceMismatch
        There is none of that number.
    UnsupportedOp
        It is a device of an asyncio session, or none at all.
    """
    if device is None:
        return current()
    if isinstance(device, int):
        devices = session().devices
        if not 0 <= device < len(devices):
            raise DeviceMismatch(f"device {device} of {len(devices)}")
        return devices[device]
    found = getattr(device, "_remote", device)
    if isinstance(found, BlockingDevice):
        return found
    if isinstance(found, str):
        for known in session().devices:
            if known.name == found:
                return known
    raise UnsupportedOp(f"{device!r} is no device of a blocking session")


@contextlib.contextmanager
def using(device: Any) -> Iterator[BlockingDevice]:
    """Make arrays on this device inside the block."""
    found = device_of(device)
    token = _in_use.set(found)
    try:
        yield found
    finally:
        _in_use.reset(token)


@atexit.register
def _close_at_exit() -> None:
    # The server ends with this process in any case.
    with contextlib.suppress(GpuRemoteError, OSError):
        close()


def _forget_in_child() -> None:
    """After a fork the session belongs to the parent; the child opens its own."""
    global _default, _lock
    _lock = threading.RLock()
    _default = None
    _in_use.set(None)


os.register_at_fork(after_in_child=_forget_in_child)
