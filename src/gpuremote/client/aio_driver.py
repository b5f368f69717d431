"""Makes a session's core progress in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Awaitable, Callable
from typing import Any, Final

from gpuremote import _clock
from gpuremote.client.core import Core
from gpuremote.client.hangup import Hangup
from gpuremote.client.link import MAX_PAUSE, Link
from gpuremote.client.waits import Wait
from gpuremote.errors import ConnectionLost, DeadlineExceeded, GpuRemoteError, ProtocolError
from gpuremote.rpc.peer import Connection

__all__ = ["AsyncDriver"]

MESSAGES_PER_TURN: Final = 64
"""Messages taken in before the loop gets its turn again."""
BYTES_PER_TURN: Final = 8 << 20
BUSY_PAUSE: Final = 0.05
"""Seconds until a busy session is looked at again for a moment to change the transport."""
PATIENCE: Final = 2.0
"""Seconds after which one that is always busy has to change it all the same."""


class AsyncDriver:
    """Makes a core progress in an event loop.

    Parameters
    ----------
    core : Core
    link : Link
    """

    def __init__(self, core: Core, link: Link) -> None:
        self.core = core
        self.link = link
        self._loop = asyncio.get_running_loop()
        self._take = core.peer.take
        core.new_future = self._loop.create_future
        self._watched: Connection | None = None
        self._fd = -1
        self._writing = False
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._improving: asyncio.TimerHandle | None = None
        self._closed = False
        self._hangup = Hangup(self._loop, self._readable)
        core.wait = self.wait
        core.on_stall = self._stalled
        core.on_output = self._output
        core.on_buffered = self._buffered
        core.on_sync = self._synced
        core.on_deferred = self._deferred
        core.peer.on_lost = self._unwatch

    async def open(self) -> None:
        """Open the session; the connect itself runs in a thread of the loop's executor."""
        opening = self._loop.run_in_executor(
            None, lambda: self.link.open(self.core, blocking=False)
        )
        try:
            self._watch(await asyncio.shield(opening))
        except asyncio.CancelledError:
            # The thread ends within the connect timeout; what it opened is closed then.
            opening.add_done_callback(_abort_result)
            raise

    def wait(self, wait: Wait, timeout: float | None = None) -> Awaitable[Any]:
        """Await the answer of ``wait``; as ``BlockingDriver.wait``."""
        if timeout is not None:
            return self._wait_until(wait, timeout)
        return self._wait(wait)

    async def _wait(self, wait: Wait) -> Any:
        if not wait.done:
            future = self._loop.create_future()
            wait.future = future
            try:
                await future
            except BaseException:
                self.core.cancel(wait)
                raise
        self.core.settled()
        if wait.error is not None:
            raise wait.take_error()
        return wait.value

    async def _wait_until(self, wait: Wait, timeout: float) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await self._wait(wait)
        except TimeoutError as error:
            if isinstance(error, GpuRemoteError):
                raise
            raise DeadlineExceeded(
                f"no answer to {wait.kind} within {timeout} s; the session goes on",
                op=wait.kind,
                peer=self.core.peer_name,
            ) from None

    async def room(self) -> None:
        """Wait until one more upload may be on its way."""
        while self.core.full:
            await asyncio.sleep(0.001)

    # -- the connection -------------------------------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        self._watched = connection
        self._fd = connection.fileno()
        self._loop.add_reader(self._fd, self._readable)
        self._hangup.watch(self._fd)
        if connection.pending_output:
            self._output()
        self._arm(connection)

    def _unwatch(self, connection: Connection) -> None:
        self.core.part(connection)
        if connection is not self._watched:
            return
        self._loop.remove_reader(self._fd)
        self._hangup.unwatch()
        if self._writing:
            self._loop.remove_writer(self._fd)
            self._writing = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._watched = None
        if not self._closed:
            self._loop.call_soon(self._start_resuming)

    def _readable(self) -> None:
        connection = self._watched
        if connection is None:
            return
        try:
            if not self._take(connection) or connection.restless:
                self._read_on(connection)
            else:
                return
        except ConnectionLost as error:
            self.core.peer.lost(error)
        except ProtocolError as error:
            self._violated(error)
        if connection.pending_output and not self._writing:
            self._output()

    def _read_on(self, connection: Connection) -> None:
        """Take in what else is there, up to a bound; the loop calls again for the rest."""
        received = connection.stats.bytes_received
        limit = received + BYTES_PER_TURN
        for _ in range(MESSAGES_PER_TURN):
            before = received
            if self._take(connection):
                if not connection.buffered:
                    return
            elif (received := connection.stats.bytes_received) == before or received > limit:
                self._arm(connection)
                return
        if connection.buffered:
            self._loop.call_soon(self._readable)

    def _writable(self) -> None:
        connection = self._watched
        if connection is None:
            return
        try:
            if connection.flush():
                self._loop.remove_writer(self._fd)
                self._writing = False
        except ConnectionLost as error:
            self.core.peer.lost(error)
        self._arm(connection)

    def _arm(self, connection: Connection) -> None:
        """For transports that have to be looked at although no descriptor says so."""
        due = connection.due()
        if due is None or self._timer is not None or connection is not self._watched:
            return

        def look() -> None:
            self._timer = None
            self._readable()
            self._writable()

        self._timer = self._loop.call_later(due, look)

    def _output(self) -> None:
        """Something is left to send (or there is no connection to send it on)."""
        connection = self._watched
        if connection is None:
            if not self._closed and self.core.peer.connection is None:
                self._start_resuming()
        elif not self._writing and connection.pending_output:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)
            self._arm(connection)

    def _buffered(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self.core.dead is None:
            self.core.flush()
            if self.core.peer.owing:
                self.core.peer.acknowledge()

    def _deferred(self) -> None:
        if not self._closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.core.run_deferred)

    def _violated(self, error: ProtocolError) -> None:
        self._closed = True
        connection = self.core.peer.connection
        if connection is not None:
            self.core.peer.lost(error)
        self.core.die(error)

    # -- coming back ----------------------------------------------------------------------------

    def _start_resuming(self) -> None:
        if self._resuming is None and not self._closed and self.core.peer.connection is None:
            self.link.lost(self.core)
            if self.core.dead is None:
                self._resuming = self._loop.create_task(self._resume())

    async def _resume(self) -> None:
        core, link = self.core, self.link
        pause = 0.02
        try:
            while core.dead is None and core.peer.connection is None:
                before = core.stats.reconnects
                try:
                    attempt = self._loop.run_in_executor(
                        None, lambda: link.attempt(core, blocking=False)
                    )
                except RuntimeError:  # the loop is being closed, and its threads are gone
                    link.give_up(core, None)
                    return
                try:
                    found = await asyncio.shield(attempt)
                except asyncio.CancelledError:
                    attempt.add_done_callback(_abort_result)
                    raise
                except GpuRemoteError as error:
                    if link.final(error):
                        link.give_up(core, error)
                        return
                    if link.remaining() <= 0:
                        link.give_up(core, None)
                        return
                    await asyncio.sleep(min(pause, max(0.0, link.remaining())))
                    pause = min(2 * pause, MAX_PAUSE)
                    continue
                if core.stats.reconnects != before:
                    # ``_pump`` was faster: what this attempt told the server is out of date.
                    found.connection.abort()
                    continue
                # Watched before it is used, so that a loss while catching up is noticed.
                self._watch(found.connection)
                link.resumed(core, found)
                self._output()
                self._seek_better()
                return
        finally:
            self._resuming = None
            if core.peer.connection is None and core.dead is None and not self._closed:
                self._loop.call_soon(self._start_resuming)

    def _seek_better(self) -> None:
        """Have a transport that was lost tried again when its time has come."""
        at = self.link.better_at
        if at is not None and self._improving is None:
            self._improving = self._loop.call_later(max(0.0, at - _clock.now()), self._improve)

    def _improve(self) -> None:
        self._improving = None
        connection, at = self.core.peer.connection, self.link.better_at
        if connection is None or self._closed or at is None:
            return
        if (self.core.waiting or connection.pending_output) and _clock.now() < at + PATIENCE:
            # Something is on its way; a short while later there may be nothing.
            self._improving = self._loop.call_later(BUSY_PAUSE, self._improve)
        else:
            self.link.leave(self.core)

    def _stalled(self) -> None:
        """Issuing has run ahead of the server: catch up here and now.

        The caller issues op after op without awaiting anything, so the loop does not turn
        anyway; ``await session.drain()`` now and then avoids coming here.
        """
        self._pump(lambda: self.core.peer.credit > 0)

    def _synced(self, wait: Wait) -> None:
        self._pump(lambda: wait.done)
        wait.result()

    def _pump(self, done: Callable[[], bool]) -> None:
        core, link = self.core, self.link
        pause = 0.02
        while not done() and core.dead is None:
            connection = self._watched
            if connection is None:
                link.lost(core)
                try:
                    found = link.attempt(core, blocking=False)
                except GpuRemoteError as error:
                    if link.final(error) or link.remaining() <= 0:
                        link.give_up(core, error if link.final(error) else None)
                    select.poll().poll(1000 * pause)
                    pause = min(2 * pause, MAX_PAUSE)
                else:
                    pause = 0.02
                    self._watch(found.connection)
                    link.resumed(core, found)
                continue
            poller = select.poll()
            wanted = select.POLLIN | (select.POLLOUT if connection.pending_output else 0)
            poller.register(self._fd, wanted)
            due = connection.due()
            poller.poll(1000 if due is None else 1000 * min(due, 1.0))
            self._readable()
            self._writable()

    async def close(self) -> None:
        """Stop everything that belongs to this driver."""
        self._closed = True
        if self._improving is not None:
            self._improving.cancel()
            self._improving = None
        if self._resuming is not None:
            self._resuming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._resuming


def _abort_result(opened: asyncio.Future[Any]) -> None:
    if opened.cancelled() or opened.exception() is not None:
        return
    result = opened.result()
    (result[0] if isinstance(result, tuple) else result).abort()
