"""Arrays whose bytes are on their way to a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gpuremote.backend.base import Backend
from gpuremote.ops.meta import Meta
from gpuremote.server.storage import Slot, Storage
from gpuremote.transport.base import Target

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Arrival", "Ready", "Upload"]

READY: Final = 4 << 20
"""Bytes of an array up to which there is memory before it is announced."""
IN_A_LOOP: Final = 3
"""Arrays that a program has at a time which uploads the next one before it drops the last."""


class Arrival:
    """One array, and where its bytes go.

    Its memory is counted from the beginning, and allocated when the bytes are about to come:
    they may lie in memory already that can be kept.

    Attributes
    ----------
    target : memoryview or DeviceTarget
        What is to be filled; after ``place``.
    digest : bytes
        What the client offered; empty: nothing.
    kept : bool
        The server may keep what comes.
    """

    __slots__ = ("_array", "digest", "kept", "meta", "slot", "storage", "target")

    target: Target

    def __init__(self, slot: Slot, meta: Meta, storage: Storage) -> None:
        self.slot = slot
        self.meta = meta
        self.storage = storage
        self.digest = b""
        self.kept = False
        self._array: Any = None

    @property
    def placed(self) -> bool:
        """Whether its bytes are coming."""
        return self._array is not None

    @property
    def array(self) -> Any:
        """The backend's array, after ``place``."""
        return self._array

    @property
    def view(self) -> memoryview:
        """Flat bytes to be filled, where ``place`` was not told that what comes is direct."""
        assert isinstance(self.target, memoryview)
        return self.target

    def place(
        self, backend: Backend, adopted: memoryview | None = None, *, direct: bool = False
    ) -> None:
        """See to memory for the bytes: ``adopted``, where they lie already, if the backend can
        keep that. With ``direct`` whoever brings them takes the memory of a device as well.

        Raises
        ------
        Exception
            Whatever the backend says when it has none.
        """
        if self._array is not None:
            return
        meta = self.meta
        if adopted is not None:
            array = backend.adopt(adopted, meta.shape, meta.dtype)
            if array is not None:
                self._array, self.target = array, adopted
                return
        self._array = backend.empty(meta.shape, meta.dtype, meta.device)
        if direct:
            self.target = backend.receive_target(self._array)
        else:
            self.target = backend.receive_view(self._array)

    def fill(self, backend: Backend) -> None:
        """Every byte is there: give the slot its value."""
        backend.received(self._array, self.target)
        self.slot.fill(self._array, self.meta, self.storage)


class Upload:
    """Arrays whose bytes are coming.

    Attributes
    ----------
    numbers : list of int
        Their records.
    scratch : Storage or None
        Memory for what nobody wants, counted until all is here.
    """

    __slots__ = ("numbers", "scratch")

    def __init__(self, numbers: list[int], scratch: Storage | None = None) -> None:
        self.numbers = numbers
        self.scratch = scratch


class Ready:
    """Makes ready for an upload like the one before, as programs upload the same shape again and
    again: its memory is there when it is announced. It is counted from then on.

    The part in C takes it, see ``native/arriving.c``; the twin does not.
    """

    def __init__(self, session: WorkerSession, arriving: dict[int, Arrival]) -> None:
        self._number = 0
        self._record = b""
        self._session = session
        self._arriving = arriving
        self._memory: list[tuple[Any, memoryview]] = []

    def heard(self, number: int, record: bytes) -> None:
        """A batch ended with this PUT."""
        self._number, self._record = number, record

    def keep(self, number: int, arrival: Arrival) -> None:
        """Keep the memory of an upload that is here for further ones, while nobody else refers to
        it."""
        peer, view, meta = self._session.peer, arrival.target, arrival.meta
        connection = peer.connection
        if (
            number != self._number
            or arrival.kept  # others may be given what comes: that is more to be done
            or connection is None
            or not connection.expects
            or not peer.direct
            or not isinstance(view, memoryview)
            or not 0 < view.nbytes <= READY
            or type(arrival.array) is not np.ndarray  # of which it is known who refers to it
        ):
            return
        if (
            peer.ready is None
            or peer.ready[:2] != (self._record, meta)
            or peer.ready[-1] is not connection
        ):
            self._memory = []
        elif len(self._memory) >= IN_A_LOOP:
            return
        self._memory.append((arrival.array, view))
        quota, arriving = self._session.quota, self._arriving
        memory = self._memory
        peer.ready = self._record, meta, meta.nbytes, quota, arriving, Arrival, memory, connection

    def drop(self) -> None:
        """Nothing has come for a while."""
        with self._session.lock:
            self._session.peer.ready = None
            self._memory = []
