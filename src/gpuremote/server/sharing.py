"""A session's part in what its server keeps of uploads (see ``server.contents``).

A thread of its own asks the daemon, and copies: from a file that is kept into memory of the
session, or what has come into a new file. Ops that would write to that memory wait meanwhile, and
what nobody but a copy still to be made holds is given up for what would not fit.
"""

from __future__ import annotations

import fcntl
import os
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gpuremote.errors import GpuRemoteError, InternalError, ProtocolError
from gpuremote.server import control
from gpuremote.server.contents import SEALS
from gpuremote.wire.batch import Op
from gpuremote.wire.caps import DIGEST, MAX_QUESTIONS, SHARED_LEAST
from gpuremote.wire.digests import sketch_of

if TYPE_CHECKING:
    from gpuremote.server.arrivals import Arrival
    from gpuremote.server.session import WorkerSession
    from gpuremote.server.storage import Storage

__all__ = ["Sharing"]

PIECE: Final = 16 << 20
"""Bytes of one system call."""
HELD_ONCE: Final = 2
"""References to what one attribute holds, where they are counted."""


class _DroppedError(Exception):
    """A copy is not to be made any more."""


class _Copy:
    """What has come and is to be handed to the daemon.

    Attributes
    ----------
    view : memoryview or None
        The bytes; None once it was dropped.
    storage : Storage or None
        Whose memory that is; None where it is staging that the array does not need any more.
    dropped : bool
        It is not to be made.
    """

    __slots__ = ("digest", "dropped", "nbytes", "storage", "view")

    def __init__(self, view: memoryview, digest: bytes, storage: Storage | None) -> None:
        self.view: memoryview | None = view
        self.nbytes = view.nbytes
        self.digest = digest
        self.storage = storage
        self.dropped = False


class Sharing:
    """Asks for a session's uploads where they are kept, and brings there what may be.

    Attributes
    ----------
    channel : socket.socket or None
        To the daemon's desk; None: the server keeps nothing.
    active : int
        Things that its thread has to do.
    asked : int
        The client's questions among them.
    taken, kept : int
        Bytes that did not have to travel, and that were handed to the daemon.
    """

    def __init__(self, session: WorkerSession) -> None:
        self.channel: socket.socket | None = None
        self.active = 0
        self.asked = 0
        self.taken = 0
        self.kept = 0
        self._session = session
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._listing = False
        self._copies: dict[_Copy, None] = {}  # that are to be made, the oldest first
        self._staged = 0  # bytes of them that are no array's memory
        self._reading = threading.Lock()  # held while a piece of one is read, and to drop it
        session.quota.spare = self._spare
        self.records: dict[int, Callable[..., None]] = {
            Op.OFFER: self._offer,
            Op.CONTENTS: self._contents,
        }

    @staticmethod
    def mark(arrival: Arrival | None) -> None:
        """What comes may be kept.

        Raises
        ------
        ProtocolError
            It is of too few bytes.
        """
        if arrival is not None:
            if arrival.meta.nbytes < SHARED_LEAST:
                raise ProtocolError(f"{arrival.meta.nbytes} bytes to be kept for others")
            arrival.kept = True

    # -- records; the session's lock is held ----------------------------------------------------

    def _offer(self, number: int, blob: Any) -> None:
        match blob:
            case [shape, dtype, device, bytes(digest)] if len(digest) == DIGEST:
                arrival = self._session.announce(number, "put", shape, dtype, device)
            case _:
                raise ProtocolError(f"OFFER {number} is malformed")
        self.mark(arrival)
        if arrival is not None:
            arrival.digest = digest
            # Not the arrival: one that is taken back does not wait here for its room to be free.
            self._question(lambda: self._fetch(number, digest), number, False)

    def _contents(self, number: int) -> None:
        if self._listing:
            self._session.answers.info(number, None)  # one is on its way already
            return
        self._listing = self.channel is not None
        self._question(lambda: self._list(number), number, b"")

    def _question(self, job: Callable[[], None], number: int, otherwise: Any) -> None:
        if self.channel is None:
            self._session.answers.info(number, otherwise)
            return

        def answer() -> None:
            try:
                job()
            finally:
                with self._session.lock:
                    self.asked -= 1

        self.asked += 1
        self._do(answer)
        if self.asked > MAX_QUESTIONS:
            self._session.regulate()

    def keep(self, arrival: Arrival) -> None:
        """The bytes of an array are here: let others have a copy, where that is asked for."""
        if self.channel is None or not arrival.kept or not isinstance(arrival.target, memoryview):
            return
        view = arrival.view
        storage: Storage | None = None
        if self._session.backend.exports_memory:
            # The array's own memory: ops in place on it wait.
            storage = arrival.storage
            storage.outgoing += 1
        elif self._staged + view.nbytes > self._session.quota.limit:
            return  # the device's memory is free before the copy is made, but not the host's
        else:
            self._staged += view.nbytes
        copy = _Copy(view, arrival.digest, storage)
        self._copies[copy] = None
        self._do(lambda: self._bring(copy))

    def _spare(self, missing: int) -> None:
        """Drop copies that hold memory which is nobody's any more; called by any thread."""
        for copy in reversed(list(self._copies)):
            if missing <= 0:
                return
            if copy.storage is None or sys.getrefcount(copy.storage) > HELD_ONCE:
                continue
            copy.dropped = True
            with self._reading:  # its thread sees that before it reads another piece
                copy.view = copy.storage = None
            missing -= copy.nbytes

    def _do(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gpuremote-share", daemon=True)
            self._thread.start()
        self.active += 1
        self._jobs.put(job)

    def close(self) -> None:
        """The thread ends, once it has done what it has to; where it is not the process that
        ends."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        session = self._session
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:
                # A client that waits for its answer learns of it in this way, and only this one.
                traceback.print_exc()
                os._exit(1)
            del job  # and what it held
            with session.lock:
                self.active -= 1
            session.ordering.look()

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Ask the daemon: its answer, and the file that came with it (-1: none). Nothing at all
        where it does not answer any more."""
        assert self.channel is not None
        try:
            control.send_file(self.channel, request)
            return control.receive_file(self.channel)
        except (OSError, EOFError, GpuRemoteError):
            return {}, -1

    def _list(self, number: int) -> None:
        session = self._session
        # Who does not read its answers gets none that is large.
        answer = self._ask({"list": 1})[0] if session.peer.credit > 0 else {}
        with session.lock:
            self._listing = False
            session.answers.info(number, answer.get("sketches"))

    def _fetch(self, number: int, digest: bytes) -> None:
        """Answer an OFFER, and bring the bytes if they are there."""
        session = self._session
        answer, descriptor = self._ask({"want": digest})
        try:
            with session.lock:
                arrival = session.arriving(number)
                if (
                    descriptor < 0
                    or arrival is None
                    or arrival.placed
                    or answer.get("nbytes") != arrival.meta.nbytes
                ):
                    session.answers.info(number, False)
                    return
                if not session.place(number, arrival, "put"):
                    return  # the client has been told why
                session.answers.info(number, True)
            error: Exception | None = None
            try:
                _read(descriptor, arrival.view)
                self.taken += arrival.meta.nbytes
            except (OSError, GpuRemoteError) as failure:
                error = InternalError(f"an upload that was kept can't be read: {failure}")
            session.arrived(number, arrival, error)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _bring(self, copy: _Copy) -> None:
        """Hand a copy of what has come to the daemon, if it wants one."""
        try:
            sketch = self._sketch(copy)
            request = {"have": sketch, "nbytes": copy.nbytes, "digest": copy.digest}
            if sketch and (ticket := self._ask(request)[0].get("ticket")):
                self._hand_over(ticket, copy)
        finally:
            with self._session.lock:
                self._copies.pop(copy)
                if not self._session.backend.exports_memory:
                    self._staged -= copy.nbytes
                elif copy.storage is not None:
                    copy.storage.outgoing -= 1
                    copy.storage = None

    def _sketch(self, copy: _Copy) -> bytes:
        """Empty if the copy was dropped."""
        with self._reading:
            return b"" if copy.view is None else sketch_of(copy.view)

    def _hand_over(self, ticket: int, copy: _Copy) -> None:
        descriptor = -1
        try:
            descriptor = _sealed(copy.nbytes, lambda at, done: self._write(copy, at, done))
            self.kept += copy.nbytes
        except _DroppedError:
            pass
        except OSError as error:
            text = f"gpuremote worker: an upload is not kept for other sessions: {error}"
            print(text, file=sys.stderr, flush=True)
        assert self.channel is not None
        try:
            control.send_file(self.channel, {"bring": ticket}, descriptor)
        except OSError:
            pass  # the daemon has gone, and this process ends
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _write(self, copy: _Copy, descriptor: int, done: int) -> int:
        """Write a piece, from ``done``."""
        with self._reading:
            if copy.dropped or copy.view is None:
                raise _DroppedError
            return os.pwrite(descriptor, copy.view[done : done + PIECE], done)


def _read(descriptor: int, target: memoryview) -> None:
    done = 0
    while done < target.nbytes:
        count = os.preadv(descriptor, [target[done : done + PIECE]], done)
        if not count:
            raise InternalError("it is too short")
        done += count


def _sealed(nbytes: int, write: Callable[[int, int], int]) -> int:
    """A file in memory that nobody can change, with what ``write`` writes to it from an offset."""
    descriptor = os.memfd_create("gpuremote-upload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < nbytes:
            done += write(descriptor, done)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
