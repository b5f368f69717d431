"""The particulars of pyverbs, with one that is made for the occasion."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuremote.transport.verbs import pyverbs_provider
from gpuremote.transport.verbs.base import Access, Status, VerbsError
from gpuremote.transport.verbs.explain import explain_errno, explain_status
from gpuremote.transport.verbs.pyverbs_provider import (
    PyverbsCompletionQueue,
    PyverbsDevice,
    PyverbsProvider,
    import_pyverbs,
)

MODULES = ("addr", "cq", "device", "fork", "mr", "pd", "pyverbs_error", "qp", "wr")


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Nothing of pyverbs is imported, before and after."""

    def forget() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == "pyverbs"]
        return {name: sys.modules.pop(name) for name in names}

    before = forget()
    yield
    forget()
    sys.modules.update(before)


def package(folder: Path, **texts: str) -> None:
    (folder / "pyverbs").mkdir(parents=True)
    (folder / "pyverbs" / "__init__.py").write_text("import logging; logging.basicConfig(level=10)")
    texts.setdefault("pyverbs_error", "class PyverbsError(Exception):\n    error_code = -1\n")
    for name in MODULES:
        (folder / "pyverbs" / f"{name}.py").write_text(texts.get(name, ""))


def system_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """A folder of the system's that has a pyverbs for this Python."""
    package(folder, **texts)
    monkeypatch.setattr(pyverbs_provider, "_system_folders", lambda: [str(folder)])


def test_the_root_logger_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    system_folder(tmp_path, monkeypatch)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level, path = root.level, list(sys.path)
    found = import_pyverbs()
    assert sorted(found) == sorted(MODULES)
    assert found["qp"].__file__ == str(tmp_path / "pyverbs" / "qp.py")
    assert (root.handlers, root.level) == ([], level)
    assert sys.path == path


def test_the_system_is_searched_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    package(tmp_path / "own")
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    system_folder(tmp_path / "system", monkeypatch)
    assert import_pyverbs()["qp"].__file__ == str(tmp_path / "own" / "pyverbs" / "qp.py")


def test_only_what_was_built_for_this_python_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pyverbs_provider, "_FOLDERS", (str(tmp_path),))
    package(tmp_path)
    assert pyverbs_provider._system_folders() == []
    (tmp_path / "pyverbs" / "qp.cpython-27-x86_64-linux-gnu.so").touch()
    assert pyverbs_provider._system_folders() == []
    (tmp_path / "pyverbs" / f"qp{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert pyverbs_provider._system_folders() == [str(tmp_path)]


def test_pyverbs_is_absent(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setattr(pyverbs_provider, "_FOLDERS", ())
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    path = list(sys.path)
    with pytest.raises(ImportError):
        PyverbsProvider()
    assert sys.path == path


def test_importing_the_transport_imports_no_verbs() -> None:
    script = (
        "import logging, sys, gpuremote.transport.rdma; "
        "print('pyverbs' in sys.modules, logging.root.handlers)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout == b"False []\n"


def test_devices_that_can_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    system_folder(
        tmp_path,
        monkeypatch,
        fork="is_fork_initialized = lambda: 2",
        device=(
            "from pyverbs.pyverbs_error import PyverbsError\n"
            "def get_device_list():\n    raise PyverbsError('Failed to get devices list')\n"
        ),
    )
    with pytest.raises(VerbsError, match="ENOSYS"):
        PyverbsProvider().devices()


@pytest.mark.parametrize(("state", "calls"), [(0, 1), (1, 0), (2, 0)])
def test_registered_memory_and_forks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: None,
    state: int,
    calls: int,
) -> None:
    fork = (
        f"called = []\nis_fork_initialized = lambda: {state}\nfork_init = lambda: called.append(1)"
    )
    system_folder(tmp_path, monkeypatch, fork=fork)
    PyverbsProvider()
    assert len(importlib.import_module("pyverbs.fork").called) == calls


# -- work requests ---------------------------------------------------------------------------------


class Memory:
    """What pyverbs allocates: to be freed once."""

    alive: int = 0

    def __init__(self) -> None:
        Memory.alive += 1
        self.freed = False

    def free(self) -> None:
        assert not self.freed, "freed twice: the process would end here"
        self.freed = True
        Memory.alive -= 1


def requests(*, leaking: bool) -> Any:
    """The module ``wr``, up to version 64 or as it is with the destructors repaired."""

    class Entry:
        def __init__(self, addr: int, length: int, lkey: int) -> None:
            self.addr, self.length, self.lkey = addr, length, lkey
            self.memory = Memory()

        def close(self) -> None:
            self.memory.free()

    class Request:
        def __init__(self, num_sge: int = 0, sg: Any = None, **fields: Any) -> None:
            assert num_sge == len(sg) == 1
            self.__dict__.update(fields)
            self.own: Memory | None = Memory()
            self.entry = SimpleNamespace(
                **{k: getattr(sg[0], k) for k in ("addr", "length", "lkey")}
            )

        def close(self) -> None:
            assert self.own is not None
            self.own.free()

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "sg_list":
                assert self.own is None or self.own.freed, "its own list leaks"
                self.__dict__["entry"] = value
            else:
                self.__dict__[name] = value

    if leaking:
        setattr(Entry, "__dealloc", lambda self: None)
    return SimpleNamespace(SGE=Entry, SendWR=Request, RecvWR=Request)


@pytest.mark.parametrize("leaking", [True, False])
def test_work_requests_are_freed_once(monkeypatch: pytest.MonkeyPatch, leaking: bool) -> None:
    monkeypatch.setattr(Memory, "alive", 0)
    kept = pyverbs_provider._Requests(requests(leaking=leaking))
    seen = set()
    for number in range(50):
        request = kept.send(number, 2, 8, 1000 + number, 10 + number, 7)
        seen.add(id(request))
        assert (request.wr_id, request.opcode, request.send_flags) == (number, 2, 8)
        assert (request.entry.addr, request.entry.length) == (1000 + number, 10 + number)
        receive = kept.receive(number, 64 * (number % 4), 64, 9)
        assert (receive.wr_id, receive.entry.addr) == (number, 64 * (number % 4))
    if leaking:
        assert len(seen) == 1
        assert Memory.alive == 1 + 4
        kept.close()
        kept.close()
        assert Memory.alive == 0
    else:
        kept.close()  # the destructors do the rest


# -- the descriptor of a completion channel --------------------------------------------------------


class Channel:
    """One that does not say which descriptor it has, unless ``named``."""

    def __init__(self, context: Any) -> None:
        self.read, write = os.pipe()
        os.close(write)
        context.channels.append(self)
        if context.named:
            self.fd = self.read
        self.events = 0
        self.error = context.error

    def get_cq_event(self, queue: Any) -> None:
        if not self.events:
            raise self.error("EAGAIN")
        self.events -= 1

    def close(self) -> None:
        os.close(self.read)


class Queue:
    def __init__(self, context: Any, depth: int, *rest: Any) -> None:
        self.log: list[object] = []

    def ack_events(self, count: int) -> None:
        self.log.append(count)

    def req_notify(self) -> None:
        self.log.append("armed")

    def close(self) -> None:
        self.log.append("closed")


class Refused(Exception):
    error_code = -1


@pytest.fixture(params=[True, False], ids=["named", "not named"])
def queue(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PyverbsCompletionQueue]:
    context = SimpleNamespace(channels=[], named=request.param, error=Refused)

    def descriptors() -> set[int]:
        return {5000, *(channel.read for channel in context.channels)}

    monkeypatch.setattr(pyverbs_provider, "_event_descriptors", descriptors)
    modules = {
        "cq": SimpleNamespace(CompChannel=Channel, CQ=Queue),
        "pyverbs_error": SimpleNamespace(PyverbsError=Refused),
    }
    made = PyverbsCompletionQueue(modules, context, 10)
    yield made
    made.close()
    made.close()


def test_the_descriptor_is_found(queue: PyverbsCompletionQueue) -> None:
    channel = queue._channel
    assert queue.fileno() == channel.read
    assert not os.get_blocking(channel.read)


def test_events_are_acknowledged_in_batches(queue: PyverbsCompletionQueue) -> None:
    queue.arm()
    for _ in range(70):
        queue._channel.events = 1
        queue.arm()
    acknowledged = [entry for entry in queue.queue.log if isinstance(entry, int)]
    assert acknowledged == [64]
    queue.close()
    # Destroying a queue waits for events that were not acknowledged.
    assert queue.queue.log[-2:] == [6, "closed"]


def test_a_descriptor_that_can_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(channels=[], named=False, error=Refused)
    monkeypatch.setattr(pyverbs_provider, "_event_descriptors", set)
    modules = {
        "cq": SimpleNamespace(CompChannel=Channel, CQ=Queue),
        "pyverbs_error": SimpleNamespace(PyverbsError=Refused),
    }
    with pytest.raises(VerbsError, match="descriptor"):
        PyverbsCompletionQueue(modules, context, 10)


# -- what errors say -------------------------------------------------------------------------------


def test_error_numbers() -> None:
    error = Refused("Failed to register a MR. Errno: 12, Cannot allocate memory")
    assert pyverbs_provider._number(error) == errno.ENOMEM
    error.error_code = errno.EPERM
    assert pyverbs_provider._number(error) == errno.EPERM
    assert pyverbs_provider._number(Refused("nothing said"), errno.ENOSYS) == errno.ENOSYS


def test_errors_say_what_to_do() -> None:
    assert "ulimit -l" in explain_errno(VerbsError("8 bytes", errno.ENOMEM))
    assert "/dev/infiniband" in explain_errno(VerbsError("a device", errno.EACCES))
    assert explain_errno(VerbsError("odd")) == "odd"
    for status in Status:
        if status:
            assert explain_status(status).startswith(status.name)
            assert len(explain_status(status)) > len(status.name) + 10


# -- a GPU's memory --------------------------------------------------------------------------------


class Failure(Exception):
    error_code = errno.EOPNOTSUPP


def device_with(mr: Any) -> PyverbsDevice:
    """A device of a pyverbs with that module ``mr``."""
    modules = {
        "pyverbs_error": SimpleNamespace(PyverbsError=Failure),
        "device": SimpleNamespace(Context=lambda name: SimpleNamespace(name=name)),
        "pd": SimpleNamespace(PD=lambda context: ("domain of", context.name)),
        "mr": mr,
    }
    return PyverbsDevice(modules, "card0")


def test_a_dmabuf_counts_from_its_offset() -> None:
    made: list[tuple[Any, ...]] = []

    def region(domain: Any, length: int, access: int, dmabuf: int, offset: int) -> Any:
        made.append((domain, length, access, dmabuf, offset))
        return SimpleNamespace(lkey=3, rkey=4, close=lambda: made.append(("closed",)))

    device = device_with(SimpleNamespace(DmaBufMR=region))
    memory, first = device.register_dmabuf(9, 512, 8192, 0x7F00_0000_0200, Access.WRITE_HERE)
    # Whatever the program calls the first byte: the card calls it by the offset.
    assert (memory.lkey, memory.rkey, first) == (3, 4, 512)
    memory.close()
    assert made == [(("domain of", "card0"), 8192, 1, 9, 512), ("closed",)]


def test_a_card_or_a_pyverbs_without_dmabufs() -> None:
    def refused(*_: Any) -> Any:
        raise Failure

    for mr in SimpleNamespace(DmaBufMR=refused), SimpleNamespace():
        with pytest.raises(VerbsError) as raised:
            device_with(mr).register_dmabuf(9, 0, 4096, 4096, Access.READ_HERE)
        assert raised.value.errno == errno.EOPNOTSUPP
