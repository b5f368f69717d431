"""Fixtures for pytest: ``pytest_plugins = ["gpuremote.testing.fixtures"]`` in a ``conftest.py``.

``gpuremote_server``
    A real device server (NumPy) for the whole test run: a :class:`RunningServer` with ``url``.
``gpuremote_network``
    A way to it that breaks where the test says: a :class:`CuttingProxy` with ``url``.
``gpuremote_session``
    A blocking session on the server, closed when the test ends; what failed in it and was not
    waited for fails the test.

The options of ``gpuremote serve`` come from the ini option ``gpuremote_server_options``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest

from gpuremote.client.blocking import Session
from gpuremote.client.connect import connect_sync
from gpuremote.testing.cutting import CuttingProxy
from gpuremote.testing.servers import RunningServer, device_server

__all__ = ["gpuremote_network", "gpuremote_server", "gpuremote_session"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "gpuremote_server_options",
        "options of `gpuremote serve` for the fixture gpuremote_server",
        default="",
    )


@pytest.fixture(scope="session")
def gpuremote_server(pytestconfig: pytest.Config) -> Iterator[RunningServer]:
    """A device server, as a child process on a free port of loopback."""
    options = shlex.split(str(pytestconfig.getini("gpuremote_server_options")))
    with device_server(*options) as server:
        yield server


@pytest.fixture
def gpuremote_network(gpuremote_server: RunningServer) -> Iterator[CuttingProxy]:
    """A network between the test and the server, at its ``url``."""
    with CuttingProxy(gpuremote_server.host, gpuremote_server.port) as network:
        yield network


@pytest.fixture
def gpuremote_session(gpuremote_server: RunningServer) -> Iterator[Session]:
    """A blocking session on ``gpuremote_server``."""
    with connect_sync(gpuremote_server.url) as session:
        yield session
