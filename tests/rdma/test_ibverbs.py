"""The second verbs library: the same suite, and what a provider must not get wrong."""

from __future__ import annotations

import errno
import os

import pytest

from gpuremote.testing.conformance import Pair
from gpuremote.testing.driving import Ends, place, random_parts
from gpuremote.transport.base import Region
from gpuremote.transport.verbs.base import Access, VerbsError, VerbsProvider
from gpuremote.transport.verbs.ibverbs_provider import IbverbsProvider
from gpuremote.transport.verbs.pyverbs_provider import PyverbsProvider
from tests.rdma.devices import in_machine
from tests.rdma.ends import connected
from tests.rdma.test_conformance import OverVerbs


class TestIbverbs(OverVerbs):
    def connection_pair(self) -> Pair:
        return connected(blocking=False, provider=IbverbsProvider())


@pytest.mark.parametrize("blocking", [False, True])
def test_the_other_end_has_pyverbs(blocking: bool) -> None:
    """Only what crosses the wire has to fit."""
    here, there = connected(blocking=blocking, provider=PyverbsProvider(), other=IbverbsProvider())
    try:
        ends = Ends(here, there, limit=120)
        parts = random_parts([20, 3 << 20])
        for sender, receiver in ((here, there), (there, here)):
            assert sender.describe()["reason"] != receiver.describe()["reason"]
            sender.send(b"some of it", [Region(part) for part in parts])
            incoming = ends.receive(receiver)
            assert bytes(incoming.header) == b"some of it"
            assert place(ends, incoming) == parts
    finally:
        here.abort()
        there.abort()


PROVIDERS = pytest.mark.parametrize("library", [PyverbsProvider, IbverbsProvider])


def test_both_find_the_same() -> None:
    found = []
    for provider in (PyverbsProvider(), IbverbsProvider()):
        for name in provider.devices():
            device = provider.open(name)
            port = device.port(1)
            found.append((name, port, device.gids(port)))
            device.close()
    half = len(found) // 2
    assert half
    assert found[:half] == found[half:]


@pytest.mark.short
@PROVIDERS
@pytest.mark.skipif(not in_machine(), reason="about a card that takes no dma-bufs: software RoCE")
def test_a_card_without_dmabufs(library: type[PyverbsProvider] | type[IbverbsProvider]) -> None:
    provider: VerbsProvider = library()
    device = provider.open(provider.devices()[0])
    descriptor = os.memfd_create("no dma-buf")
    try:
        os.ftruncate(descriptor, 8192)
        with pytest.raises(VerbsError) as raised:
            device.register_dmabuf(descriptor, 0, 8192, 1 << 40, Access.WRITE_HERE)
        assert raised.value.errno == errno.EOPNOTSUPP
    finally:
        os.close(descriptor)
        device.close()
