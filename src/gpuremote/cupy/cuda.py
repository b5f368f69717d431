"""Devices, streams, events and memory figures under CuPy's names."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final, Self

from gpuremote.client.blocking import BlockingDevice, BlockingEvent, BlockingStream
from gpuremote.cupy import _home

__all__ = [
    "Device",
    "Event",
    "MemoryPool",
    "Stream",
    "get_current_stream",
    "get_elapsed_time",
    "is_available",
    "runtime",
]


class Device:
    """A device of the default session, by its number; the one in use without a number.

    ``with Device(1):`` makes arrays there.

    Attributes
    ----------
    id : int
    """

    def __init__(self, device: Any = None) -> None:
        self._remote: BlockingDevice = _home.device_of(device)
        self._entered: list[Any] = []

    @property
    def id(self) -> int:
        return self._remote.index

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return getattr(other, "_remote", other) is self._remote

    def __hash__(self) -> int:
        return hash(self._remote)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}: {self._remote.name}>"

    def __enter__(self) -> Self:
        entered = _home.using(self._remote)
        entered.__enter__()
        self._entered.append(entered)
        return self

    def __exit__(self, *exc: object) -> None:
        self._entered.pop().__exit__(None, None, None)

    def use(self) -> Self:
        """Make arrays of this thread or task there from now on."""
        _home._in_use.set(self._remote)
        return self

    def synchronize(self) -> None:
        """Wait for everything issued; raises what failed."""
        self._remote.synchronize()

    @property
    def mem_info(self) -> tuple[int, int]:
        """Bytes that are free and bytes in all, of what this session may use (a round trip)."""
        stats = self._remote._core.owner.server_stats()
        return stats["memory_limit"] - stats["memory_used"], stats["memory_limit"]


class Stream:
    """An ordered queue of work on a device. Work in different streams is not ordered.

    Parameters
    ----------
    null : bool
        The default stream.
    non_blocking, ptds
        CuPy's; streams never block each other here.
    """

    null: Stream

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self._null = null
        self._made: BlockingStream | None = None
        self._entered = 0

    @property
    def _stream(self) -> BlockingStream | None:
        if self._null:
            return None
        if self._made is None:
            self._made = _home.current().stream()
        return self._made

    def __enter__(self) -> Self:
        stream = self._stream
        if stream is not None:
            stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._made is not None:
            self._made.__exit__(*exc)

    def use(self) -> Self:
        """Issue into it from now on, in this thread or task."""
        before = _used.get()
        if before is not None and before._stream is not None:
            before.__exit__(None, None, None)
        _used.set(self)
        return self.__enter__()

    def synchronize(self) -> None:
        """Wait for what was issued in it; raises what failed."""
        stream = self._stream
        (_home.session() if stream is None else stream).synchronize()

    def record(self, event: Event | None = None) -> Event:
        """An event at what the stream has been given so far."""
        found = Event() if event is None else event
        found.record(self)
        return found

    def wait_event(self, event: Event) -> None:
        """What is issued in it from now on runs after the event; this thread does not wait."""
        stream = self._stream
        if stream is None:
            event._recorded().synchronize()
        else:
            stream.wait(event._recorded())


Stream.null = Stream(null=True)
_used: ContextVar[Stream | None] = ContextVar("gpuremote_cupy_stream", default=None)
"""What ``Stream.use`` has put in use."""


class Event:
    """A point in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._event: BlockingEvent | None = None

    def record(self, stream: Stream | None = None) -> None:
        found = None if stream is None else stream._stream
        device: BlockingDevice = _home.current() if found is None else found.device  # type: ignore[assignment]
        self._event = BlockingEvent(device._core, found)

    def _recorded(self) -> BlockingEvent:
        if self._event is None:
            raise RuntimeError("the event has not been recorded")
        return self._event

    def synchronize(self) -> None:
        self._recorded().synchronize()

    @property
    def done(self) -> bool:
        """Whether the stream has come to it (a round trip)."""
        return self._recorded().query()


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events that were reached."""
    return start_event._recorded().elapsed_time(end_event._recorded())


def get_current_stream() -> Stream:
    """What ``Stream.use`` has put in use, else the default stream."""
    return _used.get() or Stream.null


def is_available() -> bool:
    """Whether the devices of the default session are CUDA devices."""
    return _home.session().devices[0].kind == "cuda"


class MemoryPool:
    """Figures of the session's memory on its device; each is a round trip."""

    def _stats(self) -> dict[str, Any]:
        return _home.session().server_stats()

    def used_bytes(self) -> int:
        """Bytes of the arrays that are alive."""
        return int(self._stats()["memory_used"])

    def total_bytes(self) -> int:
        """Bytes that were in use at most."""
        return int(self._stats()["memory_peak"])

    def get_limit(self) -> int:
        """Bytes that this session may hold."""
        return int(self._stats()["memory_limit"])

    def free_bytes(self) -> int:
        stats = self._stats()
        return int(stats["memory_limit"] - stats["memory_used"])

    def free_all_blocks(self, stream: Any = None) -> None:
        """Tell the server of arrays that were dropped."""
        _home.session().flush()


class _Runtime:
    @staticmethod
    def getDeviceCount() -> int:
        return len(_home.session().devices)

    @staticmethod
    def deviceSynchronize() -> None:
        _home.session().synchronize()


runtime: Final = _Runtime()
"""The two calls of CUDA's runtime that portable programs make."""
