"""Arrays whose bytes are on their way to a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from gpuremote.backend.base import Backend
from gpuremote.ops.meta import Meta
from gpuremote.server.storage import Quota, Slot, Storage
from gpuremote.transport.base import Connection, Target

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["IN_A_LOOP", "READY", "Arrival", "Prepared", "Ready", "Upload"]

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


class Prepared(NamedTuple):
    """What the part in C is to know of an upload before its record comes.

    Attributes
    ----------
    record : bytes
        That of the upload before.
    batch : int
        Bytes of the batch that ended with it: of the next one nothing behind that is received.
    meta, nbytes
        What it announces.
    quota : Quota
        Where its bytes count.
    arriving : dict
        What is on its way, by number.
    arrival : type
        Of what is on its way.
    memory : list or None
        Arrays and their bytes, for as many as a loop has at a time; None: none is kept.
    place : callable
        Sees to memory, where all of that is in use.
    connection : Connection
        Over which it comes.
    """

    record: bytes
    batch: int
    meta: Meta
    nbytes: int
    quota: Quota
    arriving: dict[int, Arrival]
    arrival: type[Arrival]
    memory: list[tuple[Any, memoryview]] | None
    place: Callable[[int, Arrival], bool]
    connection: Connection


class Ready:
    """Makes ready for an upload like the one before, as programs upload the same shape again and
    again: unless it is large, its memory is there when it is announced. It is counted from then on.

    The part in C takes it, see ``native/arriving.c``; the twin does not.
    """

    def __init__(self, session: WorkerSession, arriving: dict[int, Arrival]) -> None:
        self._number = 0
        self._record = b""
        self._batch = 0
        self._session = session
        self._arriving = arriving
        self._memory: list[tuple[Any, memoryview]] = []

    def heard(self, number: int, record: bytes, batch: int) -> None:
        """A batch of that many bytes ended with this PUT."""
        self._number, self._record, self._batch = number, record, batch

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
            or type(arrival.array) is not np.ndarray  # of which it is known who refers to it
        ):
            return
        before = peer.ready
        if (
            not isinstance(before, Prepared)
            or before.record != self._record
            or before.meta != meta
            or before.connection is not connection
        ):
            self._memory = []
        if view.nbytes <= READY and len(self._memory) < IN_A_LOOP:
            self._memory.append((arrival.array, view))
        peer.ready = Prepared(
            self._record,
            self._batch,
            meta,
            meta.nbytes,
            self._session.quota,
            self._arriving,
            Arrival,
            self._memory or None,
            self._place,
            connection,
        )

    def _place(self, number: int, arrival: Arrival) -> bool:
        """See to memory for one like it, where none is there that nobody refers to."""
        ready = self._session.peer.ready
        assert isinstance(ready, Prepared)
        self.heard(number, ready.record, ready.batch)
        return self._session.place(number, arrival, "put")

    def drop(self) -> None:
        """Nothing has come for a while."""
        with self._session.lock:
            self._session.peer.ready = None
            self._memory = []
