"""Uploading: arrays become records and payloads. What waits for them, and for how long memory stays
lent, is said here; nothing here waits itself."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gpuremote.client.issuing import FLUSH_BYTES, NEVER, Issuer
from gpuremote.client.waits import Wait
from gpuremote.memory.host import copy_bytes, fits
from gpuremote.ops.meta import Meta
from gpuremote.rpc.peer import Connection, Entry, Region, Sink
from gpuremote.wire import caps
from gpuremote.wire.batch import Op, blob_record
from gpuremote.wire.frames import NUMBER, Kind, pack_info

__all__ = ["GROUP", "STAGED", "Made", "Uploader"]

T = TypeVar("T")

GROUP: Final = 4096
"""Arrays of one message."""
STAGED: Final = 8
STAGED_BYTES: Final = 64 << 20
"""Arrays in shared memory, and bytes of all but the last of them, of which the server is told
when memory is wanted for another one at the latest. To be told wakes it, often on this core: that
takes longer than to copy a MiB."""
MOST_STAGED: Final = 8 * STAGED
"""The same where no memory is wanted, as the arrays were made before."""
ALMOST_FULL: Final = FLUSH_BYTES - 1024
"""A batch of so many bytes goes out before another upload: one that is full goes out by itself,
and what it says of the upload would not be complete yet."""
COPIES: Final = 64 << 20
"""Bytes of copies that are on their way at a time."""
MAX_RECORDS: Final = 1024
"""Encoded records of either kind of PUT that are kept; programs upload the same shapes again and
again."""


class Made(NamedTuple):
    """An array over memory that the server sees too.

    Attributes
    ----------
    array : weakref.ref of numpy.ndarray
    block : memoryview
        Its memory, all of it.
    connection : Connection
        Whose memory it is.
    meta : Meta
        Of the array as it was made, on the first device.
    record : bytes
        Says that there.
    """

    array: weakref.ref[npt.NDArray[Any]]
    block: memoryview
    connection: Connection
    meta: Meta
    record: bytes


class Uploader(Issuer):
    """The part of a session's core that brings arrays to the server.

    Parameters
    ----------
    sink, depth, sync
        As for ``Issuer``.
    """

    def __init__(self, sink: Sink, depth: int, sync: bool) -> None:
        super().__init__(sink, depth, sync)
        self.trips = self.peer.trips
        self._waits: dict[int, Wait] = {}
        self.inline = caps.INLINE_PAYLOAD
        """Bytes up to which the server takes an array inside a batch."""
        self._put_records: dict[Meta, bytes] = {}
        self._inline_heads: dict[Meta, bytes] = {}
        self._kinds = {}
        self.lent: set[Wait] = set()
        """Uploads that are on their way and that nobody waits for."""
        self._copies = 0
        self._landed: deque[int] = deque()
        """Bytes of copies that are no longer needed; filled by finalisers, in any thread."""
        self.made = {}
        """Arrays of ``session.empty`` by their ``id``, as long as they live and were not put."""

    def cancel(self, wait: Wait) -> None:
        """The program no longer waits."""
        raise NotImplementedError

    def inlines(self, nbytes: int) -> bool:
        """Whether an array of so many bytes travels inside a batch."""
        if nbytes <= caps.INLINE_PAYLOAD:
            return True
        if nbytes > self.inline or nbytes > self.peer.small:
            return False
        connection = self.peer.connection
        return connection is not None and not connection.shared

    def put(
        self, meta: Meta, view: memoryview, *, keep: bool = False, lent: bool = False
    ) -> tuple[int, Wait | None]:
        """Upload bytes: the handle, and what to wait for until ``view`` may be reused (None:
        it may be at once, the bytes were small and went into the batch)."""
        nbytes = meta.nbytes
        if not self.inlines(nbytes):
            return self._put_one(self._put_record(meta, keep), view, lent)
        record = b"".join((self._inline_head(meta), view))
        with self.lock:
            if self._special:
                self._prepare()
            if len(self._buffer) + len(record) > caps.MAX_BATCH // 2:
                self.flush()
            self.free_dropped()
            number = self._append(record, "put")
        if self._stalled:
            self._relieve()
        self.stats.payload_copied += nbytes
        return number, None

    def _inline_head(self, meta: Meta) -> bytes:
        """The record of a small array, up to its bytes."""
        known = self._inline_heads.get(meta)
        if known is None:
            if len(self._inline_heads) >= MAX_RECORDS:
                self._inline_heads.clear()
            blob = [list(meta.shape), meta.wire_dtype, meta.device, bytes(meta.nbytes)]
            whole = blob_record(Op.PUT_INLINE, blob=pack_info(blob))
            known = self._inline_heads[meta] = whole[: len(whole) - meta.nbytes]
        return known

    def allocate(self, nbytes: int, *, shared: bool = False) -> memoryview | None:
        """Memory from which the present connection sends without copying (with ``shared``: that
        the server sees too); None: there is none."""
        with self.lock:
            connection = self.peer.connection
            if connection is None or (shared and not connection.shared):
                return None
            if self._staged and not self._special:
                self.free_dropped()
            staged = self._staged
            if (
                len(staged) >= STAGED
                or sum([view.nbytes for _, view in staged[:-1]]) >= STAGED_BYTES
            ):
                self.flush()
            found = connection.allocate(nbytes)
        if self._stalled:
            self._relieve()
        return found

    def copy_of(self, view: memoryview, most: int) -> memoryview | None:
        """A copy of bytes, to travel while the program goes on; None: then there would be more than
        ``most`` bytes, or ``COPIES``, on their way."""
        nbytes = view.nbytes
        with self.lock:
            while self._landed:
                self._copies -= self._landed.popleft()
            if self._copies + nbytes > min(COPIES, most):
                return None
            memory = np.empty(nbytes, np.uint8)
            ending = weakref.finalize(memory, self._landed.append, nbytes)
            self._copies += nbytes
        ending.atexit = False
        copy_bytes(memory.data, view)
        self.stats.payload_copied += nbytes
        return memory.data

    def fill(self, staged: memoryview, view: memoryview) -> None:
        """Copy bytes to memory from :meth:`allocate`."""
        with self.lock:
            self._filling += 1
        try:
            copy_bytes(staged, view, away=True)
        finally:
            with self.lock:
                self._filling -= 1

    def note_made(self, array: npt.NDArray[Any], block: memoryview) -> None:
        """Remember that ``array`` lies in ``block``, which :meth:`allocate` gave, so that its put
        need not find out."""
        connection, made, key = self.peer.connection, self.made, id(array)
        if connection is not None and connection.shared:
            ref = weakref.ref(array, lambda _: made.pop(key, None))
            meta = self.metas.get(array.shape, array.dtype, 0)
            made[key] = Made(ref, block, connection, meta, self._put_record(meta))

    def give(self, array: npt.NDArray[Any], device: int) -> tuple[int, Meta] | None:
        """Upload an array that is noted, and that nobody else can write to, by giving its memory
        away: as :meth:`put_staged`. None: it can't be; it is noted no longer.

        In as few steps as it takes: whoever has just filled a large array has nothing of this one
        in the caches, and each call costs some 10 µs then.
        """
        found = self.made.pop(id(array), None)
        if found is None:
            return None
        meta, base, peer = found.meta, array.base, self.peer
        if (
            found.array() is not array
            or found.connection is not peer.connection
            or fits(array, np.ndarray, meta.shape, meta.dtype) is None  # it was changed since
            or sys.getrefcount(base) > 3  # another array lies there too
            or peer.bulk_in_flight >= caps.MAX_BULK
        ):
            return None
        if device:
            meta = self.metas.get(meta.shape, meta.dtype, device)
        return self.give_block(array, meta, found.block), meta

    def give_block(self, array: npt.NDArray[Any], meta: Meta, block: memoryview) -> int:
        """Upload an array by giving away the memory that it lies in; it is the device's from now
        on."""
        try:
            array.setflags(write=False)
            return self.put_staged(meta, block)
        except BaseException:
            array.setflags(write=True)
            raise

    def gives(self, view: memoryview) -> bool:
        """Whether ``view`` is such memory, all of it, and not put yet (then it is read-only)."""
        if view.readonly:
            return False
        with self.lock:
            connection = self.peer.connection
            return connection is not None and connection.gives(view)

    def put_staged(self, meta: Meta, view: memoryview) -> int:
        """Upload what lies in memory from :meth:`allocate`: nothing has to be waited for, as the
        bytes are where the server finds them. It is told with the next record that goes out."""
        record = self._put_record(meta)
        self._last = 0
        try:
            with self.lock:
                self._before_staged(record)
                due, self.flush_after = self.flush_after, NEVER
                try:
                    number = self._append(record, "put")
                    self._staged.append((number, view))
                finally:
                    self.flush_after = due
                # What was recorded in between, or by a finaliser behind, may use what was staged.
                if number != self._unused_to:
                    self._unused_from = number
                self._unused_to = self._next if self._next == number + 1 else 0
            if self._stalled:
                self._relieve()
        except BaseException:
            self._take_back(self._last)
            raise
        return number

    def note_kind(self, meta: Meta) -> None:
        """An array of this meta was put as it was: ``put_at_hand`` may take the next ones."""
        connection = self.peer.connection
        if connection is None or self.inlines(meta.nbytes):
            return
        way = connection.at_hand(meta.nbytes)
        if way is not None:
            if len(self._kinds) >= MAX_RECORDS:
                self._kinds.clear()
            kind = meta, self._put_record(meta), way
            self._kinds[meta.shape, meta.dtype, meta.device] = kind

    def _before_staged(self, record: bytes) -> None:
        """What has to be done before the record of an array in shared memory."""
        if self._special:
            self._prepare()
        if len(self._staged) >= MOST_STAGED or len(self._buffer) + len(record) >= ALMOST_FULL:
            self.flush()
        self.free_dropped()

    def _take_back(self, number: int) -> None:
        """Ctrl-C: nobody will have the array of PUT ``number`` (0: there is none yet)."""
        with self.lock:
            if number and self.dead is None:
                self._staged = [one for one in self._staged if one[0] != number]
                self._record(Op.CANCEL, (number,))
                self.dropped.append(number)

    def _put_record(self, meta: Meta, keep: bool | None = False) -> bytes:
        known = None if keep else self._put_records.get(meta)
        if known is None:
            blob: list[Any] = [list(meta.shape), meta.wire_dtype, meta.device]
            if keep:
                blob.append(True)
            known = blob_record(Op.PUT, blob=pack_info(blob))
            if not keep:
                if len(self._put_records) >= MAX_RECORDS:
                    self._put_records.clear()
                self._put_records[meta] = known
        return known

    def put_many(
        self,
        items: Sequence[tuple[Meta, memoryview]],
        kept: Sequence[bool] = (),
        *,
        lent: bool = False,
    ) -> tuple[list[int], Wait]:
        """Upload several arrays, up to ``GROUP`` of them as the payload of one message. The server
        may keep some of them for other sessions. With ``lent`` nobody waits: what fails is kept for
        the next wait for anything."""

        def post(wait: Wait, entries: list[Entry]) -> list[int]:
            numbers = []
            for start in range(0, len(items), GROUP):
                group = items[start : start + GROUP]
                numbers += self._put_group(group, kept[start:], wait, entries)
            return numbers

        return self._upload(post, lent)

    def _put_one(self, record: bytes, view: memoryview, lent: bool) -> tuple[int, Wait]:
        """As :meth:`put_many`, of one array."""

        def post(wait: Wait, entries: list[Entry]) -> int:
            due, self.flush_after = self.flush_after, NEVER
            try:
                number = self._append(record, "put")
                self._waits[number] = wait
            finally:
                self.flush_after = due
            self.flush()
            self._send_group([number], [view], wait, entries)
            return number

        return self._upload(post, lent)

    def _upload(self, post: Callable[[Wait, list[Entry]], T], lent: bool = False) -> tuple[T, Wait]:
        """Post the messages of an upload: what ``post`` gives, and what to wait for."""
        wait = Wait(self._next, "put")
        entries: list[Entry] = []
        wait.entries = entries
        with self.lock:
            if lent:
                self.lent.add(wait)
            else:
                self.trips["put"] = self.trips.get("put", 0) + 1
            self.free_dropped()
            first = end = self._next
            try:
                made = post(wait, entries)
                end = self._next
                self._posted()
            except BaseException:
                self._give_up(wait, range(first, self._next))
                raise
        if self._stalled:
            try:
                self._relieve()
            except BaseException:
                self._give_up(wait, range(first, end))
                raise
        return made, wait

    def _give_up(self, wait: Wait, numbers: range) -> None:
        """Ctrl-C: nobody will have the arrays of an upload whose records have these numbers."""
        with self.lock:
            unknown = [number for number in numbers if number not in self._waits]
            self.cancel(wait)
            if self.dead is None:
                for number in unknown:
                    self._record(Op.CANCEL, (number,))
                self.dropped.extend(numbers)

    def free_dropped(self) -> None:
        """Before an upload: the server makes room for it when it is announced, not in its turn, and
        for that may run the ops before it."""
        with self.lock:
            while self.dropped:
                self._free_dropped()

    def bring(self, numbers: Sequence[int], views: Sequence[memoryview]) -> Wait:
        """Send the bytes of arrays that were offered, and that the server does not have."""

        def post(wait: Wait, entries: list[Entry]) -> None:
            self.flush()
            for start in range(0, len(numbers), GROUP):
                group = list(numbers[start : start + GROUP])
                self._waits.update(dict.fromkeys(group, wait))
                self._send_group(group, views[start : start + GROUP], wait, entries)

        return self._upload(post)[1]

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Offered arrays will not be brought."""
        with self.lock:
            if self.dead is None:
                for number in numbers:
                    self._record(Op.CANCEL, (number,))

    def _put_group(
        self,
        items: Sequence[tuple[Meta, memoryview]],
        kept: Sequence[bool],
        wait: Wait,
        entries: list[Entry],
    ) -> list[int]:
        numbers = []
        due, self.flush_after = self.flush_after, NEVER  # with the last one
        try:
            for (meta, _), keep in zip_longest(items, kept[: len(items)]):
                number = self._append(self._put_record(meta, keep), "put")
                numbers.append(number)
                self._waits[number] = wait
        finally:
            self.flush_after = due
        # By itself: the server sees to memory while the bytes are still on their way.
        self.flush()
        self._send_group(numbers, [view for _, view in items], wait, entries)
        return numbers

    def _send_group(
        self, numbers: list[int], views: Sequence[memoryview], wait: Wait, entries: list[Entry]
    ) -> None:
        body = b"".join(NUMBER.pack(number) for number in numbers)
        regions = [Region(view.toreadonly()) for view in views]  # lent, not given away
        wait.left += 1
        entry = self.peer.post_payload(
            Kind.PAYLOAD, body, regions, lambda: self._put_done(numbers, wait)
        )
        entries.append(entry)

    def _put_done(self, numbers: list[int], wait: Wait) -> None:
        for number in numbers:
            self._waits.pop(number, None)
        wait.left -= 1
        if not wait.left:
            self.lent.discard(wait)
            wait.finish(error=wait.refusal)
