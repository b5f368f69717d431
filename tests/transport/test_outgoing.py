"""What waits for a peer that does not read: in order, and not much more than its bytes."""

from __future__ import annotations

import functools
import tracemalloc

from gpuremote.transport._framing import FRAME, MESSAGE, OPEN
from gpuremote.transport._outgoing import Outbox
from gpuremote.transport.base import Region


def drained(outbox: Outbox, step: int) -> bytes:
    """All of it, as a kernel takes it that takes ``step`` bytes at a time."""
    taken = b""
    while outbox.pending:
        buffers, size = outbox.fill()
        run = b"".join(buffers)
        assert len(run) == size > 0
        for done in outbox.sent(min(step, size))[1]:
            done()
        taken += run[:step]
    return taken


def messages(data: bytes) -> list[tuple[int, bytes]]:
    found, offset = [], 0
    while offset < len(data):
        length, kind, _, _ = FRAME.unpack_from(data, offset)
        offset += FRAME.size
        found.append((kind, data[offset : offset + length]))
        offset += length
    return found


def test_small_messages_keep_their_turn() -> None:
    for step in (1, 7, 100, 5000, 1 << 20):
        outbox = Outbox()
        told: list[bytes] = []
        payload = bytes(range(256)) * 16
        sent = [b"%d" % n * (n % 400 + 1) for n in range(300)]
        for number, body in enumerate(sent):
            if number == 100:
                outbox.add_payload(body, len(body), [Region(payload)], None)
            else:
                done = functools.partial(told.append, body) if number % 50 == 0 else None
                outbox.add_message(body, len(body), done)
        came = messages(drained(outbox, step))
        assert [body for kind, body in came if kind == MESSAGE] == [*sent[:100], *sent[101:]]
        opening = next(body for kind, body in came if kind == OPEN)
        assert opening.endswith(sent[100])
        assert came.index((OPEN, opening)) == 100
        assert came[-1][1] == payload
        assert told == [body for body in sent[::50] if body is not sent[100]]


def test_small_messages_need_little_more_than_their_bytes() -> None:
    outbox = Outbox()
    body = bytes(40)
    tracemalloc.start()
    try:
        for _ in range(20_000):
            outbox.add_message(body, 40, None)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.3 * 20_000 * (40 + FRAME.size)
    assert len(drained(outbox, 1 << 20)) == 20_000 * (40 + FRAME.size)
