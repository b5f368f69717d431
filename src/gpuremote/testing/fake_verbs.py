"""RDMA verbs without a card: queue pairs within one process, with faults on demand."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final

from gpuremote.testing.fake_cuda import FakeCuda
from gpuremote.transport.verbs.base import (
    Access,
    Completion,
    CompletionQueue,
    Gid,
    GidKind,
    Port,
    Remote,
    Status,
    VerbsError,
)

__all__ = ["FakeVerbs"]

_GIDS: Final = (
    Gid(0, bytes.fromhex("fe80000000000000020000fffe000001"), GidKind.ROCE_V2),
    Gid(1, bytes(10) + b"\xff\xff" + bytes((127, 0, 0, 1)), GidKind.ROCE_V2),
)
_PORT: Final = Port(
    number=1,
    active=True,
    state="active",
    mtu=1024,
    max_message=1 << 30,
    lid=0,
    infiniband=False,
)


class FakeVerbs:
    """A provider (see ``gpuremote.transport.verbs.base``) whose devices reach each other.

    It keeps to the rules that a card enforces: keys and ranges are checked, a send that finds no
    receive fails, a queue that is full refuses, an error ends the queue pair at both ends.

    Parameters
    ----------
    names : tuple of str
        Of its devices.
    port : Port
        Port 1 of each of them.
    gids : sequence of Gid
    lockable : int
        Bytes that may be registered at a time.
    cuda : FakeCuda, optional
        Whose memory it can reach as well.

    Attributes
    ----------
    dmabuf : int
        The error of registering a dma-buf; 0: it works.
    offsets : bool
        It counts a dma-buf's addresses from where the registered part begins in it, as pyverbs.
    peermem : bool
        Device memory can be registered by its address.
    link : bool
        False: nothing gets through any more; what is posted ends as RETRY_EXC_ERR.
    corrupt : bool
        Writes bring other bytes.
    holding : bool
        What is posted is not carried out until :meth:`let_go`.
    withheld : bool
        Completions are not reported until :meth:`report`.
    written : list of int
        Sizes of the writes that were carried out.
    registered : int
        Bytes that are registered now.
    """

    name = "fake"

    def __init__(
        self,
        names: tuple[str, ...] = ("fake0",),
        port: Port = _PORT,
        gids: tuple[Gid, ...] = _GIDS,
        lockable: int = 1 << 40,
        cuda: FakeCuda | None = None,
    ) -> None:
        self.cuda = cuda
        self.dmabuf = 0 if cuda is not None else errno.EOPNOTSUPP
        self.offsets = False
        self.peermem = False
        self._names = names
        self.port = port
        self.gids = gids
        self.lockable = lockable
        self.lock = threading.RLock()
        self.link = True
        self.corrupt = False
        self.holding = False
        self.withheld = False
        self.written: list[int] = []
        self.registered = 0
        self.pairs: dict[int, _Pair] = {}
        self.memory: dict[int, _Memory] = {}
        self.numbers = count(1)
        self.open_devices = 0
        self._held: deque[Callable[[], None]] = deque()
        self._failures: deque[int] = deque()
        self._unreported: deque[tuple[_Queue, Completion]] = deque()

    def devices(self) -> list[str]:
        return list(self._names)

    def open(self, name: str) -> _Device:
        self.open_devices += 1
        return _Device(self, name)

    # -- faults --------------------------------------------------------------------------------

    def fail(self, status: Status) -> None:
        """The next thing posted to be sent or written ends like this."""
        self._failures.append(int(status))

    def let_go(self) -> None:
        """Carry out what was held."""
        with self.lock:
            self.holding = False
            while self._held:
                self._held.popleft()()

    def report(self) -> None:
        """Report what was withheld."""
        with self.lock:
            self.withheld = False
            while self._unreported:
                queue, completion = self._unreported.popleft()
                queue.push(completion)

    def rouse(self) -> None:
        """Wake whoever waits for completions, for nothing."""
        with self.lock:
            for queue in {pair.queue for pair in self.pairs.values()}:
                queue.signal()

    def forget_who_waits(self) -> None:
        """No event comes for what is reported next."""
        with self.lock:
            for queue in {pair.queue for pair in self.pairs.values()}:
                queue.disarm()

    # -- for its parts -------------------------------------------------------------------------

    def next_failure(self) -> int:
        if self._failures:
            return self._failures.popleft()
        return int(Status.SUCCESS if self.link else Status.RETRY_EXC_ERR)

    def carry_out(self, step: Callable[[], None]) -> None:
        if self.holding:
            self._held.append(step)
        else:
            step()

    def push(self, queue: _Queue, completion: Completion) -> None:
        if self.withheld:
            self._unreported.append((queue, completion))
        else:
            queue.push(completion)


class _Device:
    def __init__(self, verbs: FakeVerbs, name: str) -> None:
        self.name = name
        self._verbs = verbs
        self._closed = False

    def port(self, number: int) -> Port:
        if number != self._verbs.port.number:
            raise VerbsError(f"port {number} of {self.name}", errno.EINVAL)
        return self._verbs.port

    def gids(self, port: Port) -> list[Gid]:
        return list(self._verbs.gids)

    def register(self, address: int, size: int, access: Access) -> _Memory:
        with self._verbs.lock:
            if self._verbs.registered + size > self._verbs.lockable:
                raise VerbsError(f"{size} bytes can't be registered with {self.name}", errno.ENOMEM)
            cuda = self._verbs.cuda
            if cuda is not None and cuda.owns(address) and not self._verbs.peermem:
                raise VerbsError(f"{size} bytes can't be registered with {self.name}", errno.EFAULT)
            return _Memory(self._verbs, address, size, access)

    def register_dmabuf(
        self, descriptor: int, offset: int, size: int, address: int, access: Access
    ) -> tuple[_Memory, int]:
        verbs = self._verbs
        with verbs.lock:
            if verbs.dmabuf or verbs.cuda is None:
                raise VerbsError(f"no dma-buf can be registered with {self.name}", verbs.dmabuf)
            os.fstat(descriptor)
            here = verbs.cuda.exported[descriptor] + offset
            first = offset if verbs.offsets else address
            return _Memory(verbs, first, size, access, here), first

    def completion_queue(self, depth: int) -> _Queue:
        return _Queue(depth)

    def queue_pair(self, queue: CompletionQueue, sends: int, receives: int) -> _Pair:
        assert isinstance(queue, _Queue)
        return _Pair(self._verbs, queue, sends, receives)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._verbs.open_devices -= 1


class _Memory:
    def __init__(
        self, verbs: FakeVerbs, address: int, size: int, access: Access, here: int = 0
    ) -> None:
        self._verbs = verbs
        self.shift = (here or address) - address
        """From what a card calls an address to where that is."""
        self.begin = address
        self.end = address + size
        self.access = access
        self.lkey = self.rkey = next(verbs.numbers)
        verbs.memory[self.rkey] = self
        verbs.registered += size

    def covers(self, address: int, size: int) -> bool:
        return self.begin <= address and address + size <= self.end

    def close(self) -> None:
        with self._verbs.lock:
            if self._verbs.memory.pop(self.rkey, None) is not None:
                self._verbs.registered -= self.end - self.begin


class _Queue:
    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._found: deque[Completion] = deque()
        self._armed = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def push(self, completion: Completion) -> None:
        if self._fd < 0:
            return
        assert len(self._found) < self._depth, "a completion queue overflows"
        self._found.append(completion)
        if self._armed:
            self._armed = False
            self.signal()

    def signal(self) -> None:
        os.eventfd_write(self._fd, 1)

    def poll(self, wanted: int) -> list[Completion]:
        found: list[Completion] = []
        while self._found and len(found) < wanted:
            found.append(self._found.popleft())
        return found

    def arm(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._armed = True

    def disarm(self) -> None:
        self._armed = False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(slots=True)
class _Send:
    work: int
    address: int
    size: int
    lkey: int
    signaled: bool
    remote: tuple[int, int] | None = None  # address and key of a write
    immediate: int | None = None


class _Pair:
    inline = 0

    def __init__(self, verbs: FakeVerbs, queue: _Queue, sends: int, receives: int) -> None:
        self._verbs = verbs
        self.queue = queue
        self.number = next(verbs.numbers)
        self._room = sends
        self._receives_room = receives
        self._posted = 0
        self._unsignaled = 0
        self._receives: deque[tuple[int, int, int, int]] = deque()
        self._remote: Remote | None = None
        self._prepared = False
        self.failed = False
        verbs.pairs[self.number] = self

    def prepare(self, port: Port) -> None:
        self._prepared = True

    def connect(self, port: Port, gid: Gid, psn: int, remote: Remote) -> None:
        assert self._prepared
        self._remote = remote

    def post_receive(self, work: int, address: int, size: int, lkey: int) -> None:
        with self._verbs.lock:
            if len(self._receives) >= self._receives_room:
                raise VerbsError("a receive can't be posted", errno.ENOMEM)
            if self.failed:
                self._push(work, Status.WR_FLUSH_ERR)
            else:
                self._receives.append((work, address, size, lkey))

    def post_send(self, work: int, address: int, size: int, lkey: int, *, signaled: bool) -> None:
        self._post(_Send(work, address, size, lkey, signaled))

    def post_write(
        self,
        work: int,
        address: int,
        size: int,
        lkey: int,
        remote_address: int,
        rkey: int,
        *,
        signaled: bool,
        immediate: int | None = None,
    ) -> None:
        remote = (remote_address, rkey)
        self._post(_Send(work, address, size, lkey, signaled, remote, immediate))

    def _post(self, send: _Send) -> None:
        with self._verbs.lock:
            # As with a card, a slot is free again when a later request has reported its end.
            if self._posted >= self._room:
                raise VerbsError("a send can't be posted", errno.ENOMEM)
            self._posted += 1
            self._verbs.carry_out(lambda: self._carry_out(send))

    def _carry_out(self, send: _Send) -> None:
        status = Status.WR_FLUSH_ERR if self.failed else self._deliver(send)
        if status or send.signaled:
            self._posted -= self._unsignaled + 1
            self._unsignaled = 0
            self._push(send.work, status, send.size)
        else:
            self._unsignaled += 1
        if status and not self.failed:
            self.fail()

    def _deliver(self, send: _Send) -> int:
        if failure := self._verbs.next_failure():
            return failure
        remote = self._remote
        peer = self._verbs.pairs.get(remote.number) if remote is not None else None
        if peer is None or peer.failed or peer._remote is None:
            return Status.RETRY_EXC_ERR
        if peer._remote.number != self.number:
            return Status.RETRY_EXC_ERR
        memory = self._verbs.memory.get(send.lkey)
        if memory is None or not memory.covers(send.address, send.size):
            return Status.LOC_PROT_ERR
        source = send.address + memory.shift
        if send.remote is None:
            return peer._take(send, source)
        return peer._written(send, source, *send.remote, corrupt=self._verbs.corrupt)

    def _take(self, send: _Send, source: int) -> int:
        if not self._receives:
            return Status.RNR_RETRY_EXC_ERR
        work, address, size, _ = self._receives.popleft()
        if send.size > size:
            self._push(work, Status.LOC_LEN_ERR)
            return Status.REM_INV_REQ_ERR
        ctypes.memmove(address, source, send.size)
        self._push(work, Status.SUCCESS, send.size)
        return Status.SUCCESS

    def _written(self, send: _Send, source: int, address: int, rkey: int, *, corrupt: bool) -> int:
        memory = self._verbs.memory.get(rkey)
        allowed = memory is not None and memory.access & Access.WRITE_THERE
        if memory is None or not allowed or not memory.covers(address, send.size):
            self.fail()
            return Status.REM_ACCESS_ERR
        if send.immediate is not None and not self._receives:
            return Status.RNR_RETRY_EXC_ERR
        target = address + memory.shift
        ctypes.memmove(target, source, send.size)
        if corrupt:
            ctypes.memset(target, 0, send.size)
        self._verbs.written.append(send.size)
        if send.immediate is not None:
            work = self._receives.popleft()[0]
            self._push(work, Status.SUCCESS, send.size, send.immediate)
        return Status.SUCCESS

    def _push(self, work: int, status: int, size: int = 0, immediate: int | None = None) -> None:
        vendor = 0x51 if status else 0
        self._verbs.push(
            self.queue, Completion(work, int(status), size, self.number, vendor, immediate)
        )

    def fail(self) -> None:
        with self._verbs.lock:
            self.failed = True
            while self._receives:
                self._push(self._receives.popleft()[0], Status.WR_FLUSH_ERR)

    def close(self) -> None:
        with self._verbs.lock:
            self.failed = True
            self._receives.clear()
            self._verbs.pairs.pop(self.number, None)
