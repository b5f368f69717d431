"""Memory that two processes of one host see: blocks in segments, lent by their owner.

The owner makes *segments* (memfds) as it needs them, and passes each to the other process once.
A segment holds blocks of one size. A block that was sent belongs to the other process until that
gives it back, by counting up in the first page of the segment: no message is needed for it, and
nothing is left behind when either process is killed, as the kernel counts the references.

Segments are kept and used again: memory that is touched for the first time is some ten times
slower than memory that is in use (the kernel has to find and clear its pages).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gpuremote import _clock
from gpuremote._speed import native
from gpuremote.errors import ProtocolError
from gpuremote.memory.shelves import Segment, Shelf

__all__ = ["Arena", "Loans", "Place", "SegmentInfo", "probe"]

PAGE: Final = mmap.PAGESIZE
MAX_BLOCKS: Final = 512
"""Blocks of a segment: their counters, two each, fill its first page at most."""
MAX_SEGMENTS: Final = 4096
"""Segments of one owner."""
MAX_BLOCK: Final = 1 << 40
SMALLEST: Final = 64 << 10
SLAB: Final = 4 << 20
"""Bytes of a segment of several blocks."""
AT_ONCE: Final = 32 << 20
"""Bytes of a segment whose pages are got in one call: some 10 ms, which a loop can spare."""
KEPT: Final = 60.0
"""Seconds for which a segment is kept that nobody uses."""
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""A segment keeps its size: one that shrinks would end whoever reads it with SIGBUS."""
_POPULATE: Final = 23
"""MADV_POPULATE_WRITE (Linux 5.14): get all pages now, in one call."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class SegmentInfo(NamedTuple):
    """What the other process has to know of a segment."""

    ident: int
    block: int
    blocks: int

    @property
    def nbytes(self) -> int:
        return PAGE + self.block * self.blocks


class Place(NamedTuple):
    """Where some bytes lie in an owner's segments."""

    segment: int
    block: int
    offset: int
    nbytes: int


def probe() -> tuple[bool, str]:
    """Whether this system has what is needed, and what was found."""
    try:
        os.close(_new_segment(PAGE))
    except (OSError, AttributeError) as error:
        return False, f"no sealed memfd can be made here: {error}"
    return True, "memory files that can be passed over a Unix socket"


def _new_segment(nbytes: int) -> int:
    fd = os.memfd_create("gpuremote", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Span:
    """A mapping, which ends with the last array over it.

    Only plain arrays refer to this (as their base), and the cyclic collector does not look
    through those: it would unmap before the finalisers that still write there.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        unmap = _libc.munmap
        # No call stands between these lines: Ctrl-C comes before all of them or after.
        self.address = address
        self.nbytes = nbytes
        self._unmap = unmap
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        self._unmap(self.address, self.nbytes)


class _Mapping:
    """A segment in this process's address space, until nobody refers to it.

    Not ``mmap.mmap``, which keeps a descriptor open for each.
    """

    def __init__(self, fd: int, nbytes: int, populate: bool = True) -> None:
        self.nbytes = nbytes
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"{nbytes} bytes can't be mapped: {os.strerror(code)}")
        self.address: int = address
        self._content: npt.NDArray[np.uint8] = np.asarray(_Span(address, nbytes))
        # Where the kernel is too old for it pages come when they are touched.
        if populate and nbytes <= AT_ONCE:
            _libc.madvise(address, nbytes, _POPULATE)

    def counters(self, count: int) -> memoryview:
        """How often each block came back (u32), from the beginning of the first page; only as long
        as somebody refers to this mapping."""
        return self._content[: 4 * count].data.cast("I")

    def written(self, index: int) -> memoryview:
        """A counter (u32) of the second half of that page: how much of a block its owner has
        written, while it does."""
        return self.look(PAGE // 2 + 4 * index, 4)

    def look(self, offset: int, nbytes: int) -> memoryview:
        """Bytes that keep the mapping."""
        view: memoryview = self._content[offset : offset + nbytes].data
        return view

    def memory(self, offset: int, nbytes: int, on_gone: Callable[[], object]) -> memoryview:
        """Bytes that keep the mapping, and tell when the last reference to them goes."""
        found = self._content[offset : offset + nbytes].view(_Memory)
        found.mapping = self
        found.on_gone = on_gone
        view: memoryview = found.data
        return view


class _Memory(np.ndarray[Any, Any]):
    """Never sliced itself: only a memoryview of it is given out, which keeps it alive."""

    mapping: _Mapping
    on_gone: Callable[[], object]

    def __del__(self) -> None:
        gone = self.__dict__.get("on_gone")
        if gone is not None:
            gone()


def _python_address(view: memoryview, /) -> int:
    """Address of the first byte of a flat view that is not empty."""
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


address_of = _python_address
if not TYPE_CHECKING and native is not None:
    address_of = native.address


class Arena:
    """The segments of one owner.

    Not for several threads at a time, apart from what happens to blocks that are dropped.

    Parameters
    ----------
    limit : int
        Bytes of all segments together.
    announce : callable
        Called with a ``SegmentInfo`` and its descriptor (closed afterwards): pass it to the other
        process. False: it can't be passed now.
    dropped : callable
        Called with the number of a segment that is not used any more.

    Attributes
    ----------
    nbytes : int
        Of the segments that there are.
    """

    def __init__(
        self,
        limit: int,
        announce: Callable[[SegmentInfo, int], bool],
        dropped: Callable[[int], None],
    ) -> None:
        self.nbytes = 0
        self._limit = limit
        self._announce = announce
        self._dropped = dropped
        self._next = 0
        self._segments: dict[int, Segment] = {}
        self._bases: list[tuple[int, int]] = []  # address and number, in order of the addresses
        self._shelves: dict[int, Shelf] = {}  # by the size of their blocks
        self._closed = False

    def allocate(self, nbytes: int) -> memoryview | None:
        """A block of ``nbytes`` (at least 1), or None if there is no room."""
        found = self.take(nbytes)
        return found and found[0]

    def take(self, nbytes: int) -> tuple[memoryview, Place] | None:
        """The same, and where it is."""
        if self._closed or not 0 < nbytes <= MAX_BLOCK:
            return None
        size = _size_class(nbytes)
        shelf = self._shelves.get(size)
        found = shelf and shelf.take(nbytes)
        if not found and (shelf := self._grow(size)) is not None:
            found = shelf.take(nbytes)
        if not found:
            return None
        view, segment, index = found
        return view, Place(segment.ident, index, 0, nbytes)

    def shelf(self, nbytes: int) -> Shelf | None:
        """Where blocks for so many bytes come from as long as some are left; None: nowhere yet."""
        return self._shelves.get(_size_class(nbytes))

    def _grow(self, size: int) -> Shelf | None:
        count = min(MAX_BLOCKS, max(1, SLAB // size))
        info = SegmentInfo(self._next, size, count)
        self._next += 1  # whatever becomes of it: the other process must not hear it twice
        self.trim(0.0 if self.nbytes + info.nbytes > self._limit else KEPT)
        if self.nbytes + info.nbytes > self._limit or len(self._segments) >= MAX_SEGMENTS:
            return None
        try:
            fd = _new_segment(info.nbytes)
        except OSError:
            return None
        try:
            mapping = _Mapping(fd, info.nbytes)
            if not self._announce(info, fd):
                return None
        except (OSError, ValueError):
            return None  # no memory, or no address space
        finally:
            os.close(fd)
        segment = Segment(info.ident, size, count, mapping, mapping.address, PAGE)
        segment.left_at = _clock.now()
        shelf = self._shelves.setdefault(size, Shelf())
        shelf.add(segment)
        self._segments[info.ident] = segment
        self._bases.append((mapping.address, info.ident))
        self._bases.sort()
        self.nbytes += info.nbytes
        return shelf

    def find(self, view: memoryview) -> Place | None:
        """Where a flat view lies, if it lies in a block of this arena that is out."""
        if not view.nbytes or not self._bases:
            return None
        segments = self._segments
        place = _place_at(address_of(view), view.nbytes, self._bases, lambda ident: segments[ident])
        if place is None or place.offset + view.nbytes > segments[place.segment].used(place.block):
            return None
        return place

    def look(self, place: Place) -> memoryview:
        """The memory of a place that the other process names, in a block that it has.

        From the thread that receives.

        Raises
        ------
        ProtocolError
            It has no such block.
        """
        segment = self._segments.get(place.segment)
        if segment is None or not _fits(place, segment) or not segment.lent(place.block):
            raise ProtocolError(f"the other end does not have {place}")
        offset = PAGE + place.block * segment.block + place.offset
        return segment.mapping.look(offset, place.nbytes)

    def written(self, place: Place) -> memoryview:
        """Where the other process sees how much of a block there is."""
        return self._segments[place.segment].mapping.written(place.block)

    def times(self, place: Place) -> int:
        """How often the block of a place that the other process has was lent: while that stays, it
        was not used for anything else."""
        return self._segments[place.segment].times(place.block)

    def back(self, place: Place) -> bool:
        """Whether the other process does not have the block of a place that is held here."""
        return not self._segments[place.segment].lent(place.block)

    def whole(self, place: Place) -> bool:
        """Whether it is all of a block that was not given away yet."""
        segment = self._segments[place.segment]
        return (
            not place.offset
            and place.nbytes == segment.used(place.block)
            and not segment.given(place.block)
        )

    def lend(self, place: Place, *, given: bool) -> None:
        """The other process is told of it, and will give it back once for each time."""
        self._segments[place.segment].lend(place.block, given)

    def collect(self) -> None:
        """Take note of the blocks that were dropped here."""
        for shelf in self._shelves.values():
            shelf.collect()

    def trim(self, kept: float = KEPT) -> None:
        """Give back the segments that nobody has used for ``kept`` seconds."""
        self.collect()
        before = _clock.now() - kept
        for ident, segment in list(self._segments.items()):
            if segment.left_at <= before and segment.unused():
                self._forget(ident, segment)
                self._dropped(ident)

    def _forget(self, ident: int, segment: Segment) -> None:
        del self._segments[ident]
        self._shelves[segment.block].remove(segment)
        self._bases.remove((segment.mapping.address, ident))
        self.nbytes -= PAGE + segment.block * segment.blocks

    def close(self) -> None:
        """Nothing more is given out; what is out stays valid as long as it lives."""
        self._closed = True
        for shelf in self._shelves.values():
            shelf.close()
        self._shelves.clear()
        self._segments.clear()
        self._bases.clear()


def _size_class(nbytes: int) -> int:
    """Bytes of the block to use: at most an eighth more than asked for, and whole pages."""
    if nbytes <= SMALLEST:
        return SMALLEST
    step = max(PAGE, 1 << (nbytes - 1).bit_length() - 4)
    return -(-nbytes // step) * step


def _fits(place: Place, info: SegmentInfo | Segment) -> bool:
    """Whether a place that the other process names lies within a block of the segment."""
    return (
        0 <= place.block < info.blocks
        and place.nbytes > 0
        and place.offset >= 0
        and place.offset + place.nbytes <= info.block
    )


def _place_at(
    address: int,
    nbytes: int,
    bases: list[tuple[int, int]],
    infos: Callable[[int], SegmentInfo | Segment],
) -> Place | None:
    """The place of some bytes, if they lie within a block of a segment."""
    at = bisect_right(bases, (address, MAX_SEGMENTS << 32)) - 1
    if at < 0:
        return None
    base, ident = bases[at]
    info = infos(ident)
    index, offset = divmod(address - base - PAGE, info.block)
    place = Place(ident, index, offset, nbytes)
    return place if _fits(place, info) else None


class _Borrowed:
    """A segment of the other process."""

    def __init__(self, info: SegmentInfo, fd: int) -> None:
        self.info = info
        # What the owner has not touched costs nothing here either.
        self.mapping = _Mapping(fd, info.nbytes, os.fstat(fd).st_blocks * 512 >= info.nbytes)
        self.base = self.mapping.address
        self._pid = os.getpid()
        self._counters = self.mapping.counters(info.blocks)
        self._counts = [0] * info.blocks
        self._pending: deque[int] = deque()
        self._lock = threading.Lock()

    def view(self, place: Place) -> memoryview:
        offset = PAGE + place.block * self.info.block + place.offset
        index = place.block
        return self.mapping.memory(offset, place.nbytes, lambda: self.give_back(index))

    def give_back(self, index: int) -> None:
        """One that was lent is not needed any more. From any thread, also from a finaliser."""
        if os.getpid() != self._pid:
            return  # a fork: the parent has it still
        self._pending.append(index)
        # Whoever holds the lock takes this one too; what comes in the moment before it is let go
        # is taken along by the next.
        while self._pending and self._lock.acquire(blocking=False):
            try:
                while self._pending:
                    back = self._pending.popleft()
                    self._counts[back] = count = (self._counts[back] + 1) & 0xFFFFFFFF
                    self._counters[back] = count
            finally:
                self._lock.release()


class Loans:
    """The segments that the other process has passed here."""

    def __init__(self) -> None:
        self._segments: dict[int, _Borrowed] = {}
        self._bases: list[tuple[int, int]] = []  # address and number, in order of the addresses

    def __contains__(self, ident: int) -> bool:
        return ident in self._segments

    def add(self, info: SegmentInfo, fd: int) -> None:
        """Take a segment; ``fd`` stays the caller's.

        Raises
        ------
        ProtocolError
            It is not what the other process says, or could shrink under a reader.
        """
        if (
            info.ident in self._segments
            or len(self._segments) >= MAX_SEGMENTS
            or not 0 < info.blocks <= MAX_BLOCKS
            or not 0 < info.block <= MAX_BLOCK
            or info.block % PAGE
        ):
            raise ProtocolError(f"segment {info.ident} of {info.blocks} blocks of {info.block}")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS or os.fstat(fd).st_size != info.nbytes:
                raise ProtocolError(f"segment {info.ident} is not sealed, or has another size")
            segment = self._segments[info.ident] = _Borrowed(info, fd)
            self._bases = sorted([*self._bases, (segment.base, info.ident)])
        except (OSError, ValueError) as error:
            raise ProtocolError(f"segment {info.ident} can't be used: {error}") from error

    def view(self, place: Place) -> memoryview:
        """The memory of a place; given back when the view and all made from it is gone.

        Raises
        ------
        ProtocolError
            There is no such place.
        """
        segment = self._segments.get(place.segment)
        if segment is None or not _fits(place, segment.info):
            raise ProtocolError(f"no memory was passed for {place}")
        return segment.view(place)

    def written(self, place: Place) -> memoryview:
        """Where its owner says how much of a block it has written, for a place that has a view."""
        return self._segments[place.segment].mapping.written(place.block)

    def drop(self, ident: int) -> None:
        """The owner no longer uses a segment."""
        if self._segments.pop(ident, None) is not None:
            self._bases = [base for base in self._bases if base[1] != ident]

    def find(self, view: memoryview) -> Place | None:
        """Where a flat view lies, if that is within a block of a segment of the other process.

        From the thread that sends.
        """
        bases, segments = self._bases, self._segments
        if not view.nbytes or not bases:
            return None
        try:
            return _place_at(
                address_of(view), view.nbytes, bases, lambda ident: segments[ident].info
            )
        except KeyError:
            return None  # dropped meanwhile

    def close(self) -> None:
        self._segments.clear()
        self._bases = []
