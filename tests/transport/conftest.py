"""What several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuremote.transport.tcp import TcpConnection, pair


@pytest.fixture(params=[True, False], ids=["blocking", "non-blocking"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[TcpConnection, TcpConnection]]:
    """Two connections that are connected to each other."""
    here, there = pair(request.param)
    yield here, there
    here.abort()
    there.abort()
