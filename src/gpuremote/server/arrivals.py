"""Arrays whose bytes are on their way to a session."""

from __future__ import annotations

from typing import Any

from gpuremote.backend.base import Backend
from gpuremote.ops.meta import Meta
from gpuremote.server.storage import Slot, Storage
from gpuremote.transport.base import Target

__all__ = ["Arrival", "Upload"]


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
