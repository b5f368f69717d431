"""What waits to be sent on a stream. Private."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from gpuremote._types import BytesLike
from gpuremote.errors import LimitExceeded
from gpuremote.transport._framing import (
    DATA,
    FRAME,
    MAX_REGIONS,
    MESSAGE,
    OPEN,
    encode_sizes,
)
from gpuremote.transport.base import Region

__all__ = ["Buffer", "Outbox"]

Buffer: TypeAlias = bytes | bytearray | memoryview
Done: TypeAlias = Callable[[], None]

CHUNK: Final = 1 << 20
"""Payload bytes of one DATA frame: what a control message waits for at most."""
IOV: Final = 512
"""Buffers of one send call; fewer than the system's limit of 1024."""
_CHANNELS: Final = 65536

_pack = FRAME.pack


class _Stream:
    """Payload that waits to be sent on its channel."""

    __slots__ = ("channel", "done", "left", "offset", "views")

    def __init__(
        self, channel: int, views: list[memoryview], left: int, done: Done | None
    ) -> None:
        self.channel = channel
        self.views = views  # last first
        self.left = left
        self.offset = 0
        self.done = done

    def chunk(self, out: list[Buffer]) -> int:
        """Append a DATA frame to ``out``; returns its payload bytes."""
        head = len(out)
        out.append(b"")
        size = 0
        views, offset = self.views, self.offset
        while views and size < CHUNK and len(out) < IOV:
            view = views[-1]
            rest = view.nbytes - offset
            if rest <= CHUNK - size:
                out.append(view[offset:] if offset else view)
                size += rest
                offset = 0
                views.pop()
            else:
                take = CHUNK - size
                out.append(view[offset : offset + take])
                size += take
                offset += take
        self.offset = offset
        self.left -= size
        out[head] = _pack(size, DATA, 0, self.channel)
        return size


class Outbox:
    """Queued messages, and the run of bytes that is on its way to the kernel.

    Keeps what the caller lent, never a copy of it. MESSAGE and OPEN frames go out in the order
    of the sends and before further payload; several payloads take turns, a chunk each.

    Attributes
    ----------
    pending : bool
        Whether anything is left.
    run : list of buffers
        What goes to the kernel next: frames, and at most one chunk behind them.
    size, payload : int
        Bytes of the run, and how many payload bytes the whole of it brings.
    done : list of callables
        To be called when the run is out.
    """

    def __init__(self) -> None:
        self.pending = False
        self.run: list[Buffer] = []
        self.size = 0
        self.payload = 0
        self.done: list[Done] = []
        self._frames: deque[tuple[list[Buffer], Done | None]] = deque()
        self._streams: deque[_Stream] = deque()
        self._channel = 0
        self._used: set[int] = set()

    def add_rest(self, parts: list[Buffer], done: Done | None) -> None:
        """Queue a message whose frame is made already."""
        self._frames.append((parts, done))
        self.pending = True

    def add_message(self, header: BytesLike, size: int, done: Done | None) -> None:
        """Queue a message without regions."""
        self._frames.append(([_pack(size, MESSAGE, 0, 0), header], done))
        self.pending = True

    def add_payload(
        self, header: BytesLike, size: int, regions: Sequence[Region], done: Done | None
    ) -> None:
        """Queue a message with regions.

        Raises
        ------
        LimitExceeded
            Too many regions, or too many messages with regions.
        """
        if len(regions) > MAX_REGIONS:
            raise LimitExceeded(f"{len(regions)} regions; a message takes {MAX_REGIONS}")
        sizes = encode_sizes([region.nbytes for region in regions])
        views = [region.view for region in regions if region.nbytes]
        length = len(sizes) + size
        if not views:
            self._frames.append(([_pack(length, OPEN, 0, 0) + sizes, header], done))
        else:
            channel = self._new_channel()
            total = sum(view.nbytes for view in views)
            views.reverse()
            self._frames.append(([_pack(length, OPEN, 0, channel) + sizes, header], None))
            self._streams.append(_Stream(channel, views, total, done))
        self.pending = True

    def _new_channel(self) -> int:
        used = self._used
        if len(used) >= _CHANNELS:
            raise LimitExceeded(f"{_CHANNELS} payloads wait to be sent")
        channel = self._channel
        while channel in used:
            channel = (channel + 1) % _CHANNELS
        self._channel = (channel + 1) % _CHANNELS
        used.add(channel)
        return channel

    def fill(self) -> bool:
        """Make the next run; False if nothing is left."""
        frames, streams = self._frames, self._streams
        run: list[Buffer] = []
        done = self.done
        payload = 0
        while frames and len(run) < IOV - 4:
            parts, called = frames.popleft()
            run += parts
            if called is not None:
                done.append(called)
        # A payload never overtakes its own opening: that one would still be in `frames`.
        if streams and not frames and len(run) < IOV - 4:
            stream = streams.popleft()
            payload = stream.chunk(run)
            if stream.left:
                streams.append(stream)
            else:
                self._used.discard(stream.channel)
                if stream.done is not None:
                    done.append(stream.done)
        self.run = run
        self.payload = payload
        self.size = sum(map(len, run))
        self.pending = bool(run)
        return self.pending

    def sent(self, count: int) -> list[Done] | None:
        """The kernel took ``count`` bytes; None if it left some, else what is to be called."""
        left = self.size - count
        if left:
            self.size = left
            self.run = _rest(self.run, count)
            return None
        self.run = []
        self.size = 0
        done, self.done = self.done, []
        self.pending = bool(self._frames or self._streams)
        return done


def _rest(buffers: list[Buffer], sent: int) -> list[Buffer]:
    """The buffers without their first ``sent`` bytes; nothing is copied."""
    for index, buffer in enumerate(buffers):
        size = len(buffer)
        if sent < size:
            rest = buffers[index:]
            if sent:
                rest[0] = memoryview(buffer)[sent:]
            return rest
        sent -= size
    return []
