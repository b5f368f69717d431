"""The verbs of ``pyverbs``, which comes with rdma-core; from Debian's 44 on.

What is particular about it: importing it sets the root logger up, which is undone here. Its enums
have moved. Its completion channel has no descriptor up to version 56, so that is found among this
process's descriptors. Work requests leak up to version 64 unless they are closed, and closing one
twice ends the process: they are made once for each queue pair and changed for each use.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import logging
import os
import socket
import sys
import sysconfig
import threading
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

__all__ = ["PyverbsProvider", "import_pyverbs"]

_EVENTS: Final = "anon_inode:[infinibandevent]"
_FOLDERS: Final = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")
_MODULES: Final = ("addr", "cq", "device", "fork", "mr", "pd", "pyverbs_error", "qp", "wr")
_making_channel = threading.Lock()

# What the transport relies on: numbers of the kernel's interface.
_SIGNALED, _INLINE = 2, 8
_OP_WRITE, _OP_WRITE_IMM, _OP_SEND = 0, 1, 2
_HAS_IMMEDIATE = 2
_RESET, _INIT, _ERROR = 0, 1, 6
_STATE_MASK = 1
_FORK_DISABLED = 0
_TYPE_RC = 2
_ACTIVE = 4
_INFINIBAND = 1
_STATES: Final = {0: "no change", 1: "down", 2: "initialising", 3: "armed", 4: "active"}

# Local ACK timeout 4.096 µs * 2**14 = 67 ms, 7 retries of it; without end at a receiver that is
# not ready (credits see to it that there is none), asked again after 0.64 ms.
TIMEOUT: Final = 14
RETRIES: Final = 7
RNR_RETRIES: Final = 7
MIN_RNR_TIMER: Final = 12
RD_ATOMIC: Final = 1
INLINE: Final = 64


def import_pyverbs() -> dict[str, Any]:
    """The modules of pyverbs, by name.

    Debian's package lies in a folder that a virtual environment does not look into, though it fits
    where the minor version is the same; that folder is searched last, and during the import only.

    Raises
    ------
    ImportError
        It is not installed for this Python, or does not fit the system's libibverbs.
    """
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    added = [folder for folder in _system_folders() if folder not in sys.path]
    sys.path += added
    try:
        return {name: importlib.import_module(f"pyverbs.{name}") for name in _MODULES}
    finally:
        for folder in added:
            sys.path.remove(folder)
        for handler in [h for h in root.handlers if h not in before[1]]:
            root.removeHandler(handler)
        root.setLevel(before[0])


def _system_folders() -> list[str]:
    """Where a distribution keeps a pyverbs that was built for this version of Python."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    return [folder for folder in _FOLDERS if Path(folder, "pyverbs", f"qp{suffix}").exists()]


class PyverbsProvider:
    """The provider.

    Raises
    ------
    ImportError
    """

    name = "pyverbs"

    def __init__(self) -> None:
        self._modules = import_pyverbs()
        fork = self._modules["fork"]
        if fork.is_fork_initialized() == _FORK_DISABLED:
            # This kernel would leave the pages of registered memory to the child.
            try:
                fork.fork_init()
            except self._modules["pyverbs_error"].PyverbsError:
                pass  # somebody in this process has registered memory already

    def devices(self) -> list[str]:
        try:
            found = self._modules["device"].get_device_list()
        except self._modules["pyverbs_error"].PyverbsError as error:
            # rdma-core says nothing more where the kernel has no RDMA at all.
            raise VerbsError("devices can't be listed", _number(error, errno.ENOSYS)) from error
        return [device.name.decode() for device in found]

    def open(self, name: str) -> PyverbsDevice:
        return PyverbsDevice(self._modules, name)


class PyverbsDevice:
    """A device; see ``base.Device``."""

    def __init__(self, modules: dict[str, Any], name: str) -> None:
        self.name = name
        self._modules = modules
        self._error = modules["pyverbs_error"].PyverbsError
        try:
            self._context = modules["device"].Context(name=name)
            self._domain = modules["pd"].PD(self._context)
        except self._error as error:
            raise VerbsError(f"{name} can't be opened", _number(error)) from error

    def port(self, number: int) -> Port:
        try:
            found = self._context.query_port(number)
        except self._error as error:
            raise VerbsError(f"port {number} of {self.name}", _number(error)) from error
        return Port(
            number=number,
            active=found.state == _ACTIVE,
            state=_STATES.get(found.state, f"state {found.state}"),
            mtu=128 << found.active_mtu,
            max_message=found.max_msg_sz,
            lid=found.lid,
            infiniband=found.link_layer == _INFINIBAND,
        )

    def gids(self, port: Port) -> list[Gid]:
        try:
            entries = self._context.query_gid_table(1024)
        except (self._error, AttributeError):
            return self._gids_one_by_one(port)
        kinds = (GidKind.INFINIBAND, GidKind.ROCE_V1, GidKind.ROCE_V2)
        return [
            Gid(entry.gid_index, _raw(_called(entry.gid_str)), kinds[entry.gid_type])
            for entry in entries
            if entry.port_num == port.number and entry.gid_type < len(kinds)
        ]

    def _gids_one_by_one(self, port: Port) -> list[Gid]:
        """Where the kernel does not give the whole table: until one can't be queried."""
        found = []
        for index in range(self._context.query_port(port.number).gid_tbl_len):
            try:
                raw = _raw(self._context.query_gid(port.number, index).gid)
                second = self._context.query_gid_type(port.number, index)
            except self._error:
                break
            kind = GidKind.ROCE_V2 if second else GidKind.ROCE_V1
            found.append(Gid(index, raw, GidKind.INFINIBAND if port.infiniband else kind))
        return found

    def register(self, address: int, size: int, access: Access) -> PyverbsMemory:
        try:
            region = self._modules["mr"].MR(self._domain, size, int(access), address=address)
        except self._error as error:
            raise VerbsError(
                f"{size} bytes can't be registered with {self.name}", _number(error)
            ) from error
        return PyverbsMemory(region, self._error)

    def register_dmabuf(
        self, descriptor: int, offset: int, size: int, address: int, access: Access
    ) -> tuple[PyverbsMemory, int]:
        made = getattr(self._modules["mr"], "DmaBufMR", None)
        if made is None:
            raise VerbsError("this pyverbs knows no dma-bufs", errno.EOPNOTSUPP)
        try:
            # It gives the card the offset as the address of the first byte, in every version.
            region = made(self._domain, size, int(access), descriptor, offset)
        except self._error as error:
            raise VerbsError(
                f"a dma-buf of {size} bytes can't be registered with {self.name}", _number(error)
            ) from error
        return PyverbsMemory(region, self._error), offset

    def completion_queue(self, depth: int) -> PyverbsCompletionQueue:
        try:
            return PyverbsCompletionQueue(self._modules, self._context, depth)
        except self._error as error:
            raise VerbsError(
                f"no completion queue of {depth} on {self.name}", _number(error)
            ) from error

    def queue_pair(self, queue: CompletionQueue, sends: int, receives: int) -> PyverbsQueuePair:
        assert isinstance(queue, PyverbsCompletionQueue)
        try:
            return PyverbsQueuePair(self._modules, self._domain, queue, sends, receives)
        except self._error as error:
            raise VerbsError(
                f"no queue pair ({sends} sends, {receives} receives) on {self.name}",
                _number(error),
            ) from error

    def close(self) -> None:
        try:
            self._domain.close()
            self._context.close()
        except self._error as error:
            raise VerbsError(f"{self.name} can't be closed", _number(error)) from error


class PyverbsMemory:
    """See ``base.Memory``."""

    def __init__(self, region: Any, error: type[Exception]) -> None:
        self._region = region
        self._error = error
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        try:
            self._region.close()
        except self._error as error:
            raise VerbsError("memory can't be unregistered", _number(error)) from error


class PyverbsCompletionQueue:
    """See ``base.CompletionQueue``. One channel for each queue, as ``get_cq_event`` wants it."""

    def __init__(self, modules: dict[str, Any], context: Any, depth: int) -> None:
        module = modules["cq"]
        self._error = modules["pyverbs_error"].PyverbsError
        with _making_channel:
            before = _event_descriptors()
            self._channel = module.CompChannel(context)
            self._fd = getattr(self._channel, "fd", -1)
            if self._fd < 0:
                new = _event_descriptors() - before
                if len(new) != 1:
                    self._channel.close()
                    raise VerbsError("the descriptor of a completion channel can't be told")
                (self._fd,) = new
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        self._queue = module.CQ(context, depth, None, self._channel, 0)
        self.queue = self._queue
        self._events = 0
        self._closed = False

    def fileno(self) -> int:
        return self._fd

    def poll(self, count: int) -> list[Completion]:
        try:
            _, found = self._queue.poll(count)
        except self._error as error:
            raise VerbsError("a completion queue can't be polled", _number(error)) from error
        if not found:
            return []
        return [
            Completion(
                wc.wr_id,
                wc.status,
                wc.byte_len,
                wc.qp_num,
                wc.vendor_err,
                socket.ntohl(wc.imm_data) if wc.wc_flags & _HAS_IMMEDIATE else None,
            )
            for wc in found
        ]

    def arm(self) -> None:
        try:
            while True:
                self._channel.get_cq_event(self._queue)
                self._events += 1
        except self._error:
            pass  # EAGAIN: no (further) event
        if self._events >= 64:
            # It takes a lock; but destroying the queue waits for what was not acknowledged.
            self._queue.ack_events(self._events)
            self._events = 0
        try:
            self._queue.req_notify()
        except self._error as error:
            raise VerbsError("a completion queue can't be armed", _number(error)) from error

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._events:
                self._queue.ack_events(self._events)
            try:
                self._queue.close()
                self._channel.close()
            except self._error as error:
                raise VerbsError("a completion queue can't be closed", _number(error)) from error


class PyverbsQueuePair:
    """See ``base.QueuePair``."""

    def __init__(
        self,
        modules: dict[str, Any],
        domain: Any,
        queue: PyverbsCompletionQueue,
        sends: int,
        receives: int,
    ) -> None:
        self._modules = modules
        self._error = modules["pyverbs_error"].PyverbsError
        module = modules["qp"]
        capacity = module.QPCap(
            max_send_wr=sends,
            max_recv_wr=receives,
            max_send_sge=1,
            max_recv_sge=1,
            max_inline_data=INLINE,
        )
        wanted = module.QPInitAttr(
            qp_type=_TYPE_RC, scq=queue.queue, rcq=queue.queue, cap=capacity, sq_sig_all=0
        )
        try:
            self._pair = module.QP(domain, wanted)
        except self._error:
            # Some devices carry nothing in a work request.
            capacity.max_inline_data = 0
            wanted = module.QPInitAttr(
                qp_type=_TYPE_RC, scq=queue.queue, rcq=queue.queue, cap=capacity, sq_sig_all=0
            )
            self._pair = module.QP(domain, wanted)
        self.number: int = self._pair.qp_num
        self.inline: int = min(INLINE, wanted.max_inline_data)
        self._requests = _Requests(modules["wr"])
        self._closed = False

    def prepare(self, port: Port) -> None:
        attributes = self._modules["qp"].QPAttr(port_num=port.number)
        attributes.qp_state = _INIT
        attributes.pkey_index = 0
        attributes.qp_access_flags = int(Access.WRITE_HERE | Access.WRITE_THERE)
        self._transition(self._pair.to_init, attributes, "initialised")

    def connect(self, port: Port, gid: Gid, psn: int, remote: Remote) -> None:
        addr = self._modules["addr"]
        route = addr.GlobalRoute(
            dgid=addr.GID(_text(remote.gid)), sgid_index=gid.index, hop_limit=64
        )
        attributes = self._modules["qp"].QPAttr(port_num=port.number)
        attributes.path_mtu = remote.mtu.bit_length() - 8
        attributes.dest_qp_num = remote.number
        attributes.rq_psn = remote.psn
        attributes.sq_psn = psn
        attributes.ah_attr = addr.AHAttr(
            port_num=port.number, is_global=1, gr=route, dlid=remote.lid
        )
        attributes.max_dest_rd_atomic = RD_ATOMIC
        attributes.max_rd_atomic = RD_ATOMIC
        attributes.min_rnr_timer = MIN_RNR_TIMER
        attributes.timeout = TIMEOUT
        attributes.retry_cnt = RETRIES
        attributes.rnr_retry = RNR_RETRIES
        attributes.qp_access_flags = int(Access.WRITE_HERE | Access.WRITE_THERE)
        # to_rts() would go through "initialised" once more, where it is already.
        attributes.qp_state = 2
        self._modify(attributes, _RTR_MASK, "ready to receive")
        attributes.qp_state = 3
        self._modify(attributes, _RTS_MASK, "ready to send")

    def _modify(self, attributes: Any, mask: int, state: str) -> None:
        self._transition(lambda a: self._pair.modify(a, mask), attributes, state)

    def _transition(self, step: Any, attributes: Any, state: str) -> None:
        try:
            step(attributes)
        except self._error as error:
            raise VerbsError(f"a queue pair does not get {state}", _number(error)) from error

    def post_receive(self, work: int, address: int, size: int, lkey: int) -> None:
        try:
            self._pair.post_recv(self._requests.receive(work, address, size, lkey))
        except self._error as error:
            raise VerbsError("a receive can't be posted", _number(error)) from error

    def post_send(self, work: int, address: int, size: int, lkey: int, *, signaled: bool) -> None:
        flags = (_SIGNALED if signaled else 0) | (_INLINE if size <= self.inline else 0)
        request = self._requests.send(work, _OP_SEND, flags, address, size, lkey)
        self._post(request)

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
        flags = _SIGNALED if signaled else 0
        operation = _OP_WRITE if immediate is None else _OP_WRITE_IMM
        request = self._requests.send(work, operation, flags, address, size, lkey)
        request.set_wr_rdma(rkey, remote_address)
        if immediate is not None:
            request.imm_data = socket.htonl(immediate)
        self._post(request)

    def _post(self, request: Any) -> None:
        try:
            self._pair.post_send(request)
        except self._error as error:
            raise VerbsError("a send can't be posted", _number(error)) from error

    def fail(self) -> None:
        if self._closed:
            return
        attributes = self._modules["qp"].QPAttr()
        attributes.qp_state = _ERROR
        try:
            self._pair.modify(attributes, _STATE_MASK)
        except self._error:
            pass  # the device is gone; closing goes on

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._requests.close()
            try:
                self._pair.close()
            except self._error as error:
                raise VerbsError("a queue pair can't be closed", _number(error)) from error


_RTR_MASK: Final = 1 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20
_RTS_MASK: Final = 1 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16


class _Requests:
    """The work requests of one queue pair: one for sends and one for receives each size, changed
    for each use, as posting copies them."""

    def __init__(self, module: Any) -> None:
        self._module = module
        # A destructor that has two underscores too few never runs: then what is made has to be
        # closed, once, and may be kept and changed. Otherwise it has to be made anew each time.
        self._kept = hasattr(module.SGE, "__dealloc")
        if self._kept:
            self._entry = module.SGE(0, 0, 0)
            self._send = module.SendWR(opcode=_OP_SEND, num_sge=1, sg=[self._entry])
            self._send.close()  # its own list, which it copied; from here on the entry is the list
            self._send.sg_list = self._entry
        self._receives: dict[tuple[int, int, int], Any] = {}
        self._closed = False

    def send(
        self, work: int, operation: int, flags: int, address: int, size: int, lkey: int
    ) -> Any:
        if not self._kept:
            entry = self._module.SGE(address, size, lkey)
            return self._module.SendWR(
                wr_id=work, opcode=operation, num_sge=1, sg=[entry], send_flags=flags
            )
        entry, request = self._entry, self._send
        entry.addr, entry.length, entry.lkey = address, size, lkey
        request.wr_id, request.opcode, request.send_flags = work, operation, flags
        return request

    def receive(self, work: int, address: int, size: int, lkey: int) -> Any:
        key = address, size, lkey
        request = self._receives.get(key)
        if request is None:
            entry = self._module.SGE(address, size, lkey)
            request = self._module.RecvWR(wr_id=work, num_sge=1, sg=[entry])
            if self._kept:
                entry.close()  # it was copied
            self._receives[key] = request
        request.wr_id = work
        return request

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._kept:
            for request in self._receives.values():
                request.close()
            self._entry.close()
        self._receives.clear()


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == _EVENTS:
                found.add(int(name))
        except OSError:
            pass  # it was the listing's own, or another thread's
    return found


def _number(error: Exception, otherwise: int = 0) -> int:
    """The error number, which pyverbs gives as an attribute or only in its text."""
    number = getattr(error, "error_code", -1)
    if isinstance(number, int) and number > 0:
        return number
    _, _, text = str(error).partition("Errno: ")
    digits = text.partition(",")[0].strip()
    return int(digits) if digits.isdigit() else otherwise


def _called(value: Any) -> Any:
    return value() if callable(value) else value


def _raw(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _text(raw: bytes) -> str:
    return ":".join(raw[at : at + 2].hex() for at in range(0, 16, 2))
