"""What a transport is: it moves messages and memory between two peers, and knows neither
tensors nor sessions.

A *message* is a short header and any number of regions (host memory). The receiver learns
the header and the sizes first, then says where the bytes go (``Incoming.into``): payload
bytes are touched by the kernel or the NIC only.

Nothing here blocks, apart from ``Connection.receive(wait=...)``. A connection offers a file
descriptor to watch and steps that do what is possible now; a driver (asyncio, or the thread
of the caller) decides when.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from gpuremote._types import BytesLike
from gpuremote.errors import InvalidBuffer
from gpuremote.memory.device import DeviceMemory, DeviceTarget

__all__ = ["LONG_BURST", "Connection", "Incoming", "Region", "Target", "TransportStats"]

LONG_BURST: Final = 64 << 20
"""Bytes that one step sends where a thread has little else to do: some milliseconds on a fast way,
in which other threads of the session wait."""

Target: TypeAlias = memoryview | DeviceTarget
"""Where a region's bytes go."""


class Region:
    """Memory that a connection may read from or write into.

    Holds the exporter alive (a memoryview does) until :meth:`release`.

    Parameters
    ----------
    buffer : object with the buffer protocol, or DeviceMemory
        C-contiguous memory of any format; or memory of a GPU to read from, with everything done
        that was queued to write there.
    steady : bool
        Nobody writes to it before the other end has said (by other means than the connection's)
        that it has the bytes: it may take them from where they lie.

    Attributes
    ----------
    source : memoryview or DeviceMemory
        Where the bytes are; of the host's memory a flat view. For a connection that reads a GPU's
        memory (``Connection.takes_device``).
    nbytes : int
        Its size in bytes.

    Raises
    ------
    InvalidBuffer
        The memory is not C-contiguous, or the object exports none.
    """

    __slots__ = ("_view", "nbytes", "source", "steady")

    source: memoryview | DeviceMemory

    def __init__(self, buffer: Any, steady: bool = False) -> None:
        self.steady = steady
        if isinstance(buffer, DeviceMemory):
            self._view: memoryview | None = None
            self.source = buffer
        else:
            self.source = self._view = flat_view(buffer)
        self.nbytes = self.source.nbytes

    @property
    def view(self) -> memoryview:
        """The bytes as a flat view of the host's memory. Those of a GPU are copied when this is
        first asked for.

        Raises
        ------
        CudaError
        """
        if self._view is None:
            assert isinstance(self.source, DeviceMemory)
            copy = memoryview(bytearray(self.nbytes))
            self.source.copy_to(copy)
            self._view = copy
        return self._view

    @property
    def readonly(self) -> bool:
        return self._view is None or self._view.readonly

    def rest(self, offset: int) -> Region:
        """Its bytes from ``offset`` on."""
        if isinstance(self.source, DeviceMemory):
            return Region(self.source.part(offset, self.nbytes - offset), self.steady)
        return Region(self.source[offset:], self.steady)

    def release(self) -> None:
        """Let go of the exporter."""
        if self._view is not None:
            self._view.release()


def flat_view(buffer: Any) -> memoryview:
    """The bytes of ``buffer`` as a flat memoryview of format ``B``; no copy.

    Raises
    ------
    InvalidBuffer
        No buffer protocol, or not C-contiguous.
    """
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise InvalidBuffer(
            f"{type(buffer).__name__} does not export a buffer; pass a C-contiguous array, "
            "bytes or a memoryview"
        ) from error
    if not view.c_contiguous:
        raise InvalidBuffer(
            "the buffer is not C-contiguous; make a contiguous copy first "
            "(for NumPy: numpy.ascontiguousarray)"
        )
    # cast() refuses shapes with a zero in them; such a view has no bytes anyway.
    return view.cast("B") if view.nbytes else memoryview(bytearray(0))


@dataclass(slots=True)
class TransportStats:
    """Counters of one connection. Bytes are those handed to or taken from the kernel."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    payload_copied: int = 0
    """Payload bytes that this side copied in user space (they arrived with a header)."""
    payload_lent: int = 0
    """Of ``payload_sent``, bytes that the kernel did not copy either (see ``native/lending.c``)."""
    sends: int = 0
    """System calls that sent."""
    receives: int = 0
    """System calls that received."""
    extra: dict[str, int] = field(default_factory=dict)


class Incoming(abc.ABC):
    """A message that has begun to arrive.

    Attributes
    ----------
    header : memoryview
        Valid until the next call of ``Connection.receive``.
    sizes : tuple of int
        Bytes of each region; empty for a message without payload.
    received : int
        Payload bytes that lie in their final place by now.
    """

    __slots__ = ()

    header: memoryview
    sizes: tuple[int, ...]
    received: int
    lent_from: object = None
    """For ``Connection.lent``: where a payload of one region lies, if that is memory that this end
    gave away before, of which the other end only says where it is."""
    told = False
    """Whether the answer that ``Connection.expect`` was given is out."""
    takes_device = False
    """Whether the payload goes into the memory of a GPU without a detour through host memory of
    its size; a ``DeviceTarget`` may be given to :meth:`into` in any case."""

    @abc.abstractmethod
    def into(
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
    ) -> None:
        """Say where the payload goes: one writable flat view per size, of exactly that size.

        Must be called (or :meth:`discard`) before the next ``receive``. ``done`` is called
        from a later ``receive`` (or at once, if there is nothing to wait for) when every byte
        is in place.

        Raises
        ------
        InvalidBuffer
            A view is read-only or has another size; nothing was written.
        """

    @abc.abstractmethod
    def discard(self, done: Callable[[Incoming], None] | None = None) -> None:
        """Drop the payload, or what is still missing of it.

        May be called in the middle of the payload: from then on the connection no longer
        touches the buffers given to :meth:`into`.
        """

    def adopt(self) -> list[memoryview] | None:
        """Keep the payload where it already lies, in place of :meth:`into`.

        Returns
        -------
        list of memoryview or None
            One writable flat view per size, complete, that stays valid for as long as it or
            anything made from it lives (also after the connection). The other end may still
            read and write that memory. None where the payload is not in memory that both ends
            see, or is only lent: call ``into`` or ``discard``.
        """
        return None


class Connection(abc.ABC):
    """An established path to one peer.

    Messages arrive in the order in which they were sent, as far as their headers go; the
    payload of one may still be arriving while later messages are received. One thread may
    send while another receives; two may not do the same.

    Attributes
    ----------
    name : str
        Transport, such as ``"tcp"``.
    local_address, peer_address : str
        For messages to people.
    reason : str
        Choices made for this path and why (congestion control and the like).
    stats : TransportStats
    """

    name: str
    local_address: str
    peer_address: str
    reason: str
    stats: TransportStats
    takes_device = False
    """Whether it reads a GPU's memory (``Region.source``) without a copy of its size in the
    host's memory."""
    shared = False
    """Whether ``allocate`` gives memory that the other end sees too."""
    expects = False
    """Whether :meth:`expect` is of any use."""
    near = False
    """Whether messages go through a socket, and the way is so short that what they may bring at a
    time is granted again at once: then the frames of a payload cost more than some ten thousand
    bytes inside a message."""

    burst = 8 << 20
    """Bytes of payload that one step hands to the kernel at most, if that takes them at once: so a
    fast peer does not keep the caller in it."""
    roams = False
    """Whether a thread that looks may go to another processor where it shares one with its peer."""
    looks = 0
    """Times to look for an answer, in a thread that waits for it, before it sleeps. A peer that is
    near answers within microseconds, and a thread that sleeps takes longer than that to get going
    again: some 300 µs of looking save most of a round trip, and keep both ends on their own
    cores."""

    def register(self, buffer: Any) -> Region:
        """Make host memory known to the transport.

        Raises
        ------
        InvalidBuffer
            No buffer protocol, or not C-contiguous.
        """
        return Region(buffer)

    def allocate(self, nbytes: int) -> memoryview | None:
        """Writable flat memory from which this connection sends without copying.

        A send that carries all of it gives it away: the other end may keep it and write to it.
        It goes back when the view and everything made from it is gone and the other end is
        through with it. The contents are whatever was there. None where there is no such memory
        (left).
        """
        return None

    def gives(self, view: memoryview) -> bool:
        """Whether sending the flat bytes ``view`` gives memory away: they are all of what
        ``allocate`` gave, and were not sent yet."""
        return False

    def at_hand(self, nbytes: int) -> object:
        """For uploads of so many bytes in one step, by the part in C: where ``allocate`` takes
        blocks from, or this, if it sends them right from where they lie. None: neither."""
        return None

    def lent(self, place: object) -> memoryview | None:
        """The memory of a place (``Incoming.lent_from``), read-only in spirit, if the other end
        still has it from this one; from the thread that sends. None: it has not."""
        return None

    @abc.abstractmethod
    def fileno(self) -> int:
        """The descriptor to watch: readable means ``receive``, writable means ``flush``.

        Raises
        ------
        ConnectionLost
            It was given back.
        """

    @property
    @abc.abstractmethod
    def pending_output(self) -> bool:
        """Whether something queued has not been taken by the kernel yet."""

    @property
    @abc.abstractmethod
    def buffered(self) -> bool:
        """Whether bytes lie in this process that ``receive`` has not looked at: the descriptor
        does not tell of them."""

    @property
    def restless(self) -> bool:
        """Whether there is output pending or anything buffered."""
        return self.pending_output or self.buffered

    @property
    @abc.abstractmethod
    def closed(self) -> bool:
        """Whether ``close`` or ``abort`` was called."""

    @abc.abstractmethod
    def send(
        self,
        header: BytesLike,
        regions: Sequence[Region] = (),
        done: Callable[[], None] | None = None,
    ) -> None:
        """Queue a message and send what goes out now. Never blocks.

        Parameters
        ----------
        header : bytes-like
            At most ``MAX_HEADER`` bytes. Must not change before ``done``.
        regions : sequence of Region
            Payload, lent until ``done``. Any number, any size, also 0 bytes.
        done : callable, optional
            Called when this connection no longer reads header and regions (not when the peer
            has them). Not called after ``abort``.

        Raises
        ------
        ConnectionLost
            The connection is broken or closed.
        LimitExceeded
            The header is too large.
        """

    def together(self) -> AbstractContextManager[None]:
        """A context: what is sent within goes out at its end, in as few system calls as it takes.

        Raises
        ------
        ConnectionLost
            At its end.
        """
        return nullcontext()

    @abc.abstractmethod
    def flush(self) -> bool:
        """Send step: hand over what the kernel takes now; True when nothing is left.

        Raises
        ------
        ConnectionLost
        """

    @abc.abstractmethod
    def receive(self, wait: float = 0.0) -> Incoming | None:
        """Receive step: the next message that has begun to arrive, or None.

        Parameters
        ----------
        wait : float
            Seconds to block for bytes when none are there. With 0 it never blocks. One call
            makes at most one blocking system call, and returns None after any progress that
            ended no header (payload that went into place, a message that was completed).

        Raises
        ------
        ConnectionLost
            End of stream, reset, or closed.
        ProtocolError
            Bytes that are not this transport's framing.
        """

    def expect(self, header: bytes, view: memoryview | None, answer: bytes) -> bool:
        """The next message most likely has this header (its ack apart), and one region of exactly
        ``view.nbytes``, which will go to ``view``. None: any message may come.

        A hint, from the thread that receives. Bytes may be in place before anybody has looked at
        the message then; :meth:`Incoming.into` is called all the same, and may say otherwise.

        Parameters
        ----------
        answer : bytes
            The header of a message that whoever takes it in may send at once when every byte
            is in place (``Incoming.told``); empty: none.

        Returns
        -------
        bool
            Whether this connection takes hints.
        """
        return False

    def due(self) -> float | None:
        """Seconds until a step would make progress without the descriptor saying so."""
        return None

    @abc.abstractmethod
    def close(self, timeout: float = 1.0) -> None:
        """Flush for at most ``timeout`` seconds, then give everything back. Idempotent."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Give everything back now. Safe to call from any thread, also while another thread
        waits in ``receive`` (which then raises ConnectionLost). Idempotent."""

    def describe(self) -> dict[str, object]:
        """What ``explain()`` shows of this connection."""
        return {
            "transport": self.name,
            "local": self.local_address,
            "peer": self.peer_address,
            "reason": self.reason,
        }
