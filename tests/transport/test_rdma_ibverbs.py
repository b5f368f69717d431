"""The particulars of the package ``ibverbs``, with one that is made for the occasion. What it does
with a card is in ``tests/rdma``."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuremote.transport.verbs import ibverbs_provider
from gpuremote.transport.verbs.base import Access, Completion, Gid, GidKind, Remote, VerbsError
from gpuremote.transport.verbs.ibverbs_provider import IbverbsDevice, IbverbsProvider

RAW = bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 1))


class Refused(OSError):
    """The package's error."""


def refuse(number: int) -> Any:
    def method(*_: Any, **__: Any) -> Any:
        raise Refused(number, os.strerror(number))

    return method


class Channel:
    """A completion channel; its events are bytes in a pipe that must not block."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        self.closed = False

    def happen(self) -> None:
        os.write(self._write, b"!")

    def get_cq_event(self) -> None:
        os.read(self.fd, 1)

    def close(self) -> None:
        self.closed = True
        os.close(self.fd)
        os.close(self._write)


class Queue:
    def __init__(self) -> None:
        self.found: list[Any] = []
        self.acknowledged: list[int] = []
        self.armed = 0

    def poll(self, count: int) -> list[Any]:
        found, self.found = self.found[:count], self.found[count:]
        return found

    def ack_events(self, count: int) -> None:
        self.acknowledged.append(count)

    def req_notify(self) -> None:
        self.armed += 1

    def close(self) -> None: ...


class Pair:
    qp_num = 21

    def __init__(self) -> None:
        self.changes: list[tuple[int, dict[str, Any]]] = []
        self.posted: list[Any] = []
        self.closed = 0

    def modify(self, mask: int, **attributes: Any) -> None:
        self.changes.append((mask, attributes))

    def post_send(self, request: Any) -> None:
        self.posted.append(request)

    post_recv = post_send

    def close(self) -> None:
        self.closed += 1


class Package:
    """The module."""

    __version__ = "1"
    VerbsError = Refused

    def __init__(self) -> None:
        self.inline = True
        self.live = 0
        self.channel = Channel()
        self.queue = Queue()
        self.pair = Pair()
        self.port = SimpleNamespace(
            state=4, active_mtu=5, max_msg_sz=1 << 30, lid=7, link_layer=2, gid_tbl_len=3
        )
        self.gids = [RAW, bytes(16)]
        self.domain = SimpleNamespace(
            reg_mr=lambda *a: self.memory("reg_mr", *a),
            reg_dmabuf_mr=lambda *a: self.memory("reg_dmabuf_mr", *a),
            create_qp=self.create_qp,
            close=self.close_domain,
        )
        self.context = SimpleNamespace(
            alloc_pd=lambda: self.domain,
            query_port=lambda number: self.port,
            query_gid=self.gid,
            create_comp_channel=lambda: self.channel,
            create_cq=lambda depth, channel: self.queue,
            close=lambda: None,
        )
        self.registered: list[tuple[Any, ...]] = []

    def get_device_list(self) -> list[Any]:
        return [SimpleNamespace(name="card0", open=lambda: self.context)]

    def gid(self, port: int, index: int) -> bytes:
        if index >= len(self.gids):
            raise Refused(errno.ENODATA, "no such entry")
        return self.gids[index]

    def memory(self, *what: Any) -> Any:
        self.registered.append(what)
        self.live += 1
        return SimpleNamespace(lkey=1, rkey=2, close=self.unregister)

    def unregister(self) -> None:
        self.live -= 1

    def close_domain(self) -> None:
        assert not self.live, "EBUSY"

    def create_qp(self, wanted: dict[str, Any]) -> Pair:
        if wanted.get("max_inline_data") and not self.inline:
            raise Refused(errno.EINVAL, "no inline data")
        return self.pair

    def QPInitAttr(self, *queues: Any, **wanted: Any) -> dict[str, Any]:
        return wanted

    @staticmethod
    def AHAttr(**fields: Any) -> dict[str, Any]:
        return fields

    @staticmethod
    def SGE(*fields: Any) -> tuple[Any, ...]:
        return fields

    SendWR = RecvWR = SGE


@pytest.fixture
def package() -> Iterator[Package]:
    made = Package()
    yield made
    if not made.channel.closed:
        made.channel.close()


@pytest.fixture
def device(package: Package) -> IbverbsDevice:
    return IbverbsDevice(package, "card0")


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel says what the addresses of port 1 are."""
    monkeypatch.setattr(ibverbs_provider, "_SYSTEM", tmp_path)
    found = tmp_path / "card0/ports/1/gid_attrs/types"
    found.mkdir(parents=True)
    return found


def test_a_port_and_its_addresses(package: Package, device: IbverbsDevice, kinds: Path) -> None:
    (kinds / "0").write_text("RoCE v2\n")
    (kinds / "1").write_text("IB/RoCE v1\n")
    port = device.port(1)
    assert (port.active, port.mtu, port.max_message, port.lid) == (True, 4096, 1 << 30, 7)
    # The third one can't be queried, which ends the list.
    expected = [Gid(0, RAW, GidKind.ROCE_V2), Gid(1, bytes(16), GidKind.ROCE_V1)]
    assert device.gids(port) == expected
    # Nor does one of which the kernel says nothing.
    (kinds / "1").unlink()
    assert device.gids(port) == expected[:1]
    package.port.link_layer = 1
    port = device.port(1)
    assert port.infiniband
    assert {gid.kind for gid in device.gids(port)} == {GidKind.INFINIBAND}
    package.port.state = 1
    assert (device.port(1).active, device.port(1).state) == (False, "down")


def test_a_dmabuf_keeps_the_program_s_address(package: Package, device: IbverbsDevice) -> None:
    memory, first = device.register_dmabuf(9, 512, 8192, 0x7F00_0000_0200, Access.WRITE_HERE)
    assert (memory.lkey, memory.rkey, first) == (1, 2, 0x7F00_0000_0200)
    assert package.registered == [("reg_dmabuf_mr", 512, 8192, 0x7F00_0000_0200, 9, 1)]


def test_what_is_registered_ends_with_its_device(package: Package, device: IbverbsDevice) -> None:
    """As with pyverbs; memory that is still registered would keep the device open."""
    memory = [device.register(4096, 4096, Access.READ_HERE) for _ in range(3)]
    memory[0].close()
    assert package.live == 2
    device.close()
    assert package.live == 0
    memory[1].close()
    assert package.live == 0


def old(*_: Any) -> Any:
    raise RuntimeError("this libibverbs has no ibv_reg_dmabuf_mr")


@pytest.mark.parametrize("failing", [refuse(errno.EOPNOTSUPP), old])
def test_no_dmabufs(package: Package, device: IbverbsDevice, failing: Any) -> None:
    package.domain.reg_dmabuf_mr = failing
    with pytest.raises(VerbsError) as raised:
        device.register_dmabuf(9, 0, 4096, 4096, Access.READ_HERE)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_completions(package: Package, device: IbverbsDevice) -> None:
    queue = device.completion_queue(16)
    assert queue.fileno() == package.channel.fd
    fields = {"byte_len": 3, "qp_num": 4, "vendor_err": 5}
    package.queue.found = [
        SimpleNamespace(wr_id=1, status=0, imm_data=0x01020304, wc_flags=2, **fields),
        SimpleNamespace(wr_id=2, status=12, imm_data=9, wc_flags=0, **fields),
    ]
    assert queue.poll(8) == [
        Completion(1, 0, 3, 4, 5, 0x01020304),
        Completion(2, 12, 3, 4, 5, None),
    ]
    # Events are taken until there is none, which does not block, and acknowledged in batches.
    for _ in range(64):
        package.channel.happen()
    queue.arm()
    assert (package.queue.armed, package.queue.acknowledged) == (1, [64])
    package.channel.happen()
    queue.arm()
    assert package.queue.acknowledged == [64]
    queue.close()
    queue.close()
    assert package.queue.acknowledged == [64, 1]
    assert package.channel.closed


@pytest.mark.parametrize("inline", [True, False])
def test_a_queue_pair(package: Package, device: IbverbsDevice, inline: bool) -> None:
    package.inline = inline
    port = device.port(1)
    pair = device.queue_pair(device.completion_queue(16), 8, 4)
    assert (pair.number, pair.inline) == (21, 64 if inline else 0)
    pair.prepare(port)
    pair.connect(port, Gid(2, RAW, GidKind.ROCE_V2), 5, Remote(33, 6, RAW, 0, 1024))
    (_, initialised), (_, receiving), (_, sending) = package.pair.changes
    assert initialised["qp_access_flags"] == 3
    assert receiving["ah_attr"]["sgid_index"] == 2
    assert receiving["ah_attr"]["dgid"] == RAW
    assert (receiving["path_mtu"], receiving["rq_psn"], receiving["dest_qp_num"]) == (3, 6, 33)
    assert (sending["sq_psn"], sending["timeout"], sending["retry_cnt"]) == (5, 14, 7)
    pair.post_send(1, 4096, 64, 7, signaled=True)
    pair.post_write(2, 4096, 99, 7, 8192, 9, signaled=False, immediate=0x01020304)
    pair.post_receive(3, 4096, 64, 7)
    assert package.pair.posted == [
        (1, [(4096, 64, 7)], 2, 2 | (8 if inline else 0)),
        (2, [(4096, 99, 7)], 1, 0, 8192, 9, 0x01020304),
        (3, [(4096, 64, 7)]),
    ]
    pair.fail()
    pair.close()
    pair.close()
    pair.fail()
    assert package.pair.closed == 1
    assert package.pair.changes[3:] == [(1, {"qp_state": 6})]


def test_errors_keep_their_numbers(package: Package, device: IbverbsDevice) -> None:
    queue = device.completion_queue(16)
    pair = device.queue_pair(queue, 8, 4)
    port = device.port(1)
    for place, names in (
        (package.pair, ("post_send", "post_recv", "modify", "close")),
        (package.queue, ("poll", "req_notify", "close")),
        (package.context, ("query_port", "create_comp_channel", "close")),
        (package.domain, ("reg_mr", "create_qp")),
        (package, ("get_device_list",)),
    ):
        for name in names:
            setattr(place, name, refuse(errno.ENOMEM))
    steps: list[Callable[[], object]] = [
        lambda: device.port(1),
        lambda: device.register(4096, 4096, Access.READ_HERE),
        lambda: device.completion_queue(4),
        lambda: device.queue_pair(queue, 1, 1),
        device.close,
        lambda: queue.poll(1),
        queue.arm,
        lambda: pair.prepare(port),
        lambda: pair.post_send(1, 1, 1, 1, signaled=True),
        lambda: pair.post_receive(1, 1, 1, 1),
        pair.close,
        queue.close,
        lambda: IbverbsDevice(package, "card0"),
    ]
    for step in steps:
        with pytest.raises(VerbsError) as raised:
            step()
        assert raised.value.errno == errno.ENOMEM
    pair.fail()  # never raises


def test_a_device_that_is_not_there(package: Package) -> None:
    with pytest.raises(VerbsError) as raised:
        IbverbsDevice(package, "card1")
    assert raised.value.errno == errno.ENODEV


def test_the_provider(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ibverbs", package)
    called: list[str] = []
    library = SimpleNamespace(
        ibv_is_fork_initialized=lambda: 0, ibv_fork_init=lambda: called.append("fork")
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    provider = IbverbsProvider()
    assert (provider.name, provider.devices(), called) == ("ibverbs 1", ["card0"], ["fork"])
    assert provider.open("card0").name == "card0"
    library.ibv_is_fork_initialized = lambda: 2  # this kernel needs nothing
    IbverbsProvider()
    assert called == ["fork"]
    monkeypatch.setattr(package, "get_device_list", refuse(errno.ENOSYS))
    with pytest.raises(VerbsError, match="devices can't be listed"):
        provider.devices()


def test_no_libibverbs(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ibverbs", package)

    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ImportError, match="cannot open shared object"):
        IbverbsProvider()
