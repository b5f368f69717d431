"""A port that an RDMA connection uses, with what belongs to it on this side. Private."""

from __future__ import annotations

import contextlib
import secrets
from typing import Any, Final, Protocol

from gpuremote.transport.rdma.memory import Registry, anonymous
from gpuremote.transport.verbs.base import (
    Access,
    Completion,
    Device,
    Gid,
    Port,
    QueuePair,
    Remote,
    VerbsError,
)

__all__ = ["Far", "Owner", "Rail", "Works", "random_psn"]

_PAGE: Final = 4096
MAX_DEPTH: Final = 4096
"""Completions that a completion queue holds."""


class Owner(Protocol):
    """Who posted a work request."""

    def completed(self, work: int, tag: int, completion: Completion) -> None:
        """It ended, well."""

    def describe(self, work: int, tag: int) -> str:
        """What it was, for people."""

    def refused(self, completion: Completion) -> bool:
        """It failed: whether the connection goes on all the same."""


class Works:
    """Work requests that have not ended, by number. A number is never used twice, so that what is
    reported of a queue pair that was given up meanwhile finds nobody."""

    def __init__(self) -> None:
        self._last = 0
        self._owners: dict[int, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, owner: Owner, tag: int) -> int:
        self._last += 1
        self._owners[self._last] = owner, tag
        return self._last

    def pop(self, work: int) -> tuple[Owner, int] | None:
        return self._owners.pop(work, None)

    def drop(self, owner: Owner) -> None:
        """Forget what ``owner`` posted."""
        for work in [w for w, (whose, _) in self._owners.items() if whose is owner]:
            del self._owners[work]

    def clear(self) -> None:
        self._owners.clear()


class Far:
    """The other end of a rail."""

    __slots__ = ("gid", "lid", "max_message", "mtu")

    def __init__(self, gid: bytes, lid: int, mtu: int, max_message: int) -> None:
        self.gid = gid
        self.lid = lid
        self.mtu = mtu
        self.max_message = max_message


class Rail:
    """One port.

    Parameters
    ----------
    device : Device
        Owned from now on.
    port : Port
    gid : Gid
        The address that is used.

    Raises
    ------
    VerbsError
        Nothing is left of it.
    """

    def __init__(self, device: Device, port: Port, gid: Gid) -> None:
        self.device = device
        self.port = port
        self.gid = gid
        self.works = Works()
        self.registry = Registry(device)
        self.far = Far(gid.raw, port.lid, port.mtu, port.max_message)
        self._pairs: list[QueuePair] = []
        self._page, self.sink = anonymous(_PAGE)
        """Where a receive points that brings nothing but a number."""
        try:
            self.queue = device.completion_queue(MAX_DEPTH)
            self._sink = device.register(self.sink, _PAGE, Access.WRITE_HERE)
        except VerbsError:
            device.close()
            raise
        self.sink_key = self._sink.lkey

    @property
    def max_message(self) -> int:
        """Bytes of one work request."""
        return min(self.port.max_message, self.far.max_message)

    def queue_pair(self, sends: int, receives: int) -> QueuePair:
        """A new one, initialised."""
        pair = self.device.queue_pair(self.queue, sends, receives)
        self._pairs.append(pair)
        pair.prepare(self.port)
        return pair

    def connect(self, pair: QueuePair, psn: int, number: int, their_psn: int) -> None:
        mtu = min(self.port.mtu, self.far.mtu)
        remote = Remote(number, their_psn, self.far.gid, self.far.lid, mtu)
        pair.connect(self.port, self.gid, psn, remote)

    def trouble(self) -> str:
        """What the port itself has, to be added to an error; empty if nothing."""
        try:
            port = self.device.port(self.port.number)
        except VerbsError:
            return f"; {self.device.name} does not answer any more"
        return "" if port.active else f"; port {port.number} of {self.device.name} is {port.state}"

    def discard(self, pair: QueuePair) -> None:
        """A queue pair is of no use any more."""
        self._pairs.remove(pair)
        pair.fail()
        pair.close()

    def close(self) -> None:
        """Give everything back: on return no device touches any memory of this side."""
        for pair in self._pairs:
            pair.fail()
        # What ends now was flushed; the loop ends, as nothing is posted any more.
        with contextlib.suppress(VerbsError):
            for _ in range(4):
                while self.queue.poll(64):
                    pass
        self.works.clear()
        parts: list[_Closes] = [*self._pairs, self.registry, self._sink, self.queue, self.device]
        self._pairs.clear()
        for part in parts:
            # One that a broken device does not take back must not keep the others.
            with contextlib.suppress(VerbsError):
                part.close()


class _Closes(Protocol):
    def close(self) -> None: ...


def random_psn() -> int:
    """Where a queue pair begins to count its packets."""
    return secrets.randbits(24)
