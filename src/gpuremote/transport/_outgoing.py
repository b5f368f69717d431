"""What waits to be sent on a stream. Private."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

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

__all__ = ["CHUNK", "Buffer", "Flow", "Outbox", "one_payload"]

Buffer: TypeAlias = bytes | bytearray | memoryview
Done: TypeAlias = Callable[[], None]

CHUNK: Final = 2 << 20
"""Payload bytes of one DATA frame: what a control message waits for at most. Each costs some
work at both ends; 1 MiB costs 3 % of the throughput of a loopback."""
RUN: Final = 8 << 20
"""Bytes offered to the kernel in one call, about. Only the chunk that is under way when the
kernel takes no more stays ahead of later messages."""
_IOV: Final = 512
_PIECE_IOV: Final = 384
"""Buffers at which a call, and a chunk, ends; together below the system's limit of 1024."""
_JOINED: Final = 512
"""Bytes of a message up to which it is copied behind the one before it: what the queue needs for
a message by itself would be more."""
_JOIN: Final = 64 << 10
"""Bytes of messages in one piece."""
_PREFIX: Final = FRAME.size
_CHANNELS: Final = 65536

_pack = FRAME.pack


class _Piece(NamedTuple):
    """What goes out in one run without anything in between: a frame, or a chunk's frame."""

    buffers: list[Buffer]
    size: int
    payload: int = 0
    channel: int = -1  # free again when this is out
    done: Done | None = None


class Flow:
    """Payload that waits to be sent on its channel."""

    __slots__ = ("channel", "chunk", "done", "head", "left", "offset", "views", "window")

    def __init__(self, channel: int, views: list[memoryview], left: int, done: Done | None) -> None:
        self.channel = channel
        self.views = views  # last first
        self.left = left
        self.offset = 0
        self.done = done
        # Of a chunk that was sent in part by ``push``: bytes left, and what is left of its frame.
        self.chunk = 0
        self.head = b""
        self.window: object = None  # what a transport keeps for it as long as it is under way

    def push(
        self, sendmsg: Callable[[list[Buffer], tuple[()], int], int], flags: int, chunk: int
    ) -> tuple[int, int, bool]:
        """Send of the only view that is left what the kernel takes in one call.

        Returns
        -------
        sent, payload : int
            Bytes in all, and of the payload.
        more : bool
            Whether the kernel may take more.
        """
        view, offset, head = self.views[0], self.offset, self.head
        if not self.chunk:
            self.chunk = min(chunk, self.left)
            self.head = head = _pack(self.chunk, DATA, 0, self.channel)
        rest = view[offset : offset + self.chunk]
        size = len(head) + self.chunk
        try:
            sent = sendmsg([head, rest] if head else [rest], (), flags)
        except BlockingIOError:
            if len(head) == _PREFIX:
                self.chunk = 0  # nothing of it is out, so other messages may come before it
            return 0, 0, False
        payload = max(0, sent - len(head))
        self.head = head[sent:]
        self.chunk -= payload
        self.offset = offset + payload
        self.left -= payload
        return sent, payload, sent == size

    def push_natively(
        self, push: Callable[..., tuple[int, int, int, int, int, bool]], size: int, burst: int
    ) -> tuple[int, int, bool, int]:
        """The same in C, until the kernel takes no more or ``burst`` bytes are out; also gives the
        number of calls."""
        payload, sent, head, chunk, calls, more = push(
            self.views[0],
            self.offset,
            len(self.head),
            self.chunk,
            self.left,
            self.channel,
            size,
            burst,
        )
        self.chunk = chunk
        self.head = _pack(chunk, DATA, 0, self.channel)[_PREFIX - head :]
        self.offset += payload
        self.left -= payload
        return sent, payload, more, calls

    def finish_chunk(self) -> _Piece:
        """The rest of the chunk that ``push`` has begun."""
        view, chunk, offset = self.views[0], self.chunk, self.offset
        buffers: list[Buffer] = [self.head, view[offset : offset + chunk]]
        size = len(self.head) + chunk
        self.offset = offset + chunk
        self.left -= chunk
        self.chunk, self.head = 0, b""
        if self.left:
            return _Piece(buffers, size, chunk)
        return _Piece(buffers, size, chunk, self.channel, self.done)

    def cut(self, chunk: int) -> _Piece:
        """Take the next chunk off."""
        buffers: list[Buffer] = [b""]
        size = 0
        views, offset = self.views, self.offset
        while views and size < chunk and len(buffers) < _PIECE_IOV:
            view = views[-1]
            rest = view.nbytes - offset
            if rest <= chunk - size:
                buffers.append(view[offset:] if offset else view)
                size += rest
                offset = 0
                views.pop()
            else:
                take = chunk - size
                buffers.append(view[offset : offset + take])
                size += take
                offset += take
        self.offset = offset
        self.left -= size
        buffers[0] = _pack(size, DATA, 0, self.channel)
        if self.left:
            return _Piece(buffers, _PREFIX + size, size)
        return _Piece(buffers, _PREFIX + size, size, self.channel, self.done)


class Outbox:
    """Queued messages, and what of them is to go to the kernel next.

    Keeps what the caller lent, a copy only of small messages. MESSAGE and OPEN frames go out in
    the order of the sends and before further payload; several payloads take turns, a chunk each.

    Usage: ``fill`` a run, try to send it, tell ``sent`` how much of it went out, always. Or, where
    there is an ``only`` stream, let it ``push``, and tell ``pushed``.

    Parameters
    ----------
    chunk : int
        Payload bytes of one DATA frame.

    Attributes
    ----------
    pending : bool
        Whether anything is left.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.pending = False
        self._chunk = chunk
        self._begun: _Piece | None = None  # went out in part: nothing may come before its rest
        self._resumed: _Piece | None = None  # the same, while it is part of the run
        self._frames: deque[_Piece] = deque()
        self._joined = bytearray()  # small messages, behind the frames
        self._chunks: deque[_Piece] = deque()  # were cut, and then not taken by the kernel
        self._streams: deque[Flow] = deque()
        self._run: list[_Piece] = []
        self._channel = 0
        self._used: set[int] = set()

    def add_rest(self, header: BytesLike, size: int, sent: int, done: Done | None) -> None:
        """Queue what is left of a message without regions, of whose frame ``sent`` bytes are
        out already. The message stays where the caller has it."""
        view = memoryview(header)
        parts: list[Buffer] = (
            [_pack(size, MESSAGE, 0, 0)[sent:], view]
            if sent < _PREFIX
            else [view[sent - _PREFIX :]]
        )
        self._begun = _Piece(parts, _PREFIX + size - sent, done=done)
        self.pending = True

    def add_begun_frame(self, rest: memoryview) -> None:
        """Queue, behind nothing, what is left of a frame."""
        self._begun = _Piece([rest], len(rest))
        self.pending = True

    def add_message(self, header: BytesLike, size: int, done: Done | None) -> None:
        """Queue a message without regions."""
        self.pending = True
        if size <= _JOINED and done is None:
            self._joined += _pack(size, MESSAGE, 0, 0)
            self._joined += header
            if len(self._joined) >= _JOIN:
                self._end_joined()
            return
        self._end_joined()
        parts: list[Buffer] = [_pack(size, MESSAGE, 0, 0), header]
        self._frames.append(_Piece(parts, _PREFIX + size, done=done))

    def _end_joined(self) -> None:
        """What comes next goes behind the small messages."""
        joined = self._joined
        if joined:
            piece, fresh = _Piece([joined], len(joined)), bytearray()
            # No call stands between: Ctrl-C comes above or below.
            self._joined = fresh
            self._frames += (piece,)

    def add_frame(
        self, kind: int, channel: int, parts: Sequence[Buffer], done: Done | None = None
    ) -> None:
        """Queue a frame of another kind, in turn with the messages."""
        size = sum(map(len, parts))
        self._end_joined()
        self._frames.append(
            _Piece([_pack(size, kind, 0, channel), *parts], _PREFIX + size, done=done)
        )
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
        views.reverse()
        channel = self._new_channel() if views else 0
        length = len(sizes) + size
        parts: list[Buffer] = [_pack(length, OPEN, 0, channel) + sizes, header]
        self._end_joined()
        self._frames.append(_Piece(parts, _PREFIX + length, done=None if views else done))
        if views:
            total = sum(view.nbytes for view in views)
            self._streams.append(Flow(channel, views, total, done))
        self.pending = True

    def add_begun(
        self, header: BytesLike, size: int, region: Region, done: Done | None, sent: int
    ) -> int:
        """Queue, behind nothing, what is left of a message of which ``sent`` bytes are out, in the
        frames that this makes of one; the payload bytes of the chunks that are out."""
        self._channel = 0
        self.add_payload(header, size, [region], done)
        out = 0
        while True:
            _, size = self.fill()
            out += self.sent(min(sent, size))[0]
            if sent <= size:
                return out
            sent -= size

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

    def only(self) -> Flow | None:
        """The stream that is all there is to send, if one view of it is left."""
        queued = self._frames or self._joined or self._chunks or self._begun is not None
        if queued or len(self._streams) != 1:
            return None
        stream = self._streams[0]
        return stream if len(stream.views) == 1 else None

    def pushed(self, stream: Flow) -> list[Done]:
        """After ``stream.push``: what is to be called, as it is out completely."""
        if stream.left:
            return []
        self._streams.clear()
        self._used.discard(stream.channel)
        # What it was sent by may have queued something, and a part of a frame may be left.
        self.pending = bool(self._begun or self._frames or self._joined or self._chunks)
        return [stream.done] if stream.done is not None else []

    def fill(self) -> tuple[list[Buffer], int]:
        """Buffers to send next, and their size; empty if nothing is left."""
        run = self._run
        buffers: list[Buffer] = []
        size = 0
        self._end_joined()
        if self._streams and self._streams[0].chunk:
            self._begun = self._streams[0].finish_chunk()
            if not self._streams[0].left:
                self._streams.popleft()
        if self._begun is not None:
            piece, self._begun = self._begun, None
            self._resumed = piece
            run.append(piece)
            buffers += piece.buffers
            size = piece.size
        frames, chunks, streams = self._frames, self._chunks, self._streams
        while frames and len(buffers) < _IOV:
            piece = frames.popleft()
            run.append(piece)
            buffers += piece.buffers
            size += piece.size
        # No payload overtakes its own opening: that one would still be among the frames.
        # One payload by itself is better pushed: of it no more than a chunk goes along here.
        alone = len(streams) == 1 and len(streams[0].views) == 1 and streams[0].left > self._chunk
        limit = 1 if alone else RUN
        while (chunks or streams) and not frames and size < limit and len(buffers) < _IOV:
            if chunks:
                piece = chunks.popleft()
            else:
                stream = streams.popleft()
                piece = stream.cut(self._chunk)
                if stream.left:
                    streams.append(stream)
            run.append(piece)
            buffers += piece.buffers
            size += piece.size
        return buffers, size

    def sent(self, count: int) -> tuple[int, list[Done]]:
        """The kernel took ``count`` bytes of the run.

        Returns
        -------
        payload : int
            Payload bytes of the chunks that are out now.
        done : list of callables
            To be called, as what they belong to is out.
        """
        run, self._run = self._run, []
        payload = 0
        done: list[Done] = []
        left: list[_Piece] = []
        for position, piece in enumerate(run):
            if count < piece.size:
                left = run[position:]
                break
            count -= piece.size
            payload += piece.payload
            if piece.channel >= 0:
                self._used.discard(piece.channel)
            if piece.done is not None:
                done.append(piece.done)
        if left:
            first = left[0]
            if count:
                first = first._replace(buffers=_rest(first.buffers, count), size=first.size - count)
            if count or first is self._resumed:
                self._begun = first
                del left[0]
            for piece in reversed(left):
                (self._chunks if piece.payload else self._frames).appendleft(piece)
        else:
            self.pending = bool(self._frames or self._streams or self._chunks)
        self._resumed = None
        return payload, done


def one_payload(header: BytesLike, size: int, view: memoryview) -> tuple[list[Buffer], int]:
    """A message of ``size`` bytes with one region of one chunk, as a queue that holds nothing else
    would make it: the buffers, and their size."""
    nbytes = view.nbytes
    sizes = encode_sizes([nbytes])
    length = len(sizes) + size
    run: list[Buffer] = [
        _pack(length, OPEN, 0, 0) + sizes,
        header,
        _pack(nbytes, DATA, 0, 0),
        view,
    ]
    return run, 2 * _PREFIX + length + nbytes


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
