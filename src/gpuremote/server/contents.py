"""What a server keeps of uploads, so that a further session need not send the same bytes again.

The daemon has them, as files in memory that are sealed: nobody can change them any more, whoever
holds them. A worker that has received an upload writes such a file and hands it over; the daemon
looks whether its bytes are those of the digest, and only then gives it to others. So a client that
says a wrong digest, and a worker too, gains nothing and harms nobody. A worker that asks gets the
file itself and reads its bytes into memory of its own session: no two sessions share any.

What belongs to one tenant is never looked at for another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from gpuremote.errors import GpuRemoteError
from gpuremote.server import control
from gpuremote.wire.caps import DIGEST, DIGEST_START, SHARED_LEAST, SHARED_MOST

__all__ = ["SEALS", "ContentStore", "Desk", "tenant_of"]

log = logging.getLogger("gpuremote.server")

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""What a file has to have, before it is looked at."""
PIECE: Final = 1 << 20
FILES: Final = 4
"""A part of so many of the files that the daemon may have open are for this."""


def tenant_of(token: bytes, certificate: dict[str, Any] | None, encoded: bytes) -> bytes:
    """Whose sessions may have each other's uploads.

    Parameters
    ----------
    token : bytes
        What the client has proved to know; empty: the server asks for none.
    certificate : dict or None
        The client's, as ``getpeercert`` gives one that was verified. Issuer and subject count, so
        that a renewed one is the same tenant's.
    encoded : bytes
        The same in DER, for one without a subject.
    """
    found = hashlib.sha256(b"gpuremote tenant\0" + hashlib.sha256(token).digest())
    if certificate:
        subject = certificate.get("subject")
        name = repr((certificate.get("issuer"), subject)) if subject else ""
        found.update(name.encode() or hashlib.sha256(encoded).digest())
    return found.digest()


class _Entry:
    """One upload.

    Attributes
    ----------
    bringer : Desk
        Of the session that brings it.
    desk : Desk
        Of the one that had to do with it last.
    descriptor : int
        The file; -1 while it is being brought.
    checked : bool
        Its bytes are what the digest says.
    waiting : list of callable
        To be called when it is checked, or gone.
    """

    __slots__ = ("bringer", "checked", "descriptor", "desk", "nbytes", "waiting")

    def __init__(self, nbytes: int, desk: Desk) -> None:
        self.nbytes = nbytes
        self.bringer = self.desk = desk
        self.descriptor = -1
        self.checked = False
        self.waiting: list[Callable[[], None]] = []


class ContentStore:
    """The uploads of all tenants, bounded in bytes and in number.

    Parameters
    ----------
    limit : int
        Bytes, those of uploads that are being brought included.

    Attributes
    ----------
    used : int
        Of these.
    hits, misses, refused : int
        Uploads that did not have to travel; that others had not brought; files that were not what
        their digest said.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.hits = self.misses = self.refused = 0
        most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = SHARED_MOST
        if most_files != resource.RLIM_INFINITY:
            self._most = min(SHARED_MOST, most_files // FILES)
        self._tenants: dict[bytes, OrderedDict[bytes, _Entry]] = {}  # oldest first
        self._checking = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def count(self) -> int:
        """Uploads that it has, or is about to have."""
        return sum(map(len, self._tenants.values()))

    def describe(self) -> dict[str, int]:
        """What tests look at."""
        return {
            "limit": self.limit,
            "used": self.used,
            "count": self.count,
            "hits": self.hits,
            "misses": self.misses,
            "refused": self.refused,
        }

    async def close(self) -> None:
        """Let go of everything."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        # A thread may still be reading a file: it is closed when that has ended.
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for tenant, entries in list(self._tenants.items()):
            for digest in list(entries):
                self._drop(tenant, digest)

    # -- what desks ask -------------------------------------------------------------------------

    def starts(self, tenant: bytes) -> bytes:
        """The beginnings of the digests that a tenant's sessions can have, one after the other."""
        entries = self._entries(tenant)
        return b"".join([d[:DIGEST_START] for d, entry in entries.items() if entry.descriptor >= 0])

    def _entries(self, tenant: bytes) -> OrderedDict[bytes, _Entry]:
        """Of a tenant, to be read."""
        return self._tenants.get(tenant) or OrderedDict()

    def find(self, desk: Desk, digest: bytes) -> _Entry | None:
        """The upload of that digest, checked or about to be; None: there is none."""
        entries = self._entries(desk.tenant)
        entry = entries.get(digest)
        if entry is None or entry.descriptor < 0:
            self.misses += 1
            return None
        entries.move_to_end(digest)
        entry.desk = desk
        return entry

    def reserve(self, desk: Desk, digest: bytes, nbytes: int) -> bool:
        """Make room for an upload that a session has; whether it is wanted."""
        entries = self._entries(desk.tenant)
        if (entry := entries.get(digest)) is not None:
            entries.move_to_end(digest)
            entry.desk = desk
            return False
        if not SHARED_LEAST <= nbytes <= self.limit:
            return False
        while self.used + nbytes > self.limit or self.count >= self._most:
            if not self._evict(desk):
                return False
        self._tenants.setdefault(desk.tenant, OrderedDict())[digest] = _Entry(nbytes, desk)
        self.used += nbytes
        return True

    def _evict(self, desk: Desk) -> bool:
        """Drop what was used longest ago, of the tenant that has most: one that brings much does
        not push out what others have. Nor does a session push out what it brought itself, or the
        second time a large model would find nothing of it."""
        weighed = sorted(
            self._tenants.items(), key=lambda item: -sum(e.nbytes for e in item[1].values())
        )
        for tenant, entries in weighed:
            for digest, entry in entries.items():
                if entry.checked and entry.desk is not desk:
                    self._drop(tenant, digest)
                    return True
        return False

    def _drop(self, tenant: bytes, digest: bytes) -> None:
        entry = self._tenants[tenant].pop(digest)
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        self.used -= entry.nbytes
        if entry.descriptor >= 0:
            os.close(entry.descriptor)
            entry.descriptor = -1
        entry.checked = False
        waiting, entry.waiting = entry.waiting, []
        for told in waiting:
            told()

    def brought(self, desk: Desk, digest: bytes, descriptor: int) -> None:
        """A session hands over the file that it reserved room for (-1: it does not); the store's
        from now on."""
        entry = self._entries(desk.tenant).get(digest)
        if entry is None or entry.bringer is not desk or entry.descriptor >= 0 or self._closed:
            if descriptor >= 0:
                os.close(descriptor)
            return
        if descriptor < 0:
            self._drop(desk.tenant, digest)
            return
        entry.descriptor = descriptor
        task = asyncio.create_task(self._check(desk.tenant, digest, entry))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, tenant: bytes, digest: bytes, entry: _Entry) -> None:
        """Look whether a file is what it is said to be; one after the other."""
        reading: asyncio.Future[bytes] | None = None
        found = b""
        try:
            async with self._checking:
                loop = asyncio.get_running_loop()
                # A thread: other connections are not kept waiting.
                reading = loop.run_in_executor(None, _digest, entry.descriptor, entry.nbytes)
                found = await asyncio.shield(reading)
        except asyncio.CancelledError:
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)
            raise
        except OSError as error:
            log.warning("an upload could not be looked at: %s", error)
        if found == digest:
            entry.checked = True
            waiting, entry.waiting = entry.waiting, []
            for told in waiting:
                told()
            return
        self.refused += 1
        log.warning("an upload is not what its digest says, and is not kept for other sessions")
        self._drop(tenant, digest)

    def gone(self, desk: Desk) -> None:
        """A session has ended: what it was about to bring will not come."""
        for tenant, entries in list(self._tenants.items()):
            for digest, entry in list(entries.items()):
                if entry.bringer is desk and entry.descriptor < 0:
                    self._drop(tenant, digest)


def _digest(descriptor: int, nbytes: int) -> bytes:
    """Of a file that nobody can change any more; empty where it is not that."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
        return b""
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        return b""
    made = hashlib.sha256()
    piece = memoryview(bytearray(PIECE))
    offset = 0
    while count := os.preadv(descriptor, [piece], offset):
        made.update(piece[:count])
        offset += count
    return made.digest()


class Desk:
    """Where one worker asks, and brings what it has. One reply for each question, in order.

    Parameters
    ----------
    store : ContentStore

    Attributes
    ----------
    tenant : bytes
        Whose session the worker has; set before it has one. Empty: none yet, and it gets nothing.
    theirs : socket.socket
        The worker's end, to be closed here once it has it.
    """

    def __init__(self, store: ContentStore) -> None:
        self.tenant = b""
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._channel, self.theirs = control.pair()
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel.fileno(), self._readable)

    def close(self) -> None:
        """The worker has ended, or asks what no worker asks."""
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._store.gone(self)

    def _readable(self) -> None:
        descriptor = -1
        try:
            request, descriptor = control.receive_file(self._channel)
            self._take(request, descriptor)
        except BlockingIOError:
            return
        except (OSError, EOFError, GpuRemoteError):
            self.close()

    def _take(self, request: dict[str, Any], descriptor: int) -> None:
        store, tenant = self._store, self.tenant
        match request:
            case {"bring": bytes(digest)} if tenant:
                store.brought(self, digest, descriptor)
                return
        if descriptor >= 0:
            os.close(descriptor)
        match request:
            case {"want": bytes(digest)} if tenant and len(digest) == DIGEST:
                entry = store.find(self, digest)
                if entry is not None and not entry.checked:
                    entry.waiting.append(lambda: self._give(entry))
                else:
                    self._give(entry)
            case {"have": bytes(digest), "nbytes": int(nbytes)} if tenant and len(digest) == DIGEST:
                self._say({"wanted": store.reserve(self, digest, nbytes)})
            case {"list": _}:
                self._say({"starts": store.starts(tenant)})
            case _:
                self._say({})

    def _give(self, entry: _Entry | None) -> None:
        if entry is None or not entry.checked:
            self._say({"nbytes": -1})
            return
        self._store.hits += 1
        # The worker can read what it gets and nothing else, as it is sealed.
        self._say({"nbytes": entry.nbytes}, entry.descriptor)

    def _say(self, answer: dict[str, Any], descriptor: int = -1) -> None:
        if self._channel.fileno() < 0:
            return
        with contextlib.suppress(OSError):  # it is gone, which is noticed elsewhere
            control.send_file(self._channel, answer, descriptor)
