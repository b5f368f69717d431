"""What a worker says to its client: arrays, facts, failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from gpuremote.server.storage import STALLED, Failure, Slot
from gpuremote.transport.base import Region
from gpuremote.wire.caps import MAX_BULK
from gpuremote.wire.frames import IGNORABLE, NUMBER, Kind, ResultForm, pack_info

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["Answers"]

SENT_AT_ONCE: Final = 4 << 20
"""Bytes up to which an array is sent by whoever takes in the question."""

_pack_number = NUMBER.pack


class Answers:
    """Posts the answers of one session. Each is kept by the peer until the client has it."""

    def __init__(self, session: WorkerSession) -> None:
        self._session = session

    def report(self, failure: Failure, number: int = 0) -> None:
        """Tell of a failure; with ``number``, as the answer to that record."""
        body = [
            number or failure.number,
            failure.number,
            failure.code,
            failure.message[:4096],
            failure.op,
        ]
        self._session.peer.post(Kind.FAILURE, pack_info(body))

    def info(self, number: int, value: Any) -> None:
        """Answer record ``number`` with plain values."""
        body = NUMBER.pack(number) + pack_info(value)
        self._session.peer.post(Kind.RESULT, body, ResultForm.INFO)

    def goodbye(self) -> None:
        self._session.peer.post(Kind.GOODBYE, pack_info([0, ""]))

    def notice(self, event: str, **details: Any) -> None:
        body = pack_info({"event": event, **details})
        self._session.peer.post(Kind.NOTICE, body, 0, IGNORABLE)

    def send_meta(self, number: int, slot: Slot) -> object:
        """Item: answer with shape and dtype."""
        if slot.pending:
            return slot
        if self._session.peer.credit <= 0:
            return STALLED  # as arrays do
        with self._session.lock:
            if slot.failure is not None:
                self.report(slot.failure, number)
            else:
                shape, dtype = self._session.backend.describe(slot.value)
                self.info(number, [list(shape), dtype])
        return None

    def send_small(self, number: int, slot: Slot) -> bool:
        """Answer at once with a small array that is there; False if it has to queue."""
        meta = slot.meta
        value = slot.value
        session = self._session
        peer = session.peer
        if value is None or meta is None or meta.nbytes > peer.small or peer.credit <= 0:
            return False
        try:
            data = session.backend.small_bytes(value)
        except Exception:
            return False  # the longer way reports it
        peer.post(Kind.RESULT, _pack_number(number) + data)
        return True

    def send_now(self, number: int, slot: Slot) -> bool:
        """Answer at once with an array that is there and middling, while no other is on its way;
        False if it has to queue. With the lock held, so it takes no longer than a copy of that."""
        meta = slot.meta
        peer = self._session.peer
        if meta is None or meta.nbytes > SENT_AT_ONCE or not peer.direct or peer.bulk_in_flight:
            return False
        return self.send_array(number, slot) is None

    def send_array(self, number: int, slot: Slot) -> object:
        """Item: answer with the array's bytes."""
        session = self._session
        peer = session.peer
        if slot.pending:
            return slot
        if peer.credit <= 0 or peer.bulk_in_flight >= MAX_BULK:
            # Credit comes back when the client reads: a client that does not stalls here.
            return STALLED
        if slot.failure is not None:
            with session.lock:
                self.report(slot.failure, number)
            return None
        head = NUMBER.pack(number)
        try:
            assert slot.meta is not None
            if slot.meta.nbytes <= peer.small:
                body = head + session.backend.small_bytes(slot.value)
                with session.lock:
                    peer.post(Kind.RESULT, body, ResultForm.BYTES)
                return None
            region, private = self._region(slot.value)
            if private:
                # Counted late, as only the backend knows whether it had to copy.
                session.quota.reserve(region.nbytes)
        except Exception as error:
            session.failed(number, "get", error)  # has the number of the GET, so it answers it
            return None
        storage = slot.storage
        assert storage is not None
        nbytes = region.nbytes

        def release() -> None:
            if private:
                session.quota.release(nbytes)
            else:
                storage.outgoing -= 1
            session.ordering.stir()

        with session.lock:
            if not private:
                # Ops that would write to this memory wait until the client has it all.
                storage.outgoing += 1
            peer.post_payload(Kind.RESULT, head, [region], release, ResultForm.PAYLOAD)
        return None

    def _region(self, value: Any) -> tuple[Region, bool]:
        """Where to send an array from, and whether that is a private copy."""
        backend = self._session.backend
        connection = self._session.peer.connection
        if connection is not None and connection.takes_device:
            source, private = backend.send_source(value)
            return Region(source, steady=True), private
        view, private = backend.send_view(value)
        return Region(view, steady=True), private
