"""The blocking driver and session: the thread that waits also reads.

No thread or event loop stands between the program and the socket. With several threads in one
session, one of those that wait receives for all of them; when it has what it wanted, another
takes over.
"""

from __future__ import annotations

import contextlib
import select
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from gpuremote import _clock
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
    ProtocolError,
)
from gpuremote.memory.host import output_view
from gpuremote.rpc.peer import Connection
from gpuremote.wire.batch import ALL_STREAMS, Op

__all__ = ["BlockingArray", "BlockingDevice", "BlockingDriver", "Session"]

SLICE: Final = 1.0
"""Seconds of one blocking receive; deadlines are looked at in between."""
CLOSE_TIMEOUT: Final = 10.0


class _Done(Protocol):
    @property
    def done(self) -> bool: ...


class _Credit:
    """Done when the server has granted credit (or there will be none)."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def done(self) -> bool:
        return self._core.peer.credit > 0 or self._core.dead is not None


class BlockingDriver:
    """Makes a core progress in the threads that wait for it.

    Parameters
    ----------
    core : Core
    link : Link
    """

    def __init__(self, core: Core, link: Link) -> None:
        self.core = core
        self.link = link
        self._leading = threading.Lock()
        self._receives = 0
        self._followers: set[threading.Event] = set()
        core.on_stall = self._stalled
        core.on_sync = self._synced
        core.poll = self._poll

    def wait(self, wait: Wait, timeout: float | None = None) -> Any:
        """The answer of ``wait``.

        Raises
        ------
        DeadlineExceeded
            Not within ``timeout`` seconds. The answer is dropped when it comes; on return its
            buffer is no longer written to.
        GpuRemoteError
            The answer is an error, or the session is lost.
        """
        if not wait.done:
            deadline = None if timeout is None else _clock.now() + timeout
            try:
                self._until(wait, deadline)
            except BaseException:
                self._cancel(wait)
                raise
            if not wait.done:
                self._cancel(wait)
                raise DeadlineExceeded(
                    f"no answer to {wait.kind} within {timeout} s; the session goes on",
                    op=wait.kind,
                    peer=self.core.peer_name,
                )
        if not self.core.waiting:
            self.core.caught_up()
        return wait.result()

    def _until(self, what: _Done, deadline: float | None) -> None:
        while not what.done and (deadline is None or _clock.now() < deadline):
            if self._leading.acquire(blocking=False):
                try:
                    while not what.done and (deadline is None or _clock.now() < deadline):
                        self._step(deadline)
                finally:
                    self._leading.release()
                    for follower in list(self._followers):
                        follower.set()
            else:
                self._follow(what, deadline)

    def _follow(self, what: _Done, deadline: float | None) -> None:
        """Another thread receives; sleep until it has our answer or leaves."""
        woken = threading.Event()
        self._followers.add(woken)
        try:
            if isinstance(what, Wait):
                with self.core.lock:
                    what.notify = woken.set
            # The leader may have left before this thread was in its list.
            if what.done or not self._leading.locked():
                return
            remaining = SLICE if deadline is None else max(0.0, deadline - _clock.now())
            woken.wait(min(remaining, SLICE if isinstance(what, Wait) else 0.01))
        finally:
            self._followers.discard(woken)

    def _step(self, deadline: float | None) -> None:
        """Make some progress, or wait a while for it."""
        core = self.core
        connection = core.peer.connection
        if connection is None:
            self._resume(deadline)
            return
        try:
            self._receive(connection, deadline)
        except ConnectionLost as error:
            self._lost(connection, error)
        except ProtocolError as error:
            connection.abort()
            core.die(error)

    def _receive(self, connection: Connection, deadline: float | None) -> None:
        core = self.core
        left = SLICE if deadline is None else min(SLICE, deadline - _clock.now())
        if connection.pending_output or left < SLICE or connection.due() is not None:
            self._poll_once(connection, left)
            wait = 0.0
        else:
            wait = SLICE
        incoming = connection.receive(wait)
        self._receives += 1
        if incoming is not None:
            with core.lock:
                core.peer.dispatch(incoming)
        elif core.sources:
            self._tend()

    def _poll_once(self, connection: Connection, seconds: float) -> None:
        due = connection.due()
        if due is not None:
            seconds = min(seconds, due)
        poller = select.poll()
        wanted = select.POLLIN | (select.POLLOUT if connection.pending_output else 0)
        poller.register(connection.fileno(), wanted)
        poller.poll(max(0.0, 1000 * seconds))
        with self.core.lock:
            connection.flush()

    def _tend(self) -> None:
        """Look after the sessions that copies come from; nobody else may be reading them."""
        for source in list(self.core.sources):
            source.poll()
        self.core.run_deferred()

    def _poll(self) -> None:
        """Take in what has arrived, without waiting."""
        connection = self.core.peer.connection
        if connection is None or not self._leading.acquire(blocking=False):
            return
        try:
            while (incoming := connection.receive(0.0)) is not None:
                with self.core.lock:
                    self.core.peer.dispatch(incoming)
        except ConnectionLost as error:
            self._lost(connection, error)
        except ProtocolError as error:
            connection.abort()
            self.core.die(error)
        finally:
            self._leading.release()

    def _stalled(self) -> None:
        """Issuing has to wait until the server has caught up."""
        self._until(_Credit(self.core), None)

    def _synced(self, wait: Wait) -> None:
        self._until(wait, None)
        wait.result()

    def _lost(self, connection: Connection, error: BaseException) -> None:
        core = self.core
        with core.lock:
            if core.peer.connection is connection:
                core.peer.lost(error)
        self.link.lost(core)

    def _resume(self, deadline: float | None) -> None:
        """Come back to the server; returns when it worked, failed for good, or time is up."""
        core, link = self.core, self.link
        link.lost(core)
        if core.dead is not None:
            return
        pause = 0.02
        while deadline is None or _clock.now() < deadline:
            try:
                connection, welcome = link.attempt(core, blocking=True)
            except GpuRemoteError as error:
                if link.final(error):
                    link.give_up(core, error)
                    return
                if link.remaining() <= 0:
                    link.give_up(core, None)
                    return
                threading.Event().wait(min(pause, max(0.0, link.remaining())))
                pause = min(2 * pause, MAX_PAUSE)
                continue
            link.resumed(core, connection, welcome)
            return

    def _cancel(self, wait: Wait) -> None:
        """Give up an answer, and make sure that its buffer is left alone."""
        core = self.core
        if self._leading.acquire(blocking=False):
            try:
                core.cancel(wait)
            finally:
                self._leading.release()
            return
        # Another thread may be receiving into the buffer at this moment: break its connection
        # off (the session resumes) and wait until it has left the receive.
        with core.lock:
            connection = core.peer.connection
            if wait.done:
                return
            wait.cancelled = True
        before = self._receives
        if connection is not None:
            connection.abort()
        while self._leading.locked() and self._receives == before and connection is not None:
            if core.peer.connection is not connection:
                break
            threading.Event().wait(0.001)
        with core.lock:
            wait.cancelled = False
            core.cancel(wait)


class BlockingArray(RemoteArray):
    """A remote array of a blocking session: asking for values waits in the caller's thread."""

    __slots__ = ()

    def get(self, out: Any = None, *, timeout: float | None = None) -> Any:
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
            Too late; ``out`` may hold part of the values and is no longer written to.
        SessionLost
        """
        host, view = self._host_target(out)
        self._session._driver.wait(self._ask_bytes(view), timeout)
        return host

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until the array exists on the device; raises if it never will."""
        self._session._driver.wait(self._ask_meta(), timeout)
        return self

    def item(self, timeout: float | None = None) -> Any:
        """The only element as a Python scalar."""
        host, view = self._scalar_view()
        self._session._driver.wait(self._ask_bytes(view, "item"), timeout)
        return host.item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def compress(self, mask: RemoteArray) -> Self:
        """The elements where ``mask`` is true, in one dimension; same as ``x[mask]``."""
        return self[mask]

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        return self._index_value(self.item())

    @property
    def _session(self) -> Session:
        session: Session = self._core.owner
        return session

    def _settle(self, found: Self) -> Self:
        found._set_meta(self._session._driver.wait(found._ask_meta()))
        return found

    def _download(self) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self.get()
        return host


class BlockingDevice(Device[BlockingArray]):
    """A device of a blocking session."""

    def put(
        self, value: Any, dtype: npt.DTypeLike | None = None, *, timeout: float | None = None
    ) -> BlockingArray:
        """Upload an array (NumPy, torch, CuPy, DLPack, buffer protocol, numbers, nested lists).

        Returns when the server has the bytes; up to 16 KiB travel with the next batch, and then
        nothing is waited for. The memory is lent until return.

        Raises
        ------
        DTypeError, InvalidBuffer
            Can't be uploaded; nothing was sent.
        OutOfDeviceMemory
        DeadlineExceeded
            Too late; the upload was taken back and the memory is free.
        """
        array, wait = self._upload(value, dtype)
        if wait is not None:
            self._driver.wait(wait, timeout)
        return array

    def put_many(
        self,
        values: Iterable[Any],
        dtype: npt.DTypeLike | None = None,
        *,
        timeout: float | None = None,
    ) -> list[BlockingArray]:
        """Upload several arrays in one message and one wait; as :meth:`put`."""
        arrays, wait = self._upload_many(values, dtype)
        if wait is not None:
            self._driver.wait(wait, timeout)
        return arrays

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued so far has been executed; raises what failed."""
        self._core.owner.synchronize(timeout)

    def stream(self) -> BlockingStream:
        """A new stream: work in it is ordered, and not ordered with other streams."""
        return BlockingStream(self._core, self)

    def _finish_upload(self, wait: Wait) -> None:
        self._driver.wait(wait)

    @property
    def _driver(self) -> BlockingDriver:
        driver: BlockingDriver = self._core.owner._driver
        return driver


class BlockingStream(Stream):
    """A stream of a blocking session."""

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued in this stream has been executed."""
        wait = self._core.ask(Op.SYNC, self.ident, kind="synchronize")
        self._core.owner._driver.wait(wait, timeout)
        self._core.owner._raise_failures()

    def record(self) -> BlockingEvent:
        """A point in this stream that others can wait for."""
        return BlockingEvent(self._core, self)


class BlockingEvent(Event):
    """An event of a blocking session."""

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until the stream has come to this point."""
        self._core.owner._driver.wait(self._ask(Op.EVENT_SYNC, "event"), timeout)

    def query(self) -> bool:
        """Whether it has (a round trip)."""
        return bool(self._core.owner._driver.wait(self._ask(Op.EVENT_QUERY, "event")))

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``; both must have been reached."""
        return self._milliseconds(self._core.owner._driver.wait(self._ask_elapsed(end)))


class Session(SessionBase[BlockingDevice]):
    """A session on a device server, for code that blocks. Made by ``connect_sync``.

    Use as a context manager. May be used by several threads.

    Attributes
    ----------
    devices : tuple of BlockingDevice
    transport : TransportView
        ``transport.explain()`` says which transport is in use and why.
    """

    def __init__(self, link: Link, core: Core, on_close: Callable[[], None] = lambda: None) -> None:
        super().__init__(link, core, on_close)
        self._driver = BlockingDriver(core, link)
        link.open(core, blocking=True)
        self._set_devices(BlockingDevice, BlockingArray)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(raise_failures=kind is None)

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything issued so far, on every stream, has been executed.

        Raises
        ------
        OpError
            The first failure that was not raised yet (a note names the others).
        """
        self._driver.wait(self._core.ask(Op.SYNC, ALL_STREAMS, kind="synchronize"), timeout)
        self._raise_failures()

    def get_many(
        self,
        arrays: Sequence[BlockingArray],
        out: Sequence[Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """Fetch several arrays in one round trip; as ``BlockingArray.get``."""
        hosts, waits = self._ask_many(arrays, out)
        deadline = None if timeout is None else _clock.now() + timeout
        try:
            for wait in waits:
                left = None if deadline is None else max(0.0, deadline - _clock.now())
                self._driver.wait(wait, left)
        except BaseException:
            for wait in waits:
                self._driver._cancel(wait)
            raise
        return hosts

    def results(
        self, arrays: Iterable[BlockingArray], ahead: int = 4
    ) -> Iterator[npt.NDArray[Any]]:
        """Iterate over the values of ``arrays`` in order, ``ahead`` of them asked for at a time.

        ``arrays`` may be a generator that issues the ops as it goes.
        """
        source = iter(arrays)
        pending: list[tuple[npt.NDArray[Any], Wait]] = []
        try:
            for array in source:
                host = np.empty(array.shape, array.dtype)
                pending.append((host, array._ask_bytes(output_view(host), "results")))
                if len(pending) >= ahead:
                    host, wait = pending.pop(0)
                    self._driver.wait(wait)
                    yield host
            while pending:
                host, wait = pending.pop(0)
                self._driver.wait(wait)
                yield host
        finally:
            for _, wait in pending:
                self._driver._cancel(wait)

    def server_stats(self) -> dict[str, Any]:
        """The worker's counters (a round trip)."""
        answer: dict[str, Any] = self._driver.wait(self._core.ask(Op.STATS, kind="stats"))
        return answer

    def close(self, timeout: float = CLOSE_TIMEOUT, *, raise_failures: bool = True) -> None:
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
                self._driver.wait(self._core.say_goodbye(), timeout)
        finally:
            self._finish_close()
        if raise_failures:
            self._raise_failures()
