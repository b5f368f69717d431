"""What a server keeps of uploads, so that a further session need not send the same bytes again.

The daemon has them, as files in memory that are sealed: nobody can change them any more, whoever
holds them. A worker that has received an upload writes such a file and hands it over; the daemon
makes the digest by which others find it. So a client that says a wrong digest, and a worker too,
gains nothing and harms nobody. A worker that asks gets the file itself and reads its bytes into
memory of its own session: no two sessions share any.

What belongs to one tenant is never looked at for another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import resource
import stat
from collections import Counter, OrderedDict
from typing import Any, Final

from gpuremote.errors import GpuRemoteError
from gpuremote.server import control
from gpuremote.wire.caps import SHARED_LEAST, SHARED_MOST, SKETCH
from gpuremote.wire.digests import sketch_of_file

__all__ = ["SEALS", "ContentStore", "Desk", "tenant_of"]

log = logging.getLogger("gpuremote.server")

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
"""What a file has to have, before it is looked at."""
PIECE: Final = 1 << 20
FILES: Final = 4
"""One in so many of the files that the daemon may have open is for this."""


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
    desk : Desk
        Of the session that had to do with it last.
    descriptor : int
        The file; -1 while it is being brought.
    """

    __slots__ = ("descriptor", "desk", "nbytes", "sketch", "tenant")

    def __init__(self, desk: Desk, sketch: bytes, nbytes: int) -> None:
        self.desk = desk
        self.tenant = desk.tenant
        self.sketch = sketch
        self.nbytes = nbytes
        self.descriptor = -1


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
        Uploads that did not have to travel; that were offered in vain; files that can't be kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.hits = self.misses = self.refused = 0
        most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = SHARED_MOST
        if most_files != resource.RLIM_INFINITY:
            self._most = min(SHARED_MOST, most_files // FILES)
        self._tenants: dict[bytes, OrderedDict[bytes, _Entry]] = {}  # by digest, oldest first
        self._coming: dict[int, _Entry] = {}  # of which there is no digest yet
        self._tickets = itertools.count(1)
        self._checking = asyncio.Lock()
        self._tasks: dict[asyncio.Task[None], _Entry] = {}
        self._closed = False

    @property
    def count(self) -> int:
        """Uploads that it has, or is about to have."""
        return len(self._coming) + sum(map(len, self._tenants.values()))

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
        for ticket in list(self._coming):
            self._let_go(self._coming.pop(ticket))
        for entries in self._tenants.values():
            for entry in entries.values():
                self._let_go(entry)
        self._tenants.clear()

    # -- what desks ask -------------------------------------------------------------------------

    def sketches(self, tenant: bytes) -> bytes:
        """Of what a tenant's sessions can have, one after the other."""
        there = [entry.sketch for entry in self._tenants.get(tenant, OrderedDict()).values()]
        there += [e.sketch for e in self._tasks.values() if e.tenant == tenant]
        return b"".join(there)

    def find(self, desk: Desk, digest: bytes) -> _Entry | None:
        """The upload of that digest; None: there is none."""
        entries = self._tenants.get(desk.tenant, OrderedDict())
        entry = entries.get(digest)
        if entry is not None:
            entries.move_to_end(digest)
            entry.desk = desk
        return entry

    async def settled(self, tenant: bytes) -> None:
        """Wait until there are digests of all that a tenant's sessions have brought by now."""
        if tasks := [task for task, entry in self._tasks.items() if entry.tenant == tenant]:
            await asyncio.wait(tasks)

    def reserve(self, desk: Desk, sketch: bytes, nbytes: int, digest: bytes) -> int:
        """Make room for an upload that a session has; 0 if it is not wanted, else the ticket with
        which it is to be brought. ``digest`` is what the client offered, empty if it did not: then
        it is not wanted where there is one with its sketch."""
        entries = self._tenants.get(desk.tenant, OrderedDict())
        if digest in entries or not SHARED_LEAST <= nbytes <= self.limit or self._closed:
            return 0
        others = [*entries.values(), *(e for e in self._coming.values() if e.tenant == desk.tenant)]
        if not digest and any(entry.sketch == sketch for entry in others):
            return 0
        victims = self._victims(desk, nbytes)
        if victims is None:
            return 0
        for tenant, oldest in victims:
            self._let_go(self._tenants[tenant].pop(oldest))
            if not self._tenants[tenant]:
                del self._tenants[tenant]
        ticket = next(self._tickets)
        self._coming[ticket] = _Entry(desk, sketch, nbytes)
        self.used += nbytes
        return ticket

    def _victims(self, desk: Desk, nbytes: int) -> list[tuple[bytes, bytes]] | None:
        """What has to go for so many bytes more, as tenants and digests; None: they do not fit.

        First goes what was used longest ago, of the tenant that has most: what is on its way
        counts, and for the one that asks the new bytes. Nobody pushes out what is of one that has
        no more. Nor does a session push out what it brought or had itself, or the second time a
        large model would find nothing of it.
        """
        used, count = self.used + nbytes, self.count + 1
        if used <= self.limit and count <= self._most:
            return []
        weights = Counter({desk.tenant: nbytes})
        for entry in self._coming.values():
            weights[entry.tenant] += entry.nbytes
        left: dict[bytes, list[tuple[bytes, _Entry]]] = {}  # the oldest last
        for tenant, entries in self._tenants.items():
            weights[tenant] += sum(entry.nbytes for entry in entries.values())
            if found := [item for item in entries.items() if item[1].desk is not desk]:
                left[tenant] = found[::-1]
        victims = []
        while used > self.limit or count > self._most:
            tenant = max(left, key=lambda t: (weights[t], t == desk.tenant), default=b"")
            if not tenant or (tenant != desk.tenant and weights[tenant] <= weights[desk.tenant]):
                return None
            digest, entry = left[tenant].pop()
            if not left[tenant]:
                del left[tenant]
            victims.append((tenant, digest))
            weights[tenant] -= entry.nbytes
            used -= entry.nbytes
            count -= 1
        return victims

    def _let_go(self, entry: _Entry) -> None:
        self.used -= entry.nbytes
        if entry.descriptor >= 0:
            os.close(entry.descriptor)
            entry.descriptor = -1

    def brought(self, desk: Desk, ticket: int, descriptor: int) -> None:
        """A session hands over the file that it reserved room for (-1: it does not); the store's
        from now on."""
        entry = self._coming.get(ticket)
        if entry is None or entry.desk is not desk or entry.descriptor >= 0 or self._closed:
            if descriptor >= 0:
                os.close(descriptor)
            return
        if descriptor < 0:
            self._let_go(self._coming.pop(ticket))
            return
        entry.descriptor = descriptor
        task = asyncio.create_task(self._check(ticket, entry))
        self._tasks[task] = entry
        task.add_done_callback(self._tasks.pop)

    async def _check(self, ticket: int, entry: _Entry) -> None:
        """Make the digest of a file; one after the other."""
        reading: asyncio.Future[tuple[bytes, bytes]] | None = None
        sketch = digest = b""
        try:
            async with self._checking:
                loop = asyncio.get_running_loop()
                # A thread: other connections are not kept waiting.
                reading = loop.run_in_executor(None, _look, entry.descriptor, entry.nbytes)
                sketch, digest = await asyncio.shield(reading)
        except asyncio.CancelledError:
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)
            raise
        except Exception as error:  # whatever it is, its room must not stay taken
            log.warning("an upload could not be looked at: %r", error)
        else:
            if not digest:
                log.warning("what a worker brought as an upload is not kept: it could still change")
        del self._coming[ticket]
        entries = self._tenants.setdefault(entry.tenant, OrderedDict())
        if digest and digest not in entries:
            entry.sketch = sketch
            entries[digest] = entry
            return
        if not entries:
            del self._tenants[entry.tenant]
        if not digest:
            self.refused += 1
        self._let_go(entry)

    def gone(self, desk: Desk) -> None:
        """A session has ended: what it was about to bring will not come."""
        for ticket, entry in list(self._coming.items()):
            if entry.desk is desk and entry.descriptor < 0:
                self._let_go(self._coming.pop(ticket))


def _look(descriptor: int, nbytes: int) -> tuple[bytes, bytes]:
    """Sketch and digest of a file that nobody can change any more; empty where it is not that."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size != nbytes:
        return b"", b""
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
        return b"", b""
    made = hashlib.sha256()
    piece = memoryview(bytearray(PIECE))
    offset = 0
    while count := os.preadv(descriptor, [piece], offset):
        made.update(piece[:count])
        offset += count
    return sketch_of_file(descriptor, nbytes), made.digest()


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
        self._tasks: set[asyncio.Task[None]] = set()
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
        try:
            request, descriptor = control.receive_file(self._channel)
        except BlockingIOError:
            return
        except (OSError, EOFError, GpuRemoteError):
            self.close()
            return
        match request:
            case {"bring": int(ticket)} if self.tenant:
                self._store.brought(self, ticket, descriptor)
                return
        if descriptor >= 0:
            os.close(descriptor)
        self._answer(request)

    def _answer(self, request: dict[str, Any]) -> None:
        store, tenant = self._store, self.tenant
        match request:
            case {"want": bytes(digest)} if tenant:
                if (entry := store.find(self, digest)) is not None:
                    self._give(entry)
                else:
                    task = self._loop.create_task(self._look_again(digest))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            case {"have": bytes(sketch), "nbytes": int(n), "digest": bytes(digest)} if tenant:
                self._say({"ticket": store.reserve(self, sketch[:SKETCH], n, digest)})
            case {"list": _}:
                self._say({"sketches": store.sketches(tenant)})
            case _:
                self._say({})

    async def _look_again(self, digest: bytes) -> None:
        await self._store.settled(self.tenant)
        self._give(self._store.find(self, digest))

    def _give(self, entry: _Entry | None) -> None:
        if entry is None:
            self._store.misses += 1
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
