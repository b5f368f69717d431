"""These tests need RDMA devices. ``make test-rdma`` gives them a machine that has software RoCE;
where ``/dev/infiniband`` has a device they run with all others."""

from __future__ import annotations

import pytest

from tests.rdma.devices import why_not

collect_ignore_glob = ["test_*.py"] if why_not() else []


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """The verbs library is loaded once: some of what it opens stays open."""
    from gpuremote.transport.rdma import default_provider

    default_provider().devices()
