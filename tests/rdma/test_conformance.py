"""The conformance suite over real verbs."""

from __future__ import annotations

from gpuremote.testing.conformance import Pair, TransportConformance
from tests.rdma.ends import connected


class TestBlocking(TransportConformance):
    limit = 120.0

    def connection_pair(self) -> Pair:
        return connected(blocking=True)


class TestNonBlocking(TransportConformance):
    limit = 120.0

    def connection_pair(self) -> Pair:
        return connected(blocking=False)
