"""One server for all tests of the commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuremote.testing.servers import RunningServer, device_server


@pytest.fixture(scope="package")
def server() -> Iterator[RunningServer]:
    with device_server("--devices", "2", "--memory-limit", "1GiB") as running:
        yield running
