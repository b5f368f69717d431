"""Noticing a reset where the event loop does not.

libuv gives up a descriptor that has an error pending, and uvloop (0.23) then calls neither the
reader nor anybody else: whoever awaits something from a peer that has reset the connection
would wait for ever. asyncio's own loops call the reader, which sees the error.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

__all__ = ["Hangup"]


class Hangup:
    """Watches one descriptor at a time for an error or a hang-up, and for nothing else.

    An epoll descriptor becomes readable and has no error of its own. Traffic does not wake it.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
    noticed : callable
        Called by the loop as long as the error has not been taken from the descriptor.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, noticed: Callable[[], None]) -> None:
        self._loop = loop
        self._noticed = noticed
        self._needed = hasattr(select, "epoll") and not isinstance(loop, asyncio.SelectorEventLoop)
        self._epoll: select.epoll | None = None

    def watch(self, fd: int) -> None:
        if self._needed:
            self.unwatch()
            self._epoll = select.epoll()
            self._epoll.register(fd, 0)  # errors and hang-ups are always told
            self._loop.add_reader(self._epoll.fileno(), self._noticed)

    def unwatch(self) -> None:
        """To be called before the descriptor is closed."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
