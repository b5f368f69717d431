"""From a URL to a session."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

from gpuremote.client import local
from gpuremote.client.aio import AsyncSession, Connecting
from gpuremote.client.blocking import Session
from gpuremote.client.link import Link
from gpuremote.client.session import make_core, make_link
from gpuremote.config import Settings, Target, parse_url
from gpuremote.errors import InvalidURL

__all__ = ["connect", "connect_sync"]


def connect(url: str | None = None) -> Connecting:
    """Open a session on a remote device, for asyncio.

    Parameters
    ----------
    url : str, optional
        ``gpu://host:port`` (a device server) or ``local://`` (a server on this machine, started
        as a child and ended with the last session). Options: ``transport``, ``require``,
        ``connect_timeout``, ``grace``, ``memory``, ``lanes``, ``compression``, ``dedupe``;
        with ``gpu://`` also ``cafile``, ``tls``, ``certfile``, ``keyfile``. Default:
        ``GPUREMOTE_URL``, else ``local://``.

    Returns
    -------
    Connecting
        ``async with connect(...) as session:`` or ``session = await connect(...)``.

    Raises
    ------
    InvalidURL
        At once.
    ConfigError, ConnectionFailed, HandshakeTimeout, AuthenticationFailed, ...
        When it is entered or awaited.
    """
    target = _target(url)

    async def opening() -> AsyncSession:
        link, on_close = await _link_async(target)
        try:
            return await AsyncSession(link, make_core(link), on_close)._open()
        except BaseException:
            if on_close is not None:
                asyncio.get_running_loop().run_in_executor(None, on_close)
            raise

    return Connecting(opening)


def connect_sync(url: str | None = None) -> Session:
    """Open a session on a remote device, for code that blocks; as :func:`connect`."""
    link, on_close = _link(_target(url))
    try:
        return Session(link, make_core(link), on_close)
    except BaseException:
        if on_close is not None:
            on_close()
        raise


def _target(url: str | None) -> Target:
    target = parse_url(Settings.from_env(os.environ).url if url is None else url)
    if target.scheme == "pool":
        raise InvalidURL(
            "pool:// needs a pool service, which this version does not have yet; name a device "
            "server with gpu://HOST:PORT"
        )
    return target


def _link(target: Target) -> tuple[Link, Callable[[], None] | None]:
    """The link, and what to do (it may take a while) when the session has ended."""
    if target.scheme == "gpu":
        return make_link(target, target.host, target.port), None
    server = local.acquire(target)
    link = make_link(target, server.host, server.port)
    link.server_ended = server.ended
    return link, server.release


async def _link_async(target: Target) -> tuple[Link, Callable[[], None] | None]:
    """As :func:`_link`, outside the loop's thread where it takes long."""
    if target.scheme == "gpu":
        return _link(target)
    loop = asyncio.get_running_loop()
    lock = threading.Lock()
    abandoned = False
    to_release: list[Callable[[], None]] = []

    def start() -> tuple[Link, Callable[[], None] | None]:
        link, on_close = _link(target)
        assert on_close is not None
        with lock:
            if not abandoned:
                to_release.append(on_close)
                return link, on_close
        on_close()
        return link, None

    try:
        return await loop.run_in_executor(None, start)
    except asyncio.CancelledError:
        # The thread can't be stopped: whichever of the two comes second ends the server.
        with lock:
            abandoned = True
        for on_close in to_release:
            loop.run_in_executor(None, on_close)
        raise
