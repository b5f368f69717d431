"""A device server, a proxy in front of it, and the two drivers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import pytest

from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import AsyncSide, BlockingSide, Side


@pytest.fixture(scope="module")
def server(numpy_server: RunningServer) -> RunningServer:
    return numpy_server


@pytest.fixture(scope="module", autouse=True)
def tcp() -> Iterator[None]:
    """What the proxy cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUREMOTE_TRANSPORT", "tcp")
        yield


# The half of the suite on asyncio leaves the blocking driver to the other one.
ONE_HALF = os.environ.get("GPUREMOTE_TEST_LOOP") == "asyncio"
DRIVERS = ["asyncio"] if ONE_HALF else ["asyncio", "blocking"]


@pytest.fixture(params=DRIVERS)
def side(
    request: pytest.FixtureRequest, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> Iterator[Side]:
    made: Side = AsyncSide(loop_factory) if request.param == "asyncio" else BlockingSide()
    yield made
    made.close()


@pytest.fixture
def proxy(server: RunningServer) -> Iterator[CuttingProxy]:
    with CuttingProxy(server.host, server.port) as cutting:
        yield cutting
