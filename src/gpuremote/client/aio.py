"""The asyncio driver and session. Ops are plain calls; only what has an answer is awaited.

A session belongs to the loop and the thread in which it was opened. Its socket is watched by
the loop; sending is done by the caller as far as the kernel takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any, Final, NoReturn, Self

import numpy as np
import numpy.typing as npt

from gpuremote.client.array import RemoteArray
from gpuremote.client.core import Core
from gpuremote.client.device import Device
from gpuremote.client.link import MAX_PAUSE, Link
from gpuremote.client.session import SessionBase
from gpuremote.client.stream import Event, Stream
from gpuremote.client.waits import Wait
from gpuremote.errors import (
    ConnectionLost,
    DeadlineExceeded,
    GpuRemoteError,
    ImplicitTransfer,
    InvalidBuffer,
    ProtocolError,
)
from gpuremote.memory.host import output_view
from gpuremote.rpc.peer import Connection
from gpuremote.wire.batch import ALL_STREAMS, Op

__all__ = ["AsyncArray", "AsyncDevice", "AsyncDriver", "AsyncSession", "Connecting"]

MESSAGES_PER_TURN: Final = 64
"""Messages taken in before the loop gets its turn again."""
BYTES_PER_TURN: Final = 8 << 20
CLOSE_TIMEOUT: Final = 10.0


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
        self._watched: Connection | None = None
        self._fd = -1
        self._writing = False
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._closed = False
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

            def notify() -> None:
                if not future.done():
                    future.set_result(None)

            wait.notify = notify
            try:
                await future
            except BaseException:
                self.core.cancel(wait)
                raise
        if not self.core.waiting:
            self.core.caught_up()
        return wait.result()

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

    # -- the connection -------------------------------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        self._watched = connection
        self._fd = connection.fileno()
        self._loop.add_reader(self._fd, self._readable)
        if connection.pending_output:
            self._output()
        self._arm(connection)

    def _unwatch(self, connection: Connection) -> None:
        self.core.count(connection)
        if connection is not self._watched:
            return
        self._loop.remove_reader(self._fd)
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
        peer = self.core.peer
        stats = connection.stats
        limit = stats.bytes_received + BYTES_PER_TURN
        try:
            for _ in range(MESSAGES_PER_TURN):
                before = stats.bytes_received
                incoming = connection.receive()
                if incoming is not None:
                    peer.dispatch(incoming)
                elif stats.bytes_received == before or stats.bytes_received > limit:
                    break
        except ConnectionLost as error:
            peer.lost(error)
        except ProtocolError as error:
            self._violated(error)
        if connection.pending_output and not self._writing:
            self._output()

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

    def _deferred(self) -> None:
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
            while core.dead is None:
                attempt = self._loop.run_in_executor(
                    None, lambda: link.attempt(core, blocking=False)
                )
                try:
                    connection, welcome = await asyncio.shield(attempt)
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
                # Watched before it is used, so that a loss while catching up is noticed.
                self._watch(connection)
                link.resumed(core, connection, welcome)
                self._output()
                return
        finally:
            self._resuming = None
            if core.peer.connection is None and core.dead is None and not self._closed:
                self._loop.call_soon(self._start_resuming)

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
        while not done() and core.dead is None:
            connection = self._watched
            if connection is None:
                link.lost(core)
                try:
                    found, welcome = link.attempt(core, blocking=False)
                except GpuRemoteError as error:
                    if link.final(error) or link.remaining() <= 0:
                        link.give_up(core, error if link.final(error) else None)
                else:
                    self._watch(found)
                    link.resumed(core, found, welcome)
                continue
            poller = select.poll()
            wanted = select.POLLIN | (select.POLLOUT if connection.pending_output else 0)
            poller.register(self._fd, wanted)
            poller.poll(1000)
            self._readable()
            self._writable()

    async def close(self) -> None:
        """Stop everything that belongs to this driver."""
        self._closed = True
        if self._resuming is not None:
            self._resuming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._resuming


def _abort_result(opened: asyncio.Future[Any]) -> None:
    if opened.cancelled() or opened.exception() is not None:
        return
    result = opened.result()
    (result[0] if isinstance(result, tuple) else result).abort()


class AsyncArray(RemoteArray):
    """A remote array of an asyncio session: asking for values is awaited."""

    __slots__ = ()

    async def get(self, out: Any = None, *, timeout: float | None = None) -> Any:
        """Copy the values to host memory and return it.

        Parameters
        ----------
        out : array or buffer, optional
            Filled in place: a writable C-contiguous NumPy array of equal shape and dtype, or
            any buffer of as many bytes. Without it a new NumPy array is made.
        timeout : float, optional
            Seconds.

        Raises
        ------
        InvalidBuffer
            ``out`` can't be filled; nothing was sent.
        OpError
            The op that should have made this array failed, or one that it depends on.
        DeadlineExceeded
            Too late. As after cancellation, ``out`` may hold part of the values and is no
            longer written to; the session goes on.
        SessionLost
        """
        host, view = self._host_target(out)
        await self._session._driver.wait(self._ask_bytes(view), timeout)
        return host

    async def wait(self, timeout: float | None = None) -> Self:
        """Wait until the array exists on the device; raises if it never will."""
        await self._session._driver.wait(self._ask_meta(), timeout)
        return self

    async def item(self, timeout: float | None = None) -> Any:
        """The only element as a Python scalar."""
        host, view = self._scalar_view()
        await self._session._driver.wait(self._ask_bytes(view, "item"), timeout)
        return host.item()

    async def tolist(self) -> Any:
        return (await self.get()).tolist()

    async def compress(self, mask: RemoteArray) -> Self:
        """The elements where ``mask`` is true, in one dimension (a round trip for the shape)."""
        found: Self = self._masked(mask)
        found._set_meta(await self._session._driver.wait(found._ask_meta()))
        return found

    def __bool__(self) -> NoReturn:
        self._refuse("bool(x)")

    def __int__(self) -> NoReturn:
        self._refuse("int(x)")

    def __float__(self) -> NoReturn:
        self._refuse("float(x)")

    def __complex__(self) -> NoReturn:
        self._refuse("complex(x)")

    def __index__(self) -> NoReturn:
        self._refuse("using x as an index")

    def _refuse(self, what: str) -> NoReturn:
        raise ImplicitTransfer(
            f"{what} would have to wait, which blocks the event loop: use await x.item()"
        )

    def _settle(self, found: Self) -> Self:
        raise ImplicitTransfer(
            "x[mask] has to wait for its shape, which blocks the event loop: use "
            "await x.compress(mask)"
        )

    def _download(self) -> npt.NDArray[Any]:
        raise ImplicitTransfer("in an asyncio session use await x.get()")

    @property
    def _session(self) -> AsyncSession:
        session: AsyncSession = self._core.owner
        return session


class AsyncDevice(Device[AsyncArray]):
    """A device of an asyncio session."""

    async def put(
        self, value: Any, dtype: npt.DTypeLike | None = None, *, timeout: float | None = None
    ) -> AsyncArray:
        """Upload an array (NumPy, torch, CuPy, DLPack, buffer protocol, numbers, nested lists).

        Returns when the server has the bytes; up to 16 KiB travel with the next batch, and then
        nothing is waited for. The memory is lent until then. Cancellation and timeout take the
        upload back before they return, so the memory is free.

        Raises
        ------
        DTypeError, InvalidBuffer
            Can't be uploaded; nothing was sent.
        OutOfDeviceMemory
        DeadlineExceeded
        """
        array, wait = self._upload(value, dtype)
        if wait is not None:
            await self._driver.wait(wait, timeout)
        return array

    async def put_many(
        self,
        values: Iterable[Any],
        dtype: npt.DTypeLike | None = None,
        *,
        timeout: float | None = None,
    ) -> list[AsyncArray]:
        """Upload several arrays in one message and one wait; as :meth:`put`."""
        arrays, wait = self._upload_many(values, dtype)
        if wait is not None:
            await self._driver.wait(wait, timeout)
        return arrays

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued so far has been executed; raises what failed."""
        await self._core.owner.synchronize(timeout)

    def stream(self) -> AsyncStream:
        """A new stream: work in it is ordered, and not ordered with other streams."""
        return AsyncStream(self._core, self)

    def _finish_upload(self, wait: Wait) -> None:
        raise InvalidBuffer(
            "an index array of more than 16 KiB has to be uploaded first: "
            "x[await device.put(index)]"
        )

    @property
    def _driver(self) -> AsyncDriver:
        driver: AsyncDriver = self._core.owner._driver
        return driver


class AsyncStream(Stream):
    """A stream of an asyncio session."""

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued in this stream has been executed."""
        wait = self._core.ask(Op.SYNC, self.ident, kind="synchronize")
        await self._core.owner._driver.wait(wait, timeout)
        self._core.owner._raise_failures()

    def record(self) -> AsyncEvent:
        """A point in this stream that others can wait for."""
        return AsyncEvent(self._core, self)


class AsyncEvent(Event):
    """An event of an asyncio session."""

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until the stream has come to this point."""
        await self._core.owner._driver.wait(self._ask(Op.EVENT_SYNC, "event"), timeout)

    async def query(self) -> bool:
        """Whether it has (a round trip)."""
        return bool(await self._core.owner._driver.wait(self._ask(Op.EVENT_QUERY, "event")))

    async def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``; both must have been reached."""
        return self._milliseconds(await self._core.owner._driver.wait(self._ask_elapsed(end)))


class AsyncSession(SessionBase[AsyncDevice]):
    """A session on a device server, for asyncio. Made by ``connect``.

    Use as an async context manager, from the loop that opened it.

    Attributes
    ----------
    devices : tuple of AsyncDevice
    transport : TransportView
        ``transport.explain()`` says which transport is in use and why.
    """

    def __init__(self, link: Link, core: Core, on_close: Callable[[], None] = lambda: None) -> None:
        super().__init__(link, core, on_close)
        self._driver = AsyncDriver(core, link)

    async def _open(self) -> Self:
        await self._driver.open()
        self._set_devices(AsyncDevice, AsyncArray)
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        await self.close(raise_failures=kind is None)

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued so far, on every stream, has been executed.

        Raises
        ------
        OpError
            The first failure that was not raised yet (a note names the others).
        """
        wait = self._core.ask(Op.SYNC, ALL_STREAMS, kind="synchronize")
        await self._driver.wait(wait, timeout)
        self._raise_failures()

    async def drain(self) -> None:
        """Send what was issued and let the loop turn until the server has caught up enough."""
        self._core.flush()
        await asyncio.sleep(0)
        while self._core.behind and self._core.dead is None:
            await asyncio.sleep(0.001)

    async def get_many(
        self,
        arrays: Sequence[AsyncArray],
        out: Sequence[Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """Fetch several arrays in one round trip; as ``AsyncArray.get``."""
        hosts, waits = self._ask_many(arrays, out)
        try:
            async with asyncio.timeout(timeout):
                for wait in waits:
                    await self._driver.wait(wait)
        except BaseException as error:
            for wait in waits:
                self._core.cancel(wait)
            if isinstance(error, TimeoutError) and not isinstance(error, GpuRemoteError):
                raise DeadlineExceeded(f"not all arrays came within {timeout} s") from None
            raise
        return hosts

    async def results(
        self, arrays: Iterable[AsyncArray], ahead: int = 4
    ) -> AsyncIterator[npt.NDArray[Any]]:
        """Iterate over the values of ``arrays`` in order, ``ahead`` of them asked for at a time.

        ``arrays`` may be a generator that issues the ops as it goes.
        """
        pending: list[tuple[npt.NDArray[Any], Wait]] = []
        try:
            for array in arrays:
                host = np.empty(array.shape, array.dtype)
                pending.append((host, array._ask_bytes(output_view(host), "results")))
                if len(pending) >= ahead:
                    host, wait = pending.pop(0)
                    await self._driver.wait(wait)
                    yield host
            while pending:
                host, wait = pending.pop(0)
                await self._driver.wait(wait)
                yield host
        finally:
            for _, wait in pending:
                self._core.cancel(wait)

    async def server_stats(self) -> dict[str, Any]:
        """The worker's counters (a round trip)."""
        answer: dict[str, Any] = await self._driver.wait(self._core.ask(Op.STATS, kind="stats"))
        return answer

    async def close(self, timeout: float = CLOSE_TIMEOUT, *, raise_failures: bool = True) -> None:
        """End the session: what was issued is executed, then the server forgets it. Idempotent.

        Parameters
        ----------
        timeout : float
            Seconds for the server to finish; then the session is dropped.
        raise_failures : bool
            Raise the first failure that nobody waited for.
        """
        if self.closed:
            return
        try:
            with contextlib.suppress(DeadlineExceeded):
                await self._driver.wait(self._core.say_goodbye(), timeout)
        finally:
            await self._driver.close()
            self._finish_close()
        if raise_failures:
            self._raise_failures()


class Connecting:
    """What ``connect`` gives: ``async with`` it, or ``await`` it for the session."""

    def __init__(self, opening: Callable[[], Awaitable[AsyncSession]]) -> None:
        self._opening = opening
        self._session: AsyncSession | None = None

    def __await__(self) -> Generator[Any, None, AsyncSession]:
        return self._opening().__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self._opening()
        return self._session

    async def __aexit__(self, *exc: Any) -> None:
        assert self._session is not None
        await self._session.__aexit__(*exc)
