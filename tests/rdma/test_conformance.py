"""The conformance suite over real verbs."""

from __future__ import annotations

import pytest

from gpuremote.testing.conformance import Pair, TransportConformance
from tests.rdma.ends import connected


class OverVerbs(TransportConformance):
    limit = 150.0  # in an emulated machine
    bulk = 12 << 20  # more than the pieces that are asked for ahead hold


class TestBlocking(OverVerbs):
    def connection_pair(self) -> Pair:
        return connected(blocking=True)


@pytest.mark.short
class TestNonBlocking(OverVerbs):
    def connection_pair(self) -> Pair:
        return connected(blocking=False)
