"""A GPU's memory that stays registered with a card, with a double of the CUDA driver."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator

import pytest

from gpuremote.memory.device import DeviceMemory
from gpuremote.testing.fake_cuda import FakeCuda
from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport.rdma.gpu import DMA_BUF, KNOWN, PEERMEM, Direct
from gpuremote.transport.rdma.memory import Registry
from gpuremote.transport.verbs.base import Access

MIB = 1 << 20
READ, WRITE = Access.READ_HERE, Access.WRITE_HERE | Access.WRITE_THERE


class Owner:
    """Whoever holds device memory."""


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def verbs(cuda: FakeCuda) -> FakeVerbs:
    return FakeVerbs(cuda=cuda)


@pytest.fixture
def registry(verbs: FakeVerbs) -> Iterator[Registry]:
    found = Registry(verbs.open("fake0"), limit=8 * MIB)
    yield found
    found.close()
    assert verbs.registered == 0


def test_arrays_of_one_allocation_are_registered_once(registry: Registry, cuda: FakeCuda) -> None:
    base = cuda.allocate(MIB)
    for offset in (0, 100, 70_000):
        memory = DeviceMemory(cuda, base + offset, 1000, 0, Owner())
        held = registry.acquire_device(memory, 10, 100, READ)
        assert held is not None
        assert held.at(base + offset + 10) == base + offset + 10
        held.release()
    assert (registry.made, registry.reused, registry.kept) == (1, 2, MIB)


def test_a_device_address_that_is_used_again(
    registry: Registry, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    """The driver's number for an allocation tells, where the address does not."""
    base = cuda.allocate(MIB)
    memory = DeviceMemory(cuda, base, MIB, 0, Owner())
    first = registry.acquire_device(memory, 0, MIB, READ)
    assert first is not None
    first.release()
    _, owner = cuda._allocations[base]
    cuda.free(base)
    cuda.adopt(base, MIB, owner)
    second = registry.acquire_device(memory, 0, MIB, READ)
    assert second is not None
    assert second is not first
    assert second.lkey != first.lkey
    # What is gone is let go of: what is registered keeps a GPU's memory.
    assert verbs.registered == registry.kept == MIB
    second.release()


def test_a_device_address_that_is_used_again_while_the_old_one_is_sent(
    registry: Registry, cuda: FakeCuda
) -> None:
    base = cuda.allocate(MIB)
    memory = DeviceMemory(cuda, base, MIB, 0, Owner())
    first = registry.acquire_device(memory, 0, MIB, READ)
    _, owner = cuda._allocations[base]
    cuda.free(base)
    cuda.adopt(base, MIB, owner)
    second = registry.acquire_device(memory, 0, MIB, READ)
    assert first is not None
    assert second is not None
    assert second is not first
    first.release()
    second.release()


def test_an_allocation_that_is_gone_is_let_go_of(
    registry: Registry, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    base, other = cuda.allocate(MIB), cuda.allocate(4096)
    held = registry.acquire_device(DeviceMemory(cuda, base, MIB, 0, Owner()), 0, MIB, READ)
    assert held is not None
    # Not while it is in use.
    cuda.free(base)
    little = DeviceMemory(cuda, other, 4096, 0, Owner())
    for expected in (MIB + 4096, 4096):
        found = registry.acquire_device(little, 0, 4096, READ)
        assert found is not None
        found.release()
        assert verbs.registered == expected
        if held.users:
            held.release()


def test_nothing_of_a_device_goes_while_it_is_in_use(
    registry: Registry, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    """More than may be kept (8 MiB): those in use stay, and go when they are not."""
    sources = [DeviceMemory(cuda, cuda.allocate(4 * MIB), 4 * MIB, 0, Owner()) for _ in range(4)]
    held = [registry.acquire_device(source, 0, MIB, READ) for source in sources]
    assert registry.kept == 16 * MIB == verbs.registered
    for entry in held:
        assert entry is not None
        assert entry.lkey in verbs.memory
        entry.release()
    assert registry.kept == 8 * MIB == verbs.registered


def test_what_is_written_to_is_registered_as_just_that(
    registry: Registry, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    base = cuda.allocate(MIB)
    owner: Owner | None = Owner()
    memory: DeviceMemory | None = DeviceMemory(cuda, base + 4096, 8192, 0, owner)
    assert memory is not None
    first = registry.acquire_device(memory, 0, 8192, WRITE)
    second = registry.acquire_device(memory, 0, 8192, WRITE)
    assert first is not None
    assert second is not None
    # Taking one back must not break the other.
    assert first.rkey != second.rkey
    assert verbs.registered == 2 * 8192
    registry.revoke(first)
    assert second.rkey in verbs.memory
    second.release()
    assert verbs.registered == 0
    # It stays registered while its owner lives, and not a moment longer.
    third = registry.acquire_device(memory, 0, 8192, WRITE)
    assert third is not None
    third.release()
    assert registry.acquire_device(memory, 0, 8192, WRITE) is third
    third.release()
    assert verbs.registered == 8192
    memory = owner = None
    gc.collect()
    assert verbs.registered == 0
    assert third.rkey not in verbs.memory


def test_an_owner_that_can_not_be_watched(
    registry: Registry, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    memory = DeviceMemory(cuda, cuda.allocate(4096), 4096, 0, (1, 2))
    held = registry.acquire_device(memory, 0, 4096, WRITE)
    assert held is not None
    held.release()
    assert verbs.registered == registry.kept == 0


def test_an_array_in_several_allocations(registry: Registry, cuda: FakeCuda) -> None:
    base = cuda.allocate(8192)
    held = registry.acquire_device(DeviceMemory(cuda, base, 3 * 8192, 0, Owner()), 0, 10_000, READ)
    assert held is None
    assert "several allocations" in registry.direct.describe()
    assert not cuda.exported


def test_what_can_not_be_registered_is_remembered_within_bounds(
    cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    verbs.dmabuf = errno.EINVAL
    registry = Registry(verbs.open("fake0"))
    source = DeviceMemory(cuda, cuda.allocate(4096), 4096, 0, Owner())
    for _ in range(3):
        assert registry.acquire_device(source, 0, 4096, READ) is None
    assert len(cuda.called("export_dmabuf")) == 1
    for _ in range(KNOWN + 10):
        one = DeviceMemory(cuda, cuda.allocate(4096), 4096, 0, Owner())
        assert registry.acquire_device(one, 0, 4096, READ) is None
    assert len(registry.direct._refused) == KNOWN
    registry.close()


def test_a_way_that_fails_says_so(cuda: FakeCuda, verbs: FakeVerbs) -> None:
    direct = Direct(verbs.open("fake0"))
    cuda.fail("export_dmabuf")
    cuda.fail("synchronous_copies")  # which some memory does not take: no reason to give up
    memory = DeviceMemory(cuda, cuda.allocate(4096), 4096, 0, Owner())
    verbs.peermem = True
    found = direct.register(memory, memory.allocation(), memory.pointer, 4096, READ)
    assert found is not None
    assert direct.describe() == f"{PEERMEM} ({DMA_BUF}: export_dmabuf: CUDA_ERROR_UNKNOWN)"
    found[0].close()
