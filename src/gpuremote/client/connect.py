"""From a URL to a session."""

from __future__ import annotations

import asyncio
import os
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
        ``connect_timeout``, ``grace``, ``memory``. Default: ``GPUREMOTE_URL``, else ``local://``.

    Returns
    -------
    Connecting
        ``async with connect(...) as session:`` or ``session = await connect(...)``.

    Raises
    ------
    InvalidURL
        At once.
    ConnectionFailed, HandshakeTimeout, NotAGpuRemoteServer, UnsupportedVersion, ...
        When it is entered or awaited.
    """
    target = _target(url)

    async def opening() -> AsyncSession:
        loop = asyncio.get_running_loop()
        link, on_close = await loop.run_in_executor(None, lambda: _link(target))
        try:
            return await AsyncSession(link, make_core(link), on_close)._open()
        except BaseException:
            on_close()
            raise

    return Connecting(opening)


def connect_sync(url: str | None = None) -> Session:
    """Open a session on a remote device, for code that blocks; as :func:`connect`."""
    link, on_close = _link(_target(url))
    try:
        return Session(link, make_core(link), on_close)
    except BaseException:
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


def _link(target: Target) -> tuple[Link, Callable[[], None]]:
    """The link, and what to do when the session has ended."""
    if target.scheme == "gpu":
        return make_link(target, target.host, target.port), _nothing
    server = local.acquire(target)
    link = make_link(target, server.host, server.port)
    link.server_ended = server.ended
    return link, server.release


def _nothing() -> None:
    pass
