"""What a session holds on the server: slots (what a handle names), storages (memory), quota."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gpuremote._speed import native
from gpuremote.errors import GpuRemoteError, OutOfDeviceMemory
from gpuremote.ops.meta import Meta

__all__ = ["Failure", "Quota", "Slot", "Storage"]


class Failure(NamedTuple):
    """Why a slot has no value: the record that failed first, and how.

    Attributes
    ----------
    number : int
        Number of the record that failed (not of one that depended on it).
    """

    number: int
    code: int
    message: str
    op: str

    @classmethod
    def of(cls, number: int, op: str, error: GpuRemoteError) -> Failure:
        return cls(number, error.code, error.message, op)


class PythonTally:
    """Bytes in use, and how many there may be."""

    __slots__ = ("_lock", "limit", "peak", "used")

    def __init__(self, limit: int, /) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()

    def count(self, nbytes: int, /) -> bool:
        """Count ``nbytes`` as used; False if they do not fit, and then nothing was counted."""
        with self._lock:
            used = self.used + nbytes
            if used > self.limit:
                return False
            self.used = used
            if used > self.peak:
                self.peak = used
            return True

    def release(self, nbytes: int, /) -> None:
        """They are no longer used."""
        with self._lock:
            self.used -= nbytes


Tally = PythonTally
if not TYPE_CHECKING and native is not None:
    Tally = native.Tally


class Quota(Tally):
    """Device memory that one session may hold, in bytes. Checked before allocation.

    Attributes
    ----------
    spare : callable or None
        Called before something is refused, with the bytes that are missing: gives back what can
        be spared.
    """

    __slots__ = ("spare",)

    spare: Callable[[int], None] | None

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.spare = None

    def reserve(self, nbytes: int) -> None:
        """Count ``nbytes`` as used.

        Raises
        ------
        OutOfDeviceMemory
            They do not fit; nothing was counted.
        """
        if self.count(nbytes):
            return
        if self.spare is not None:
            self.spare(self.used + nbytes - self.limit)
            if self.count(nbytes):
                return
        raise OutOfDeviceMemory(
            f"{nbytes} bytes do not fit: {self.used} of {self.limit} bytes are in use; "
            "drop arrays that are no longer needed, or ask for a larger memory limit"
        )


class PythonStorage:
    """One allocation, shared by an array and its views; its bytes go back with the last of them.

    Made before the memory itself, so that nothing is allocated that is not counted.

    Attributes
    ----------
    outgoing : int
        Transfers that still read this memory; an op that writes to it waits for them.

    Raises
    ------
    OutOfDeviceMemory
        ``nbytes`` do not fit in the quota.
    """

    __slots__ = ("_nbytes", "_quota", "outgoing")

    def __init__(self, quota: Quota, nbytes: int, /) -> None:
        self._nbytes = 0
        self._quota = quota
        self.outgoing = 0
        quota.reserve(nbytes)
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        """Bytes that are counted for it."""
        return self._nbytes

    def split(self, sizes: Sequence[int], /) -> list[PythonStorage]:
        """Hand the bytes over to one storage for each of ``sizes``."""
        parts = []
        for nbytes in sizes:
            part = PythonStorage(self._quota, 0)
            part._nbytes = nbytes
            self._nbytes -= nbytes
            parts.append(part)
        return parts

    def __del__(self) -> None:
        if self._nbytes:
            self._quota.release(self._nbytes)


Storage = PythonStorage
if not TYPE_CHECKING and native is not None:
    Storage = native.Storage


class PythonSlot:
    """What a handle names: a value, or the failure in its place, or neither yet."""

    __slots__ = ("failure", "meta", "storage", "value")

    value: Any
    storage: Storage | None
    meta: Meta | None
    failure: Failure | None

    def __init__(self) -> None:
        self.value = None
        self.storage = None
        self.meta = None
        self.failure = None

    @property
    def pending(self) -> bool:
        return self.value is None and self.failure is None

    def fill(self, value: Any, meta: Meta, storage: Storage, /) -> None:
        # The value last: another stream's thread looks at it without a lock.
        self.meta = meta
        self.storage = storage
        self.value = value

    def poison(self, failure: Failure, /) -> None:
        self.failure = failure
        self.value = None
        self.storage = None


Slot = PythonSlot
if not TYPE_CHECKING and native is not None:
    Slot = native.Slot

STALLED: Final = object()
"""What a queued item returns when it can't run yet."""
