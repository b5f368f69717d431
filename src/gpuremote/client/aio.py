"""The session for asyncio. Ops are plain calls; only what has an answer is awaited.

A session belongs to the loop and the thread in which it was opened. Its socket is watched by
the loop; sending is done by the caller as far as the kernel takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any, Final, NoReturn, Self

import numpy as np
import numpy.typing as npt

from gpuremote.client.aio_driver import AsyncDriver
from gpuremote.client.array import RemoteArray
from gpuremote.client.core import Core
from gpuremote.client.device import Device
from gpuremote.client.known import PIECE as HASHED
from gpuremote.client.link import Link
from gpuremote.client.offering import Course, Steps
from gpuremote.client.session import SessionBase
from gpuremote.client.stream import Event, Stream
from gpuremote.client.waits import Wait
from gpuremote.errors import (
    DeadlineExceeded,
    GpuRemoteError,
    ImplicitTransfer,
    InvalidBuffer,
)
from gpuremote.memory.host import copy_bytes, output_view
from gpuremote.wire.batch import ALL_STREAMS, Op
from gpuremote.wire.caps import INLINE_PAYLOAD

__all__ = ["AsyncArray", "AsyncDevice", "AsyncEvent", "AsyncSession", "AsyncStream", "Connecting"]

CLOSE_TIMEOUT: Final = 10.0
PIECE: Final = 8 << 20
"""Bytes copied into shared memory before the loop gets its turn: some 1 ms."""


class AsyncArray(RemoteArray):
    """A remote array of an asyncio session: asking for values is awaited."""

    __slots__ = ()

    async def get(self, out: Any = None, *, copy: bool = True, timeout: float | None = None) -> Any:
        """Copy the values to host memory and return it.

        Parameters
        ----------
        out : array or buffer, optional
            Filled in place: a writable C-contiguous NumPy array of equal shape and dtype, or
            any buffer of as many bytes. Without it a new NumPy array is made.
        copy : bool
            False: a read-only array is good enough. Where both ends see the same memory it lies
            there, and goes back to the server when the last reference to it is gone.
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
        meta = self._meta
        core = self._core
        if out is None:
            if not copy:
                return self._read_only(await core.wait(self._ask_view(), timeout))
            out = np.empty(meta.shape, meta.dtype)
        wait = core.ask_bytes(self._id, output_view(out, meta.shape, meta.dtype), "get")
        if timeout is not None or wait.done:
            await core.wait(wait, timeout)
            return out
        # As core.wait does, without a coroutine in between: this is what latency is made of.
        wait.future = future = core.new_future()
        try:
            await future
        except BaseException:
            core.cancel(wait)
            raise
        if core.flush_after:
            core.settled()
        if wait.error is not None:
            raise wait.take_error()
        return out

    async def wait(self, timeout: float | None = None) -> Self:
        """Wait until the array exists on the device; raises if it never will."""
        await self._core.wait(self._ask_meta(), timeout)
        return self

    async def item(self, timeout: float | None = None) -> Any:
        """The only element as a Python scalar."""
        host, view = self._scalar_view()
        await self._core.wait(self._ask_bytes(view, "item"), timeout)
        return host.item()

    async def tolist(self) -> Any:
        return (await self.get()).tolist()

    async def compress(self, mask: RemoteArray) -> Self:
        """The elements where ``mask`` is true, in one dimension (a round trip for the shape)."""
        found: Self = self._masked(mask)
        found._set_meta(await self._core.wait(found._ask_meta()))
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

        Returns when the server has the bytes. Nothing is waited for where they are up to 16 KiB
        (64 KiB on a socket with a short way), which travel with the next batch, nor where both ends
        see the memory they are copied to (transport ``shm``): the server is told of it with the
        next op or wait, or after some more uploads, and what goes wrong there arrives at the next
        wait. An array from ``session.empty`` that is put whole is given away: no byte is moved, it
        is read-only from then on, and shows what the device does to it. The memory is lent until
        return; cancellation and timeout take the upload back before that.

        Raises
        ------
        DTypeError, InvalidBuffer
            Can't be uploaded; nothing was sent.
        OutOfDeviceMemory
        DeadlineExceeded
        """
        if dtype is None:
            made = self._core.put_at_hand(value, np.ndarray, self.index, self._array_type, None)
            if made is None:
                made = self._given(value)
            if made is not None:
                return made
        await self._driver.room()
        host = self._host_array(value, dtype)
        if self._core.known.enabled and (steps := self._offering([host])) is not None:
            del host
            return (await self._make(steps, timeout))[0]
        staged = self._staged(value, host)
        if staged is not None:
            if staged is not host.view:
                await _copy(staged, host.view)
            array = self._put_staged(value, host, staged)
            self._note(value, host, array)
            return array
        array, wait = self._put(host)
        del host  # an error that is kept holds this frame, and it the memory
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
        await self._driver.room()
        hosts = self._host_arrays(values, dtype)
        if (steps := self._offering(hosts)) is not None:
            return await self._make(steps, timeout)
        arrays, wait = self._upload_many(hosts)
        if wait is not None:
            await self._driver.wait(wait, timeout)
        return arrays

    async def _make(self, steps: Steps[AsyncArray], timeout: float | None) -> list[AsyncArray]:
        """Make the steps of an upload, one after the other."""
        answer: object = None
        with contextlib.closing(Course(steps, timeout)) as course:
            while (step := course.next(answer)) is not None:
                if isinstance(step, memoryview):
                    answer = await _digest(step)
                else:
                    answer = await self._driver.wait(step, course.left)
            return course.made

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued so far has been executed; raises what failed."""
        await self._core.owner.synchronize(timeout)

    def stream(self) -> AsyncStream:
        """A new stream: work in it is ordered, and not ordered with other streams."""
        return AsyncStream(self._core, self)

    def _upload_small(self, value: npt.NDArray[Any]) -> AsyncArray:
        if value.nbytes > INLINE_PAYLOAD:
            raise InvalidBuffer(
                "an index array of more than 16 KiB has to be uploaded first: "
                "x[await device.put(index)]"
            )
        return super()._upload_small(value)

    @property
    def _driver(self) -> AsyncDriver:
        driver: AsyncDriver = self._core.owner._driver
        return driver


async def _copy(target: memoryview, source: memoryview) -> None:
    """Copy, and let the loop have its turn now and then."""
    for start in range(0, source.nbytes, PIECE):
        if start:
            await asyncio.sleep(0)
        end = start + PIECE
        copy_bytes(target[start:end], source[start:end], away=True)


async def _digest(view: memoryview) -> bytes:
    """Make a digest, in a thread of the loop's executor."""
    loop = asyncio.get_running_loop()
    made = hashlib.sha256()
    for start in range(0, view.nbytes, HASHED):
        piece = loop.run_in_executor(None, made.update, view[start : start + HASHED])
        try:
            await asyncio.shield(piece)
        except asyncio.CancelledError:
            await asyncio.wait([piece])  # on return nobody looks at the memory any more
            raise
    return made.digest()


class AsyncStream(Stream):
    """A stream of an asyncio session."""

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued in this stream has been executed."""
        wait = self._core.ask(Op.SYNC, self.ident, kind="synchronize")
        await self._core.wait(wait, timeout)
        self._core.owner._raise_failures()

    def record(self) -> AsyncEvent:
        """A point in this stream that others can wait for."""
        return AsyncEvent(self._core, self)


class AsyncEvent(Event):
    """An event of an asyncio session."""

    async def synchronize(self, timeout: float | None = None) -> None:
        """Wait until the stream has come to this point."""
        await self._core.wait(self._ask(Op.EVENT_SYNC, "event"), timeout)

    async def query(self) -> bool:
        """Whether it has (a round trip)."""
        return bool(await self._core.wait(self._ask(Op.EVENT_QUERY, "event")))

    async def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``; both must have been reached."""
        return self._milliseconds(await self._core.wait(self._ask_elapsed(end)))


class AsyncSession(SessionBase[AsyncDevice]):
    """A session on a device server, for asyncio. Made by ``connect``.

    Use as an async context manager, from the loop that opened it.

    Attributes
    ----------
    devices : tuple of AsyncDevice
    transport : TransportView
        ``transport.explain()`` says which transport is in use and why.
    """

    def __init__(self, link: Link, core: Core, on_close: Callable[[], None] | None = None) -> None:
        super().__init__(link, core, on_close)
        self._driver = AsyncDriver(core, link)

    async def _open(self) -> Self:
        try:
            await self._driver.open()
        except BaseException:
            self._closed = True  # it never was open
            raise
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
            if self._on_close is not None:
                # Ends the local server, which takes a moment.
                await asyncio.get_running_loop().run_in_executor(None, self._on_close)
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
