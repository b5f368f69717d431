"""A session's part in what its server keeps of uploads (see ``server.contents``).

A thread of its own asks the daemon, and copies: from a file that is kept into memory of the
session, or what has come into a new file. Ops that would write to that memory wait meanwhile.
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
from gpuremote.wire.caps import DIGEST, SHARED_LEAST
from gpuremote.wire.digests import sketch_of

if TYPE_CHECKING:
    from gpuremote.server.arrivals import Arrival
    from gpuremote.server.session import WorkerSession

__all__ = ["Sharing"]

PIECE: Final = 16 << 20
"""Bytes of one system call."""


class Sharing:
    """Takes digests of a session's uploads.

    Attributes
    ----------
    channel : socket.socket or None
        To the daemon's desk; None: the server keeps nothing.
    active : int
        Things that its thread has to do.
    taken, kept : int
        Bytes that did not have to travel, and that were handed to the daemon.
    """

    def __init__(self, session: WorkerSession) -> None:
        self.channel: socket.socket | None = None
        self.active = 0
        self.taken = 0
        self.kept = 0
        self._session = session
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
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
            self._do(lambda: self._fetch(number, arrival), lambda: self._answer(number, False))

    def _contents(self, number: int) -> None:
        self._do(lambda: self._list(number), lambda: self._answer(number, b""))

    def keep(self, arrival: Arrival) -> None:
        """The bytes of an array are here: let others have a copy, where that is asked for."""
        if self.channel is None or not arrival.kept or not isinstance(arrival.target, memoryview):
            return
        if self._session.backend.exports_memory:
            # The array's own memory: ops in place on it wait.
            arrival.storage.outgoing += 1
        self._do(lambda: self._bring(arrival), lambda: None)

    def _do(self, job: Callable[[], None], without: Callable[[], None]) -> None:
        if self.channel is None:
            without()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gpuremote-share", daemon=True)
            self._thread.start()
        self.active += 1
        self._jobs.put(job)

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        session = self._session
        while True:
            try:
                self._jobs.get()()
            except BaseException:
                # A client that waits for its answer learns of it in this way, and only this one.
                traceback.print_exc()
                os._exit(1)
            with session.lock:
                self.active -= 1
            session.ordering.stir()  # there may be something to send, or to run

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Ask the daemon: its answer, and the file that came with it (-1: none). Nothing at all
        where it does not answer any more."""
        assert self.channel is not None
        try:
            control.send_file(self.channel, request)
            return control.receive_file(self.channel)
        except (OSError, EOFError, GpuRemoteError):
            return {}, -1

    def _answer(self, number: int, value: Any) -> None:
        with self._session.lock:
            self._session.answers.info(number, value)

    def _list(self, number: int) -> None:
        # Who does not read its answers gets none that is large.
        answer = self._ask({"list": 1})[0] if self._session.peer.credit > 0 else {}
        self._answer(number, answer.get("sketches", b""))

    def _fetch(self, number: int, arrival: Arrival) -> None:
        """Answer an OFFER, and bring the bytes if they are there."""
        session = self._session
        answer, descriptor = self._ask({"want": arrival.digest})
        try:
            held = descriptor >= 0 and answer.get("nbytes") == arrival.meta.nbytes
            with session.lock:
                wanted = session.arriving(number) is arrival and not arrival.placed
                if not (held and wanted):
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

    def _bring(self, arrival: Arrival) -> None:
        """Hand a copy of what has come to the daemon, if it wants one."""
        view, digest = arrival.view, arrival.digest
        try:
            request = {"have": sketch_of(view), "nbytes": view.nbytes, "digest": digest}
            if ticket := self._ask(request)[0].get("ticket"):
                self._hand_over(ticket, view)
        finally:
            if self._session.backend.exports_memory:
                with self._session.lock:
                    arrival.storage.outgoing -= 1

    def _hand_over(self, ticket: int, view: memoryview) -> None:
        descriptor = -1
        try:
            descriptor = _sealed(view)
            self.kept += view.nbytes
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


def _read(descriptor: int, target: memoryview) -> None:
    done = 0
    while done < target.nbytes:
        count = os.preadv(descriptor, [target[done : done + PIECE]], done)
        if not count:
            raise InternalError("it is too short")
        done += count


def _sealed(source: memoryview) -> int:
    """A file in memory with these bytes, which nobody can change."""
    descriptor = os.memfd_create("gpuremote-upload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        done = 0
        while done < source.nbytes:
            done += os.pwrite(descriptor, source[done : done + PIECE], done)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
