"""A device server, and for the tests of a file a session of each kind for those that share it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpuremote.testing.servers import RunningServer
from tests.conftest import LOOP
from tests.faults.sides import AsyncSide, BlockingSide, Side


@pytest.fixture(scope="module")
def server(numpy_server: RunningServer) -> RunningServer:
    return numpy_server


@pytest.fixture(scope="module", autouse=True)
def transport(pytestconfig: pytest.Config) -> Iterator[None]:
    """Each half of the test run has one: that on asyncio, without the part in C, has tcp."""
    with pytest.MonkeyPatch.context() as patch:
        uvloop = pytestconfig.stash[LOOP][0].startswith("uvloop")
        patch.setenv("GPUREMOTE_TRANSPORT", "shm" if uvloop else "tcp")
        yield


@pytest.fixture(scope="module", params=["asyncio", "blocking"])
def side(
    request: pytest.FixtureRequest, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> Iterator[Side]:
    made: Side = BlockingSide()
    if request.param == "asyncio":
        made = looping = AsyncSide(loop_factory)
        # One thread for all that blocks, and now, or a test would leave a second one behind.
        looping.loop.set_default_executor(ThreadPoolExecutor(1))
        looping.loop.run_until_complete(looping.loop.run_in_executor(None, int))
    yield made
    made.close()


@pytest.fixture(scope="module")
def session(side: Side, server: RunningServer) -> Iterator[Any]:
    """Shared by the tests of a file, so each of them takes the failures that it causes."""
    opened = side.do(side.connect(server.url))
    try:
        yield opened
    finally:
        side.do(opened.close())


@pytest.fixture
def device(session: Any) -> Any:
    return session.devices[0]


@pytest.fixture
def fresh(side: Side, server: RunningServer) -> Iterator[Any]:
    """A session of one test's own; what fails in it need not be taken."""
    with side.session(server.url) as opened:
        yield opened
