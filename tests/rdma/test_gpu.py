"""What a GPU's memory comes to over real verbs; a double of the CUDA driver says that ordinary
memory is one's."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from gpuremote.memory.device import DeviceMemory, DeviceTarget
from gpuremote.memory.staging import tidy
from gpuremote.testing.driving import Ends
from gpuremote.testing.fake_cuda import FakeCuda
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.rdma import Options, RdmaConnection
from gpuremote.transport.rdma.gpu import PEERMEM, STAGING
from tests.rdma.ends import connected

MIB = 1 << 20
SIZE = 40 * MIB + 4

Pair = tuple[RdmaConnection, RdmaConnection]


@pytest.fixture
def pair() -> Iterator[Pair]:
    here, there = connected(blocking=False, options=Options(piece=8 * MIB))
    yield here, there
    here.abort()
    there.abort()
    tidy()


class Owner:
    """Whoever holds device memory."""


def no_host_memory(size: int) -> memoryview:
    raise AssertionError(f"{size} bytes of host memory were asked for")


@pytest.mark.short
@pytest.mark.parametrize("pooled", [False, True], ids=[PEERMEM, STAGING])
def test_a_payload_between_two_gpus(pair: Pair, pooled: bool) -> None:
    here, there = pair
    ends = Ends(here, there, limit=120)
    cuda = FakeCuda()
    source, place = (
        DeviceMemory(cuda, cuda.allocate(SIZE + 512, pooled=pooled) + 512, SIZE, 0, Owner())
        for _ in range(2)
    )
    data = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
    ctypes.memmove(source.pointer, data.ctypes.data, SIZE)
    done: list[Incoming] = []
    here.send(b"", [Region(source)])
    ends.receive(there).into([DeviceTarget(place, no_host_memory)], done.append)
    ends.until(lambda: done)
    assert zlib.crc32(ctypes.string_at(place.pointer, SIZE)) == zlib.crc32(data.data)
    for end in pair:
        ways = end.describe()["gpu_memory"]
        assert isinstance(ways, dict)
        # Software RoCE takes no dma-bufs.
        assert str(ways["here"]).startswith(f"{STAGING if pooled else PEERMEM} (dma-buf: ")
        assert end.stats.payload_copied == 0
    assert bool(cuda.called("copy_out", "copy_in")) == pooled
    for end in pair:
        end.abort()
    tidy()
    assert (cuda.pinned, cuda.streams, cuda.events) == ({}, set(), set())
