"""What holds for every test: the event loop it runs on, what it may leave behind, and that
gpuremote blocks no event loop."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Final

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from gpuremote.rpc import dial
from gpuremote.testing.servers import RunningServer, device_server
from tests.leaks import Snapshot, mark_descendants, settled_leaks
from tests.rdma.devices import why_not

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

LOOP_VARIABLE: Final = "GPUREMOTE_TEST_LOOP"

_FAILED: Final = pytest.StashKey[bool]()
LOOP: Final = pytest.StashKey[tuple[str, LoopFactory]]()


def _choose_loop() -> tuple[str, LoopFactory]:
    wanted = os.environ.get(LOOP_VARIABLE, "uvloop")
    if wanted == "asyncio":
        return "asyncio", asyncio.new_event_loop
    if wanted != "uvloop":
        raise pytest.UsageError(f"{LOOP_VARIABLE}={wanted!r}: known are uvloop and asyncio")
    try:
        uvloop = importlib.import_module("uvloop")
    except ImportError:
        if LOOP_VARIABLE in os.environ:
            raise pytest.UsageError(f"{LOOP_VARIABLE}=uvloop, and uvloop is missing") from None
        return "asyncio (uvloop is missing)", asyncio.new_event_loop
    # The first loop makes a pipe for signals that libuv keeps as long as the process lives.
    uvloop.new_event_loop().close()
    return f"uvloop {uvloop.__version__}", uvloop.new_event_loop


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LOOP] = _choose_loop()
    mark_descendants()
    # No deadline per example: this runs on busy machines. The same examples every time on CI.
    hypothesis.settings.register_profile(
        "gpuremote", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True
    )
    hypothesis.settings.load_profile("gpuremote")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there before the first test stays: each search for garbage would go through it."""
    gc.collect()
    gc.freeze()


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"event loop: {config.stash[LOOP][0]}"]
    if reason := why_not():
        lines.append(f"tests/rdma: not collected, {reason}")
    return lines


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    name, factory = config.stash[LOOP]
    return {name.split()[0]: factory}


@pytest.fixture(scope="session")
def loop_factory(pytestconfig: pytest.Config) -> LoopFactory:
    """Makes the event loops of this run, for tests that run one themselves."""
    return pytestconfig.stash[LOOP][1]


@pytest.fixture(scope="session")
def numpy_server() -> Iterator[RunningServer]:
    """For the files that need nothing else of a server. What shares it are processes of their own:
    the sessions."""
    with device_server("--warm", "2", "--devices", "2") as running:
        yield running


@pytest.fixture(scope="session")
def torch_server() -> Iterator[RunningServer]:
    """The same with PyTorch, which takes seconds to load."""
    with device_server("--backend", "torch") as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def no_blocked_loop() -> Iterator[None]:
    """Fail what blocks a running event loop from inside gpuremote (``BlockingError``).

    Blocking system calls on files and on sockets in blocking mode, ``time.sleep``, waits for
    locks that are held. Sockets in non-blocking mode pass.
    """
    with blockbuster_ctx(scanned_modules=["gpuremote"]):
        yield


@pytest.fixture(scope="session", autouse=True)
def ways_are_short() -> Iterator[None]:
    """However long an answer takes on a busy machine: on long ways other bytes are sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "LONG_WAY", 60.0)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves descriptors, processes, threads or shared memory behind."""
    before = Snapshot.take()
    yield
    if request.node.stash.get(_FAILED, False):
        return  # its traceback keeps things alive, and it has its own failure to report
    if lines := settled_leaks(before):
        pytest.fail("left behind:\n  " + "\n  ".join(lines), pytrace=False)
