"""Memory that a card may read and write: registered when it is needed, and kept registered where
that is safe. Private.

This is the one place that registers what a program lends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from gpuremote.memory.cuda import Allocation, CudaDriver, CudaError
from gpuremote.memory.device import DeviceMemory
from gpuremote.transport.rdma.gpu import Direct
from gpuremote.transport.verbs.base import Access, Device, Memory, VerbsError

__all__ = ["Block", "Registered", "Registry", "Slabs", "address_of", "anonymous"]

CACHED_BYTES: Final = 4 << 30
"""Memory that stays registered although no transfer uses it, for each device."""
CACHED_ENTRIES: Final = 4096
SLAB: Final = 16 << 20
"""Bytes of a slab; one larger request gets a slab of its own."""
MAX_SLABS: Final = 256 << 20
"""Bytes of all slabs of a connection."""
_PAGE: Final = 4096


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_get = ctypes.pythonapi.PyObject_GetBuffer
_get.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = [ctypes.POINTER(_Buffer)]
_release.restype = None


def address_of(view: memoryview) -> int:
    """Where the bytes of a contiguous view lie, read-only or not."""
    found = _Buffer()
    _get(view, ctypes.byref(found), 0)
    address = found.buf or 0
    _release(ctypes.byref(found))
    return address


def anonymous(size: int) -> tuple[memoryview, int]:
    """New memory, on pages of its own, and its address."""
    view = memoryview(mmap.mmap(-1, size))
    return view, address_of(view)


def exporter_of(view: memoryview) -> Any:
    """Whose memory it is, if that can be watched; else None.

    A view made for the occasion (an array that is a part of another one, say) is not the owner:
    its base is.
    """
    owner: Any = view.obj
    while (base := getattr(owner, "base", None)) is not None:
        owner = base.obj if isinstance(base, memoryview) else base
    return _watched(owner)


_Key: TypeAlias = tuple[int, int, int, int]


class Registered:
    """Memory that is registered, for one user or for several.

    Attributes
    ----------
    address, size : int
    lkey, rkey : int
    users : int
        Transfers that need it.
    """

    __slots__ = (
        "_memory",
        "_shift",
        "address",
        "device",
        "kept",
        "key",
        "lkey",
        "owner",
        "registry",
        "rkey",
        "size",
        "users",
    )

    def __init__(
        self,
        memory: Memory,
        address: int,
        size: int,
        registry: Registry | None = None,
        first: int | None = None,
    ) -> None:
        self._memory: Memory | None = memory
        self.registry = registry
        self._shift = 0 if first is None else first - address
        self.address = address
        self.size = size
        self.lkey = memory.lkey
        self.rkey = memory.rkey
        self.users = 1
        self.key: _Key = (0, 0, 0, 0)
        self.owner: weakref.ref[Any] | None = None
        self.kept = False  # in the cache
        self.device: tuple[CudaDriver, Allocation] | None = None  # it is a GPU's allocation

    def at(self, address: int) -> int:
        """What a card calls this address: memory of a GPU may be counted from its beginning."""
        return address + self._shift

    def release(self) -> None:
        """See :meth:`Registry.release`."""
        assert self.registry is not None
        self.registry.release(self)

    def close(self) -> None:
        self.owner = None  # which holds this one
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()


def _watched(owner: Any) -> Any:
    """The owner, if it can be watched; else None."""
    try:
        weakref.ref(owner)
    except TypeError:
        return None
    return owner


def _owner_gone(entry: Registered, dead: deque[_Key], _: object) -> None:
    # Called before the owner's memory is free: a peer that still has the key must not get at what
    # comes to lie there. Nothing here waits for a lock of this package.
    with contextlib.suppress(VerbsError):
        entry.close()
    dead.append(entry.key)


class Registry:
    """What of a program's memory is registered with one device.

    Registering costs about as much as sending a few hundred kilobytes, so it outlives the transfer
    where the memory's owner can be watched: until the owner is collected, or until more than
    ``limit`` bytes are kept (those that were used least lately go first, none that is in use).
    Addresses are reused by the system and identities by Python, so an entry counts only for the
    same range, access and owner, and only while that owner lives: with it the registration goes, so
    that a key the peer has never opens memory of anything else. Memory that the peer writes to is
    registered anew for each transfer that overlaps another in time: taking it back must not break
    the other one.

    Parameters
    ----------
    device : Device
    limit : int
        Bytes that stay registered without being in use.
    """

    def __init__(self, device: Device, limit: int = CACHED_BYTES) -> None:
        self._device = device
        self._limit = limit
        self._entries: OrderedDict[_Key, Registered] = OrderedDict()
        self._bytes = 0
        self._live: set[Registered] = set()
        # Filled by finalisers, which may run anywhere.
        self._dead: deque[_Key] = deque()
        self._slabs: list[tuple[int, int, Registered]] = []
        self.direct = Direct(device)
        self.made = 0
        self.reused = 0

    @property
    def kept(self) -> int:
        """Bytes in the cache."""
        return self._bytes

    def add_slab(self, address: int, size: int) -> None:
        """Register memory whose parts will be sent.

        Raises
        ------
        VerbsError
        """
        memory = self._device.register(address, size, Access.READ_HERE)
        self._slabs.append((address, address + size, Registered(memory, address, size, self)))

    def acquire(self, view: memoryview, offset: int, size: int, access: Access) -> Registered:
        """Registered memory for ``size`` bytes of ``view``; to be given to :meth:`release`.

        Raises
        ------
        VerbsError
        """
        self.tidy()
        address = address_of(view) + offset
        if access is Access.READ_HERE:
            for begin, end, slab in self._slabs:
                if begin <= address and address + size <= end:
                    slab.users += 1
                    return slab
        owner = exporter_of(view)
        key = (address, size, int(access), id(owner))
        found = self._entries.get(key) if owner is not None else None
        if found is not None and found.owner is not None and found.owner() is owner:
            if not found.users or access is Access.READ_HERE:
                self._entries.move_to_end(key)
                found.users += 1
                self.reused += 1
                return found
            owner = None  # in use: another one, for this transfer only
        elif found is not None:
            self._forget(found)
        entry = Registered(self._register(address, size, access), address, size, self)
        self._live.add(entry)
        if owner is not None:
            self._keep(entry, key, owner)
        return entry

    def acquire_device(
        self, memory: DeviceMemory, offset: int, size: int, access: Access
    ) -> Registered | None:
        """The same for a GPU's memory; None where the card can't get at it: it has to be staged.

        What is only read is registered with its whole allocation, which libraries cut many arrays
        from, and kept for as long as the driver knows that allocation by the same number. What is
        written to is registered as exactly that, and kept while its owner lives, if that can be
        watched: no key that the peer has ever opens anything else.

        Raises
        ------
        VerbsError
        """
        self.tidy()
        begin = memory.pointer + offset
        try:
            allocation = memory.driver.allocation(begin)
            self._drop_freed()
        except CudaError as error:
            self.direct.refuse(str(error))
            return None
        owner: Any = None
        if access is Access.READ_HERE:
            start, length, whose = allocation.base, allocation.size, -allocation.ident
            if begin + size > start + length:
                start, length = begin, size  # in several allocations; refused below
        else:
            start, length, owner = begin, size, _watched(memory.owner)
            whose = id(owner)
        key = (start, length, int(access), whose)
        found = self._entries.get(key)
        if found is not None and (found.owner is None or found.owner() is owner):
            if not found.users or access is Access.READ_HERE:
                self._entries.move_to_end(key)
                found.users += 1
                self.reused += 1
                return found
            owner = None  # in use: another one, for this transfer only
        elif found is not None:
            self._forget(found)
        made = self.direct.register(memory, allocation, start, length, access)
        if made is None:
            return None
        self.made += 1
        entry = Registered(made[0], start, length, self, made[1])
        self._live.add(entry)
        if access is Access.READ_HERE:
            entry.device = memory.driver, allocation
            self._keep(entry, key, None)
        elif owner is not None:
            self._keep(entry, key, owner)
        return entry

    def _drop_freed(self) -> None:
        """Forget allocations that are gone: what is registered would keep a GPU's memory."""
        for entry in [e for e in self._entries.values() if e.device is not None and not e.users]:
            assert entry.device is not None
            driver, known = entry.device
            try:
                gone = driver.allocation(known.base).ident != known.ident
            except CudaError:
                gone = True
            if gone:
                self._forget(entry)

    def _keep(self, entry: Registered, key: _Key, owner: Any) -> None:
        entry.key = key
        if owner is not None:
            entry.owner = weakref.ref(owner, functools.partial(_owner_gone, entry, self._dead))
        entry.kept = True
        self._entries[key] = entry
        self._bytes += entry.size
        self._shrink(self._limit)

    def _register(self, address: int, size: int, access: Access) -> Memory:
        self.made += 1
        try:
            return self._device.register(address, size, access)
        except VerbsError as error:
            if error.errno != errno.ENOMEM or not self._entries:
                raise
        # What is kept for later counts against what may be locked.
        self._shrink(0)
        return self._device.register(address, size, access)

    def release(self, entry: Registered) -> None:
        """A transfer does not need it any more."""
        entry.users -= 1
        if not entry.users and not entry.kept:
            self._close(entry)
        elif self._bytes > self._limit:
            self._shrink(self._limit)

    def revoke(self, entry: Registered) -> None:
        """On return nobody can write there; one that tries loses its queue pair."""
        self._forget(entry)
        self._close(entry)

    def tidy(self) -> None:
        """Let go of what belonged to owners that are gone."""
        while self._dead:
            entry = self._entries.get(self._dead.popleft())
            if entry is not None and (entry.owner is None or entry.owner() is None):
                self._forget(entry)

    def _forget(self, entry: Registered) -> None:
        if entry.kept:
            entry.kept = False
            del self._entries[entry.key]
            self._bytes -= entry.size
            if not entry.users:
                self._close(entry)

    def _close(self, entry: Registered) -> None:
        self._live.discard(entry)
        entry.close()

    def _shrink(self, limit: int) -> None:
        for entry in list(self._entries.values()):
            if self._bytes <= limit and len(self._entries) <= CACHED_ENTRIES:
                return
            if not entry.users:
                self._forget(entry)

    def close(self) -> None:
        """Unregister everything, whoever uses it."""
        self._entries.clear()
        self._bytes = 0
        while self._live:
            entry = self._live.pop()
            entry.kept = False
            with contextlib.suppress(VerbsError):
                entry.close()
        for _, _, slab in self._slabs:
            slab.close()
        self._slabs.clear()


class Block:
    """A part of a slab that was given out."""

    __slots__ = ("size", "slab", "start")

    def __init__(self, slab: _Slab, start: int, size: int) -> None:
        self.slab = slab
        self.start = start
        self.size = size


class _Slab:
    """Memory from which blocks are given out, first fit."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.address = address_of(memoryview(self.memory))
        self.size = size
        self.free = [(0, size)]

    def take(self, size: int) -> int | None:
        for position, (start, room) in enumerate(self.free):
            if room >= size:
                rest = [(start + size, room - size)] if room > size else []
                self.free[position : position + 1] = rest
                return start
        return None

    def give(self, start: int, size: int) -> None:
        free = sorted([*self.free, (start, size)])
        merged = free[:1]
        for begin, room in free[1:]:
            last, length = merged[-1]
            if last + length == begin:
                merged[-1] = (last, length + room)
            else:
                merged.append((begin, room))
        self.free = merged


class Slabs:
    """Memory that is registered before anybody sends it.

    Parameters
    ----------
    registries : sequence of Registry
        Of every device that may send it.
    limit : int
        Bytes of all slabs.
    """

    def __init__(self, registries: Sequence[Registry], limit: int = MAX_SLABS) -> None:
        self._registries = registries
        self._limit = limit
        self._slabs: list[_Slab] = []
        self._returned: deque[Block] = deque()  # by finalisers

    def allocate(self, size: int) -> memoryview | None:
        """Writable flat bytes; None where there is no such memory."""
        if size <= 0:
            return None
        while self._returned:
            block = self._returned.popleft()
            block.slab.give(block.start, block.size)
        room = -(-size // _PAGE) * _PAGE
        for slab in self._slabs:
            if (start := slab.take(room)) is not None:
                return self._view(slab, start, room, size)
        grown = self._grow(room)
        if grown is None or (start := grown.take(room)) is None:
            return None
        return self._view(grown, start, room, size)

    def _grow(self, room: int) -> _Slab | None:
        wanted = max(SLAB, room)
        if sum(slab.size for slab in self._slabs) + wanted > self._limit:
            return None
        slab = _Slab(wanted)
        # Kept in any case: some device may have it registered when another refuses.
        self._slabs.append(slab)
        try:
            for registry in self._registries:
                registry.add_slab(slab.address, slab.size)
        except VerbsError:
            slab.free = []
            return None  # memory that is sent in the ordinary way has to do
        return slab

    def _view(self, slab: _Slab, start: int, room: int, size: int) -> memoryview:
        # Everything that is made from the view keeps this object, and it can be watched.
        exporter = (ctypes.c_ubyte * size).from_buffer(slab.memory, start)
        finalizer = weakref.finalize(exporter, self._returned.append, Block(slab, start, room))
        finalizer.atexit = False
        return memoryview(exporter).cast("B")
