"""What a session holds on the server: slots (what a handle names), storages (memory), quota."""

from __future__ import annotations

import threading
from typing import Any, Final, NamedTuple

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


class Quota:
    """Device memory that one session may hold, in bytes. Checked before allocation."""

    __slots__ = ("_lock", "limit", "peak", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> None:
        """Count ``nbytes`` as used.

        Raises
        ------
        OutOfDeviceMemory
            They do not fit; nothing was counted.
        """
        with self._lock:
            used = self.used + nbytes
            if used > self.limit:
                raise OutOfDeviceMemory(
                    f"{nbytes} bytes do not fit: {self.used} of {self.limit} bytes are in use; "
                    "drop arrays that are no longer needed, or ask for a larger memory limit"
                )
            self.used = used
            if used > self.peak:
                self.peak = used

    def release(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes


class Storage:
    """One allocation, shared by an array and its views; its bytes go back with the last of them.

    Attributes
    ----------
    root : object
        The backend's identity of the allocation.
    outgoing : int
        Transfers that still read this memory; an op that writes to it waits for them.
    """

    __slots__ = ("_nbytes", "_quota", "outgoing", "root")

    def __init__(self, quota: Quota, nbytes: int, root: Any) -> None:
        self._quota = quota
        self._nbytes = nbytes
        self.root = root
        self.outgoing = 0

    def __del__(self) -> None:
        self._quota.release(self._nbytes)


class Slot:
    """What a handle names: a value, or the failure in its place, or neither yet."""

    __slots__ = ("failure", "meta", "storage", "stream", "value")

    value: Any
    storage: Storage | None
    meta: Meta | None
    failure: Failure | None

    def __init__(self, stream: int) -> None:
        self.value = None
        self.storage = None
        self.meta = None
        self.failure = None
        self.stream = stream
        """The stream that fills it."""

    @property
    def pending(self) -> bool:
        return self.value is None and self.failure is None

    def fill(self, value: Any, meta: Meta, storage: Storage) -> None:
        # The value last: another stream's thread looks at it without a lock.
        self.meta = meta
        self.storage = storage
        self.value = value

    def poison(self, failure: Failure) -> None:
        self.failure = failure
        self.value = None
        self.storage = None


STALLED: Final = object()
"""What a queued item returns when it can't run yet."""
