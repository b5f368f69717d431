"""The conformance suite over RDMA connections whose verbs stay within the process."""

from __future__ import annotations

from gpuremote.testing.conformance import Pair, TransportConformance
from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport.rdma import Options
from tests.rdma.ends import LOOPBACK, connected


class TestBlocking(TransportConformance):
    def connection_pair(self) -> Pair:
        return connected(blocking=True, over=LOOPBACK, provider=FakeVerbs())


class TestNonBlocking(TransportConformance):
    def connection_pair(self) -> Pair:
        return connected(blocking=False, over=LOOPBACK, provider=FakeVerbs())


class TestTwoCards(TransportConformance):
    overtaking = 8 << 20  # two pieces for each lane

    def connection_pair(self) -> Pair:
        options = Options(lanes=4, rails=2, piece=1 << 20)
        provider = FakeVerbs(("one", "two"))
        return connected(blocking=True, over=LOOPBACK, provider=provider, options=options)
