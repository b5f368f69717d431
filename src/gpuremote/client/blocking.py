"""The session for code that blocks: no thread or event loop stands between the program and the
socket."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from gpuremote import _clock
from gpuremote.client.array import RemoteArray
from gpuremote.client.blocking_driver import BlockingDriver
from gpuremote.client.core import Core
from gpuremote.client.device import Device
from gpuremote.client.known import digest_of
from gpuremote.client.link import Link
from gpuremote.client.offering import Course, Steps
from gpuremote.client.session import SessionBase
from gpuremote.client.stream import Event, Stream
from gpuremote.client.waits import Wait
from gpuremote.errors import DeadlineExceeded
from gpuremote.memory.host import HostArray, output_view
from gpuremote.rpc.peer import Connection
from gpuremote.wire.batch import ALL_STREAMS, Op
from gpuremote.wire.digests import sketch_of

__all__ = ["BlockingArray", "BlockingDevice", "BlockingEvent", "BlockingStream", "Session"]

CLOSE_TIMEOUT: Final = 10.0
COPIED: Final = 8 << 20
"""Bytes up to which :meth:`BlockingDevice.put_copied` sends a copy: that costs less than the way
to the server and back, and its memory less than what it is for."""
SHARE: Final = 16
"""The part of a session's memory that copies on their way may take."""


class BlockingArray(RemoteArray):
    """A remote array of a blocking session: asking for values waits in the caller's thread."""

    __slots__ = ()

    def get(self, out: Any = None, *, copy: bool = True, timeout: float | None = None) -> Any:
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
            Too late; ``out`` may hold part of the values and is no longer written to.
        SessionLost
        """
        meta = self._meta
        core = self._core
        if out is None:
            if not copy:
                return self._read_only(core.wait(self._ask_view(), timeout))
            out = np.empty(meta.shape, meta.dtype)
        view = output_view(out, meta.shape, meta.dtype)
        if not self._read_near(view):
            writes = core.writes
            place = core.wait(core.ask_bytes(self._id, view, "get"), timeout)
            if place is not None:
                core.note_near(self._id, place, writes)
        return out

    def wait(self, timeout: float | None = None) -> Self:
        """Wait until the array exists on the device; raises if it never will."""
        self._core.wait(self._ask_meta(), timeout)
        return self

    def item(self, timeout: float | None = None) -> Any:
        """The only element as a Python scalar."""
        host, view = self._scalar_view()
        self._core.wait(self._ask_bytes(view, "item"), timeout)
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
        found._set_meta(self._core.wait(found._ask_meta()))
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

        Returns when the server has the bytes. Nothing is waited for where they are up to 16 KiB
        (64 KiB on a socket with a short way), which travel with the next batch, nor where both ends
        see the memory they are copied to (transport ``shm``): the server is told of it with the
        next op or wait, or after some more uploads, and what goes wrong there arrives at the next
        wait. An array from ``session.empty`` that is put whole is given away: no byte is moved, it
        is read-only from then on, and shows what the device does to it. The memory is lent until
        return.

        Raises
        ------
        DTypeError, InvalidBuffer
            Can't be uploaded; nothing was sent.
        OutOfDeviceMemory
        DeadlineExceeded
            Too late; the upload was taken back and the memory is free.
        """
        core = self._core
        if dtype is None:
            driver = None if core.known.enabled or timeout is not None else core.driver
            made = core.put_at_hand(value, np.ndarray, self.index, self._array_type, driver)
            if made is None and core.made:
                made = self._given(value)
            if made is not None:
                return made
        if core.peer.bulk_in_flight:
            self._driver.room()
        return self._put_host(value, self._host_array(value, dtype), timeout)

    def _put_host(self, value: Any, host: HostArray, timeout: float | None) -> BlockingArray:
        if self._core.known.enabled and (steps := self._offering([host])) is not None:
            return self._make(steps, timeout)[0]
        array, wait = self._upload_host(value, host)
        if wait is not None:
            self._driver.wait(wait, timeout)
        return array

    def put_lent(self, value: npt.NDArray[Any]) -> BlockingArray:
        """As :meth:`put`, without waiting for the server to have the bytes: the memory must not be
        changed before, so its owner has to wait for something that comes after."""
        self._driver.room()
        return self._upload_host(value, self._host_array(value, None), lent=True)[0]

    def put_copied(self, value: Any, dtype: npt.DTypeLike | None = None) -> BlockingArray:
        """As :meth:`put`, without waiting where a copy can travel in place of the array: up to 8
        MiB, as long as no more than 64 MiB of copies are on their way (and no more than a sixteenth
        of what the session may hold, as the server makes room for them at once).

        What goes wrong with such an upload arrives at the next wait for anything.
        """
        core = self._core
        connection = core.peer.connection
        if connection is None or connection.shared or core.sync:
            return self.put(value, dtype)
        host = self._host_array(value, dtype)
        if core.inlines(host.view.nbytes):
            return self._put(host)[0]
        self._driver.room()
        keep = self._kept(host.view, connection) if host.view.nbytes <= COPIED else None
        copy = None
        if keep is not None:
            copy = core.copy_of(host.view, core.owner.memory_limit // SHARE)
        if copy is None:
            return self._put_host(value, host, None)
        array = self._put(host._replace(view=copy), keep=bool(keep), lent=True)[0]
        if keep:
            core.known.note(keep, True)
        return array

    def _kept(self, view: memoryview, connection: Connection) -> bytes | None:
        """The sketch of an upload that the server may keep (b"": it need not); None: it is to be
        waited for, as the server may have the bytes, or as nobody knows how fast the way is."""
        core, known = self._core, self._core.known
        if not known.applies(view.nbytes, connection):
            return b""
        if not known.worth_it(view.nbytes, connection):
            return None if known.rate(connection) is None else b""
        listing = known.ask(lambda: core.ask(Op.CONTENTS, kind="contents"))
        if listing is not None:
            self._driver.wait(listing)
        sketch = sketch_of(view)
        return None if known.has(sketch) else sketch

    def put_many(
        self,
        values: Iterable[Any],
        dtype: npt.DTypeLike | None = None,
        *,
        timeout: float | None = None,
    ) -> list[BlockingArray]:
        """Upload several arrays in one message and one wait; as :meth:`put`."""
        self._driver.room()
        hosts = self._host_arrays(values, dtype)
        if (steps := self._offering(hosts)) is not None:
            return self._make(steps, timeout)
        arrays, wait = self._upload_many(hosts)
        if wait is not None:
            self._driver.wait(wait, timeout)
        return arrays

    def _make(self, steps: Steps[BlockingArray], timeout: float | None) -> list[BlockingArray]:
        """Make the steps of an upload, one after the other."""
        answer: object = None
        with contextlib.closing(Course(steps, timeout)) as course:
            while (step := course.next(answer)) is not None:
                if isinstance(step, memoryview):
                    answer = digest_of(step)
                else:
                    answer = self._driver.wait(step, course.left)
            return course.made

    @property
    def xp(self) -> Any:
        """NumPy's and CuPy's functions (``gpuremote.cupy``), with what they make on this device.

        Arrays that the device makes from here on are that namespace's too.
        """
        # By name: the front end is above this package.
        front = importlib.import_module("gpuremote.cupy._namespace")
        return front.namespace_of(self)

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
        self._core.wait(wait, timeout)
        self._core.owner._raise_failures()

    def record(self) -> BlockingEvent:
        """A point in this stream that others can wait for."""
        return BlockingEvent(self._core, self)


class BlockingEvent(Event):
    """An event of a blocking session."""

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until the stream has come to this point."""
        self._core.wait(self._ask(Op.EVENT_SYNC, "event"), timeout)

    def query(self) -> bool:
        """Whether it has (a round trip)."""
        return bool(self._core.wait(self._ask(Op.EVENT_QUERY, "event")))

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to ``end``; both must have been reached."""
        return self._milliseconds(self._core.wait(self._ask_elapsed(end)))


class Session(SessionBase[BlockingDevice]):
    """A session on a device server, for code that blocks. Made by ``connect_sync``.

    Use as a context manager. May be used by several threads.

    Attributes
    ----------
    devices : tuple of BlockingDevice
    transport : TransportView
        ``transport.explain()`` says which transport is in use and why.
    """

    def __init__(self, link: Link, core: Core, on_close: Callable[[], None] | None = None) -> None:
        super().__init__(link, core, on_close)
        self._driver = BlockingDriver(core, link)
        try:
            link.open(core, blocking=True)
        except BaseException:
            self._closed = True  # it never was open
            raise
        try:
            self._driver.begin()
        except BaseException:
            self._finish_close()
            raise
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
        self._driver.wait_for_all(self._core.ask(Op.SYNC, ALL_STREAMS, kind="synchronize"), timeout)
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
            try:
                self._driver.end()
            finally:
                if self._on_close is not None:
                    self._on_close()
        if raise_failures:
            self._raise_failures()
