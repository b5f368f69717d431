"""The verbs of the package ``ibverbs`` from PyPI, which loads the system's libibverbs itself.

It is for a Python that no pyverbs fits, and it can give memory of a dma-buf the address that the
program knows. It does not say which protocol an address of a port speaks: the kernel does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import os
import weakref
from pathlib import Path
from typing import Any, Final

from gpuremote.transport.verbs.base import (
    Access,
    Completion,
    CompletionQueue,
    Gid,
    GidKind,
    Port,
    Remote,
    VerbsError,
)
from gpuremote.transport.verbs.pyverbs_provider import (
    INLINE,
    MIN_RNR_TIMER,
    RD_ATOMIC,
    RETRIES,
    RNR_RETRIES,
    TIMEOUT,
)

__all__ = ["IbverbsProvider"]

_SYSTEM: Final = Path("/sys/class/infiniband")
_SIGNALED, _INLINE = 2, 8
_OP_WRITE, _OP_WRITE_IMM, _OP_SEND = 0, 1, 2
_HAS_IMMEDIATE = 2
_INIT, _RTR, _RTS, _ERROR = 1, 2, 3, 6
_ACTIVE = 4
_INFINIBAND = 1
_STATES: Final = {0: "no change", 1: "down", 2: "initialising", 3: "armed", 4: "active"}
_STATE, _ACCESS, _PKEY, _PORT = 1, 1 << 3, 1 << 4, 1 << 5
_RTR_MASK: Final = _STATE | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20
_RTS_MASK: Final = _STATE | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16
_FORK_DISABLED = 0
_REMOTE: Final = int(Access.WRITE_HERE | Access.WRITE_THERE)


class IbverbsProvider:
    """The provider.

    Raises
    ------
    ImportError
        The package is not installed, or there is no libibverbs.
    """

    def __init__(self) -> None:
        self._module = importlib.import_module("ibverbs")
        self.name = f"ibverbs {getattr(self._module, '__version__', '')}".strip()
        _see_to_forks()

    def devices(self) -> list[str]:
        try:
            return [device.name for device in self._module.get_device_list()]
        except OSError as error:
            raise _failed("devices can't be listed", error) from error

    def open(self, name: str) -> IbverbsDevice:
        return IbverbsDevice(self._module, name)


def _see_to_forks() -> None:
    # A kernel that does not copy pages on fork would leave those of registered memory to the child.
    try:
        library = ctypes.CDLL("libibverbs.so.1")
    except OSError as error:
        raise ImportError(str(error)) from None
    if library.ibv_is_fork_initialized() == _FORK_DISABLED:
        library.ibv_fork_init()  # fails if memory was registered already: then it is too late


def _failed(what: str, error: OSError) -> VerbsError:
    return VerbsError(what, error.errno or 0)


class IbverbsDevice:
    """A device; see ``base.Device``."""

    def __init__(self, module: Any, name: str) -> None:
        self.name = name
        self._module = module
        # What is registered keeps its domain open. (pyverbs' domains close it themselves.)
        self._memory: weakref.WeakSet[IbverbsMemory] = weakref.WeakSet()
        try:
            found = [device for device in module.get_device_list() if device.name == name]
            if not found:
                raise VerbsError(f"{name} can't be opened", errno.ENODEV)
            self._context = found[0].open()
            self._domain = self._context.alloc_pd()
        except module.VerbsError as error:
            raise _failed(f"{name} can't be opened", error) from error

    def port(self, number: int) -> Port:
        try:
            found = self._context.query_port(number)
        except OSError as error:
            raise _failed(f"port {number} of {self.name}", error) from error
        state = int(found.state)
        return Port(
            number=number,
            active=state == _ACTIVE,
            state=_STATES.get(state, f"state {state}"),
            mtu=128 << int(found.active_mtu),
            max_message=int(found.max_msg_sz),
            lid=int(found.lid),
            infiniband=int(found.link_layer) == _INFINIBAND,
        )

    def gids(self, port: Port) -> list[Gid]:
        found = []
        for index in range(int(self._context.query_port(port.number).gid_tbl_len)):
            try:
                raw = bytes(self._context.query_gid(port.number, index))
                kind = self._kind(port, index)
            except OSError:
                break
            found.append(Gid(index, raw, kind))
        return found

    def _kind(self, port: Port, index: int) -> GidKind:
        if port.infiniband:
            return GidKind.INFINIBAND
        types = _SYSTEM / self.name / "ports" / str(port.number) / "gid_attrs" / "types"
        second = (types / str(index)).read_text().strip() == "RoCE v2"
        return GidKind.ROCE_V2 if second else GidKind.ROCE_V1

    def register(self, address: int, size: int, access: Access) -> IbverbsMemory:
        try:
            made = self._domain.reg_mr(address, size, int(access))
        except OSError as error:
            what = f"{size} bytes can't be registered with {self.name}"
            raise _failed(what, error) from error
        return self._noted(made)

    def _noted(self, region: Any) -> IbverbsMemory:
        memory = IbverbsMemory(region)
        self._memory.add(memory)
        return memory

    def register_dmabuf(
        self, descriptor: int, offset: int, size: int, address: int, access: Access
    ) -> tuple[IbverbsMemory, int]:
        try:
            made = self._domain.reg_dmabuf_mr(offset, size, address, descriptor, int(access))
        except OSError as error:
            what = f"a dma-buf of {size} bytes can't be registered with {self.name}"
            raise _failed(what, error) from error
        except RuntimeError as error:
            raise VerbsError(f"no dma-bufs: {error}", errno.EOPNOTSUPP) from error
        return self._noted(made), address

    def completion_queue(self, depth: int) -> IbverbsCompletionQueue:
        try:
            return IbverbsCompletionQueue(self._context, depth)
        except OSError as error:
            raise _failed(f"no completion queue of {depth} on {self.name}", error) from error

    def queue_pair(self, queue: CompletionQueue, sends: int, receives: int) -> IbverbsQueuePair:
        assert isinstance(queue, IbverbsCompletionQueue)
        try:
            return IbverbsQueuePair(self._module, self._domain, queue, sends, receives)
        except OSError as error:
            what = f"no queue pair ({sends} sends, {receives} receives) on {self.name}"
            raise _failed(what, error) from error

    def close(self) -> None:
        try:
            for memory in list(self._memory):
                memory.close()
            self._domain.close()
            self._context.close()
        except OSError as error:
            raise _failed(f"{self.name} can't be closed", error) from error


class IbverbsMemory:
    """See ``base.Memory``."""

    def __init__(self, region: Any) -> None:
        self._region = region
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        region, self._region = self._region, None
        if region is None:
            return
        try:
            region.close()
        except OSError as error:
            raise _failed("memory can't be unregistered", error) from error


class IbverbsCompletionQueue:
    """See ``base.CompletionQueue``."""

    def __init__(self, context: Any, depth: int) -> None:
        self._channel = context.create_comp_channel()
        flags = fcntl.fcntl(self._channel.fd, fcntl.F_GETFL)
        fcntl.fcntl(self._channel.fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        self.queue = context.create_cq(depth, self._channel)
        self._events = 0
        self._closed = False

    def fileno(self) -> int:
        return int(self._channel.fd)

    def poll(self, count: int) -> list[Completion]:
        try:
            found = self.queue.poll(count)
        except OSError as error:
            raise _failed("a completion queue can't be polled", error) from error
        return [
            Completion(
                wc.wr_id,
                int(wc.status),
                wc.byte_len,
                wc.qp_num,
                wc.vendor_err,
                wc.imm_data if wc.wc_flags & _HAS_IMMEDIATE else None,
            )
            for wc in found
        ]

    def arm(self) -> None:
        try:
            while True:
                self._channel.get_cq_event()
                self._events += 1
        except OSError:
            pass  # EAGAIN: no (further) event
        if self._events >= 64:
            # It takes a lock; but destroying the queue waits for what was not acknowledged.
            self.queue.ack_events(self._events)
            self._events = 0
        try:
            self.queue.req_notify()
        except OSError as error:
            raise _failed("a completion queue can't be armed", error) from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._events:
                self.queue.ack_events(self._events)
            try:
                self.queue.close()
                self._channel.close()
            except OSError as error:
                raise _failed("a completion queue can't be closed", error) from error


class IbverbsQueuePair:
    """See ``base.QueuePair``."""

    def __init__(
        self,
        module: Any,
        domain: Any,
        queue: IbverbsCompletionQueue,
        sends: int,
        receives: int,
    ) -> None:
        self._module = module
        self.inline = INLINE
        wanted = {"max_send_wr": sends, "max_recv_wr": receives, "sq_sig_all": False}
        try:
            made = module.QPInitAttr(queue.queue, queue.queue, max_inline_data=INLINE, **wanted)
            self._pair = domain.create_qp(made)
        except OSError:
            # Some devices carry nothing in a work request.
            self.inline = 0
            self._pair = domain.create_qp(module.QPInitAttr(queue.queue, queue.queue, **wanted))
        self.number: int = self._pair.qp_num
        self._closed = False

    def prepare(self, port: Port) -> None:
        self._modify(
            "initialised",
            _STATE | _PKEY | _PORT | _ACCESS,
            qp_state=_INIT,
            pkey_index=0,
            port_num=port.number,
            qp_access_flags=_REMOTE,
        )

    def connect(self, port: Port, gid: Gid, psn: int, remote: Remote) -> None:
        route = self._module.AHAttr(
            dgid=remote.gid,
            sgid_index=gid.index,
            dlid=remote.lid,
            is_global=1,
            port_num=port.number,
            hop_limit=64,
        )
        self._modify(
            "ready to receive",
            _RTR_MASK,
            ah_attr=route,
            qp_state=_RTR,
            path_mtu=remote.mtu.bit_length() - 8,
            dest_qp_num=remote.number,
            rq_psn=remote.psn,
            max_dest_rd_atomic=RD_ATOMIC,
            min_rnr_timer=MIN_RNR_TIMER,
        )
        self._modify(
            "ready to send",
            _RTS_MASK,
            qp_state=_RTS,
            sq_psn=psn,
            timeout=TIMEOUT,
            retry_cnt=RETRIES,
            rnr_retry=RNR_RETRIES,
            max_rd_atomic=RD_ATOMIC,
        )

    def _modify(self, state: str, mask: int, **attributes: Any) -> None:
        try:
            self._pair.modify(mask, **attributes)
        except OSError as error:
            raise _failed(f"a queue pair does not get {state}", error) from error

    def post_receive(self, work: int, address: int, size: int, lkey: int) -> None:
        entry = self._module.SGE(address, size, lkey)
        try:
            self._pair.post_recv(self._module.RecvWR(work, [entry]))
        except OSError as error:
            raise _failed("a receive can't be posted", error) from error

    def post_send(self, work: int, address: int, size: int, lkey: int, *, signaled: bool) -> None:
        flags = (_SIGNALED if signaled else 0) | (_INLINE if size <= self.inline else 0)
        entry = self._module.SGE(address, size, lkey)
        self._post(self._module.SendWR(work, [entry], _OP_SEND, flags))

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
        entry = self._module.SGE(address, size, lkey)
        self._post(
            self._module.SendWR(
                work,
                [entry],
                _OP_WRITE if immediate is None else _OP_WRITE_IMM,
                _SIGNALED if signaled else 0,
                remote_address,
                rkey,
                immediate or 0,
            )
        )

    def _post(self, request: Any) -> None:
        try:
            self._pair.post_send(request)
        except OSError as error:
            raise _failed("a send can't be posted", error) from error

    def fail(self) -> None:
        if self._closed:
            return
        try:
            self._pair.modify(_STATE, qp_state=_ERROR)
        except OSError:
            pass  # the device is gone; closing goes on

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._pair.close()
            except OSError as error:
                raise _failed("a queue pair can't be closed", error) from error
