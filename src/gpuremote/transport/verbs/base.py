"""What the RDMA transport asks of a verbs library: a small part of the verbs, spelled once.

A provider translates this to its library. Nothing here waits: a completion queue has a descriptor
that becomes readable after :meth:`CompletionQueue.arm`, and :meth:`CompletionQueue.poll` takes what
is there. Memory is named by address and key; who calls keeps it alive and in place.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

__all__ = [
    "Access",
    "Completion",
    "CompletionQueue",
    "Device",
    "Gid",
    "GidKind",
    "Memory",
    "Port",
    "QueuePair",
    "Remote",
    "Status",
    "VerbsError",
    "VerbsProvider",
]

SUCCESS: Final = 0


class VerbsError(OSError):
    """A verb failed; ``errno`` says why where the library tells."""

    def __init__(self, what: str, number: int = 0) -> None:
        reason = errno.errorcode.get(number, "")
        super().__init__(number, f"{what} ({reason})" if reason else what)


class Status(enum.IntEnum):
    """How a work request ended (the numbers of ``enum ibv_wc_status``)."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_EEC_OP_ERR = 3
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    MW_BIND_ERR = 6
    BAD_RESP_ERR = 7
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    LOC_RDD_VIOL_ERR = 14
    REM_INV_RD_REQ_ERR = 15
    REM_ABORT_ERR = 16
    INV_EECN_ERR = 17
    INV_EEC_STATE_ERR = 18
    FATAL_ERR = 19
    RESP_TIMEOUT_ERR = 20
    GENERAL_ERR = 21


class Access(enum.IntFlag):
    """What may be done with registered memory (the numbers of ``enum ibv_access_flags``)."""

    READ_HERE = 0
    WRITE_HERE = 1
    WRITE_THERE = 2


class GidKind(enum.Enum):
    """Which protocol a port speaks under one of its addresses."""

    INFINIBAND = "InfiniBand"
    ROCE_V1 = "RoCE v1"
    ROCE_V2 = "RoCE v2"


@dataclass(frozen=True, slots=True)
class Gid:
    """One address of a port: 16 bytes, like an IPv6 address (IPv4 is mapped into it)."""

    index: int
    raw: bytes
    kind: GidKind


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a device.

    Attributes
    ----------
    number : int
        From 1.
    active : bool
    state : str
        For people.
    mtu : int
        Bytes of a packet's payload that the port takes now.
    max_message : int
        Bytes of one work request.
    lid : int
        Its address in an InfiniBand subnet; 0 with RoCE.
    infiniband : bool
        Whether the link is InfiniBand's, not Ethernet's.
    """

    number: int
    active: bool
    state: str
    mtu: int
    max_message: int
    lid: int
    infiniband: bool


class Completion(NamedTuple):
    """A work request that ended.

    Only ``work``, ``status``, ``queue_pair`` and ``vendor_error`` mean something where the status
    is not success. ``immediate`` is the number that the sender of a write gave along, or None.
    """

    work: int
    status: int
    size: int
    queue_pair: int
    vendor_error: int
    immediate: int | None


@dataclass(frozen=True, slots=True)
class Remote:
    """The other end of a queue pair, and how to get there."""

    number: int
    psn: int
    gid: bytes
    lid: int
    mtu: int


class Memory(Protocol):
    """Registered memory."""

    lkey: int
    rkey: int

    def close(self) -> None:
        """Unregister: from then on no write from elsewhere gets in. Idempotent."""


class CompletionQueue(Protocol):
    """Where work requests of several queue pairs are reported."""

    def fileno(self) -> int:
        """Readable when something was reported after :meth:`arm`."""

    def poll(self, count: int) -> list[Completion]:
        """What was reported, at most ``count``; never waits."""

    def arm(self) -> None:
        """Take and acknowledge events that are there, and ask for the next one. What was reported
        before does not cause it: poll after this."""

    def close(self) -> None: ...


class QueuePair(Protocol):
    """A reliable connection's end. Methods that post raise VerbsError where the queue is full."""

    number: int
    inline: int
    """Bytes that a send may carry in the work request itself."""

    def connect(self, port: Port, gid: Gid, psn: int, remote: Remote) -> None:
        """Bring it from reset to "ready to send"; every attribute is set."""

    def prepare(self, port: Port) -> None:
        """Bring it to "initialised": receives may be posted, nothing arrives yet."""

    def post_receive(self, work: int, address: int, size: int, lkey: int) -> None: ...

    def post_send(
        self, work: int, address: int, size: int, lkey: int, *, signaled: bool
    ) -> None: ...

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
    ) -> None: ...

    def fail(self) -> None:
        """To the error state: everything posted ends, most of it as flushed."""

    def close(self) -> None:
        """After this the device does not touch what was posted. Idempotent."""


class Device(Protocol):
    """An open device, with a protection domain of its own."""

    name: str

    def port(self, number: int) -> Port: ...

    def gids(self, port: Port) -> list[Gid]:
        """The addresses of a port; what can't be queried ends the list."""

    def register(self, address: int, size: int, access: Access) -> Memory: ...

    def register_dmabuf(
        self, descriptor: int, offset: int, size: int, address: int, access: Access
    ) -> tuple[Memory, int]:
        """Register ``size`` bytes from byte ``offset`` of a dma-buf on, which is at ``address``
        for the program; the descriptor may be closed afterwards.

        Returns
        -------
        (Memory, int)
            And the address by which the card calls the first byte: ``address`` where the library
            can say so, else ``offset``.

        Raises
        ------
        VerbsError
            EOPNOTSUPP where the library or the card knows no dma-bufs.
        """

    def completion_queue(self, depth: int) -> CompletionQueue: ...

    def queue_pair(self, queue: CompletionQueue, sends: int, receives: int) -> QueuePair: ...

    def close(self) -> None: ...


class VerbsProvider(Protocol):
    """A verbs library."""

    name: str

    def devices(self) -> list[str]:
        """Names of the devices.

        Raises
        ------
        VerbsError
            They can't be listed.
        """

    def open(self, name: str) -> Device:
        """
        Raises
        ------
        VerbsError
        """
