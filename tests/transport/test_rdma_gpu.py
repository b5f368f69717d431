"""A GPU's memory over RDMA, with a double of the CUDA driver: registered by the card, or staged."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from collections.abc import Callable, Iterator

import pytest

from gpuremote.errors import ConnectionLost
from gpuremote.memory.device import DeviceMemory, DeviceTarget
from gpuremote.memory.staging import tidy
from gpuremote.testing.driving import Ends, random_parts
from gpuremote.testing.fake_cuda import FakeCuda
from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.rdma import Options, RdmaConnection
from gpuremote.transport.rdma.gpu import DMA_BUF, KNOWN, PEERMEM, STAGING, Direct
from gpuremote.transport.rdma.memory import Registry
from gpuremote.transport.verbs.base import Access
from tests.rdma.ends import LOOPBACK, connected

KIB, MIB = 1 << 10, 1 << 20
SLAB = 256 * KIB
READ, WRITE = Access.READ_HERE, Access.WRITE_HERE | Access.WRITE_THERE

Pair = tuple[RdmaConnection, RdmaConnection]


class Owner:
    """Whoever holds device memory."""


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def verbs(cuda: FakeCuda) -> FakeVerbs:
    return FakeVerbs(cuda=cuda)


@pytest.fixture
def pair(verbs: FakeVerbs, cuda: FakeCuda) -> Iterator[Pair]:
    here, there = connected(
        blocking=False, over=LOOPBACK, provider=verbs, options=Options(lanes=2, piece=MIB)
    )
    for end in here, there:
        for stages in end._stages:
            stages.size = SLAB
    verbs.written.clear()  # what the set-up tried
    yield here, there
    here.abort()
    there.abort()
    cuda.let_go()
    tidy()
    # Whatever happened: nothing of it is left.
    assert (verbs.open_devices, verbs.registered, verbs.pairs) == (0, 0, {})
    assert (cuda.pinned, cuda.streams, cuda.events) == ({}, set(), set())
    closed(cuda)


@pytest.fixture
def ends(pair: Pair) -> Ends:
    return Ends(*pair)


@pytest.fixture
def registry(verbs: FakeVerbs) -> Iterator[Registry]:
    found = Registry(verbs.open("fake0"), limit=8 * MIB)
    yield found
    found.close()
    assert verbs.registered == 0


def closed(cuda: FakeCuda) -> None:
    """Every descriptor that was exported is closed by now."""
    for descriptor in cuda.exported:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def device_memory(
    cuda: FakeCuda, data: bytes, *, offset: int = 0, pooled: bool = False
) -> DeviceMemory:
    """Device memory with these bytes, ``offset`` bytes behind the beginning of its allocation."""
    base = cuda.allocate(offset + len(data) + 512, pooled=pooled)
    ctypes.memmove(base + offset, data, len(data))
    return DeviceMemory(cuda, base + offset, len(data), 0, Owner())


def bytes_of(memory: DeviceMemory) -> bytes:
    return ctypes.string_at(memory.pointer, memory.nbytes)


def no_host_memory(size: int) -> memoryview:
    raise AssertionError(f"{size} bytes of host memory were asked for")


def target(memory: DeviceMemory, idle: Callable[[], bool] = lambda: True) -> DeviceTarget:
    return DeviceTarget(memory, no_host_memory, idle)


def described(end: RdmaConnection) -> str:
    """What ``explain()`` says."""
    found = end.describe()["gpu_memory"]
    assert isinstance(found, list)
    return str(found[0])


def move(pair: Pair, ends: Ends, source: object, into: DeviceTarget | memoryview) -> None:
    """Send one payload from here to there."""
    here, there = pair
    sent: list[bool] = []
    done: list[Incoming] = []
    here.send(b"", [Region(source)], lambda: sent.append(True))
    ends.receive(there).into([into], done.append)
    ends.until(lambda: done and sent)


# -- the way that is taken -------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [False, True], ids=["addresses", "offsets"])
@pytest.mark.parametrize("offset", [0, 512, 4096 + 77])
def test_a_slice_by_dmabuf(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs, offset: int, offsets: bool
) -> None:
    """Both sides' memory; wherever it lies in its pages and in its allocation."""
    verbs.offsets = offsets
    (data,) = random_parts([3 * MIB + 5])
    source = device_memory(cuda, data, offset=offset)
    place = device_memory(cuda, bytes(len(data)), offset=offset + 100)
    before = bytes(ctypes.string_at(place.pointer - 100, 100))
    move(pair, ends, source, target(place))
    assert bytes_of(place) == data
    assert ctypes.string_at(place.pointer - 100, 100) == before
    assert not cuda.called("copy_in", "copy_out", "allocate_host")
    closed(cuda)
    for end in pair:
        assert end.describe()["gpu_memory"] == [DMA_BUF]


def test_peermem_where_the_card_takes_no_dmabuf(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    verbs.dmabuf, verbs.peermem = errno.EOPNOTSUPP, True
    (data,) = random_parts([MIB])
    place = device_memory(cuda, bytes(MIB))
    move(pair, ends, device_memory(cuda, data), target(place))
    assert bytes_of(place) == data
    assert not cuda.called("copy_in", "copy_out")
    said = described(pair[0])
    assert said.startswith(f"{PEERMEM} ({DMA_BUF}: no dma-buf can be registered with fake0")
    # It is known by now, and not tried again.
    exports = len(cuda.called("export_dmabuf"))
    move(pair, ends, device_memory(cuda, data), target(place))
    assert len(cuda.called("export_dmabuf")) == exports
    closed(cuda)


def test_staging_where_neither_works(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    cuda.dmabuf = False
    (data,) = random_parts([2 * MIB + 3])
    place = device_memory(cuda, bytes(len(data)))
    move(pair, ends, device_memory(cuda, data), target(place))
    assert bytes_of(place) == data
    said = described(pair[0])
    assert said.startswith(STAGING)
    assert f"{DMA_BUF}: the driver exports none" in said
    assert f"{PEERMEM}: " in said
    assert "EFAULT" in said
    # A bounded amount of it, used again and again: two slabs for each direction.
    assert len(cuda.called("allocate_host")) == 4
    assert {call[1] for call in cuda.calls if call[0] == "allocate_host"} == {SLAB}
    assert len(cuda.called("copy_out")) == len(cuda.called("copy_in")) == 9
    assert pair[0].stats.payload_copied == pair[1].stats.payload_copied == 0


def test_nothing_was_asked_for_yet(pair: Pair) -> None:
    assert pair[0].describe()["gpu_memory"] == ["no GPU memory was moved yet"]


def test_memory_of_the_asynchronous_pool_is_staged(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    verbs.peermem = True
    (data,) = random_parts([MIB])
    place = device_memory(cuda, bytes(MIB), pooled=True)
    move(pair, ends, device_memory(cuda, data, pooled=True), target(place))
    assert bytes_of(place) == data
    assert not cuda.exported
    said = described(pair[1])
    assert "cudaMallocAsync" in said
    # That says nothing of other memory.
    move(pair, ends, device_memory(cuda, data), target(device_memory(cuda, bytes(MIB))))
    assert pair[1].describe()["gpu_memory"] == [DMA_BUF]


def test_between_a_gpu_and_host_memory(pair: Pair, ends: Ends, cuda: FakeCuda) -> None:
    (data,) = random_parts([MIB])
    landed = bytearray(MIB)
    move(pair, ends, device_memory(cuda, data), memoryview(landed))
    assert landed == data
    place = device_memory(cuda, bytes(MIB))
    move(pair, ends, data, target(place))
    assert bytes_of(place) == data


def test_several_regions_of_either_kind(pair: Pair, ends: Ends, cuda: FakeCuda) -> None:
    here, there = pair
    sizes = [300_000, 0, 70_000, 300_000]
    parts = random_parts(sizes)
    cuda.dmabuf = False
    here.send(
        b"",
        [
            Region(device_memory(cuda, parts[0])),
            Region(b""),
            Region(parts[2]),
            Region(device_memory(cuda, parts[3])),
        ],
    )
    places = [device_memory(cuda, bytes(300_000)) for _ in range(2)]
    landed = bytearray(70_000)
    done: list[Incoming] = []
    ends.receive(there).into(
        [target(places[0]), memoryview(bytearray(0)), memoryview(landed), target(places[1])],
        done.append,
    )
    ends.until(lambda: done)
    assert [bytes_of(place) for place in places] == [parts[0], parts[3]]
    assert landed == parts[2]


def test_memory_that_the_driver_does_not_know(pair: Pair, ends: Ends, cuda: FakeCuda) -> None:
    """What can't be told apart is staged, and fails there if it must."""
    (data,) = random_parts([MIB])
    source = device_memory(cuda, data)
    cuda.fail("allocation")
    place = bytearray(MIB)
    move(pair, ends, source, memoryview(place))
    assert place == data
    said = described(pair[0])
    assert "allocation: CUDA_ERROR_UNKNOWN" in said


# -- the order of things ---------------------------------------------------------------------------


def test_a_flush_before_what_arrived_is_told(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    here, there = pair
    place = device_memory(cuda, bytes(MIB))
    told: list[list[str]] = []
    here.send(b"", [Region(bytes(MIB))])
    ends.receive(there).into([target(place)], lambda _: told.append(cuda.called("flush_writes")))
    ends.until(lambda: told)
    assert told[0]
    # A device that needs none gets none.
    cuda.ordered = True
    count = len(cuda.called("flush_writes"))
    move(pair, ends, bytes(MIB), target(place))
    assert len(cuda.called("flush_writes")) == count


def test_a_device_that_can_not_be_flushed_is_not_written_to(
    pair: Pair, ends: Ends, cuda: FakeCuda
) -> None:
    cuda.flushes = False
    (data,) = random_parts([MIB])
    place = device_memory(cuda, bytes(MIB))
    move(pair, ends, device_memory(cuda, data), target(place))
    assert bytes_of(place) == data
    assert pair[0].describe()["gpu_memory"] == [DMA_BUF]
    said = described(pair[1])
    assert "can't be told to take in what a card has written" in said


def test_memory_that_kernels_still_use_is_written_in_their_order(
    pair: Pair, ends: Ends, cuda: FakeCuda
) -> None:
    (data,) = random_parts([MIB])
    place = device_memory(cuda, bytes(MIB))
    place.stream = 7
    move(pair, ends, data, target(place, idle=lambda: False))
    assert bytes_of(place) == data
    assert {call[2] for call in cuda.calls if call[0] == "copy_in"} == {7}


def test_the_next_copy_begins_before_the_last_one_was_sent(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    here, there = pair
    cuda.dmabuf = False
    cuda.holding = True
    (data,) = random_parts([4 * SLAB])
    landed = bytearray(len(data))
    done: list[Incoming] = []
    here.send(b"", [Region(device_memory(cuda, data))])
    ends.receive(there).into([memoryview(landed)], done.append)
    ends.until(lambda: len(cuda.called("copy_out")) == 2)
    for _ in range(20):
        ends.step()
    # Nothing is sent before it has been copied, and no more is copied than there are slabs.
    assert (verbs.written, len(cuda.called("copy_out"))) == ([], 2)
    assert here.due() == 0.001
    assert here.pending_output
    verbs.holding = True
    cuda.let_go(2)  # the first copy, and the event behind it
    ends.until(lambda: any(lane._posted for lane in here._out._lanes))
    for _ in range(20):
        ends.step()
    # The first piece is on the wire, the second one is being copied, and the third one waits.
    assert len(cuda.called("copy_out")) == 2
    verbs.let_go()
    ends.until(lambda: len(cuda.called("copy_out")) == 3)
    assert verbs.written == [SLAB]
    cuda.let_go()
    ends.until(lambda: done)
    assert landed == data
    assert here.due() != 0.001


def test_the_next_piece_arrives_while_the_last_one_is_copied(
    pair: Pair, ends: Ends, cuda: FakeCuda, verbs: FakeVerbs
) -> None:
    here, there = pair
    cuda.dmabuf = False
    cuda.holding = True
    (data,) = random_parts([4 * SLAB])
    place = device_memory(cuda, bytes(len(data)))
    done: list[Incoming] = []
    here.send(b"", [Region(data)])
    incoming = ends.receive(there)
    incoming.into([target(place)], done.append)
    ends.until(lambda: len(cuda.called("copy_in")) == 2)
    for _ in range(20):
        ends.step()
    # Both slabs are being copied: no more is asked for, and what is in place in order counts.
    assert verbs.written == [SLAB, SLAB]
    assert incoming.received == 2 * SLAB
    assert there.due() == 0.001
    cuda.let_go(2)
    ends.until(lambda: len(cuda.called("copy_in")) == 3)
    assert not done
    cuda.let_go()
    ends.until(lambda: done)
    assert bytes_of(place) == data


def test_a_second_payload_is_not_held_up_by_one_that_waits_for_a_slab(
    pair: Pair, ends: Ends, cuda: FakeCuda
) -> None:
    here, there = pair
    cuda.dmabuf = False
    cuda.holding = True
    (data,) = random_parts([4 * SLAB])
    here.send(b"", [Region(data)])
    ends.receive(there).into([target(device_memory(cuda, bytes(len(data))))])
    ends.until(lambda: len(cuda.called("copy_in")) == 2)
    landed = bytearray(len(data))
    move(pair, ends, data, memoryview(landed))
    assert landed == data
    cuda.let_go()


# -- what stays registered -------------------------------------------------------------------------


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


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copy_out", "copy_in", "reached"])
def test_a_gpu_that_fails_in_the_middle(pair: Pair, ends: Ends, cuda: FakeCuda, name: str) -> None:
    """The connection ends and says why; the fixture sees to it that nothing is left."""
    here, there = pair
    cuda.dmabuf = False
    (data,) = random_parts([8 * SLAB])
    place = device_memory(cuda, bytes(len(data)))
    here.send(b"", [Region(device_memory(cuda, data))])
    incoming = ends.receive(there)
    incoming.into([target(place)])
    ends.until(lambda: incoming.received >= 2 * SLAB)
    cuda.fail(name)
    with pytest.raises(ConnectionLost, match=f"a GPU's memory: {name}"):
        ends.until(lambda: False)
    here.abort()
    there.abort()
    cuda._failures.clear()
    if name == "reached":
        # Nobody knows whether the device still copies: what it copies to or from stays.
        assert cuda.pinned
        cuda.pinned.clear()
        cuda.events.clear()


def test_a_connection_that_ends_while_the_gpu_copies(
    pair: Pair, ends: Ends, cuda: FakeCuda
) -> None:
    here, there = pair
    cuda.dmabuf = False
    cuda.holding = True
    (data,) = random_parts([8 * SLAB])
    here.send(b"", [Region(device_memory(cuda, data))])
    ends.receive(there).into([target(device_memory(cuda, bytes(len(data))))])
    ends.until(lambda: cuda.called("copy_out"))
    here.abort()
    there.abort()
    # A copy that is under way needs its memory.
    assert len(cuda.pinned) == 2
    assert len(cuda.events) == 2
    cuda.let_go()
    tidy()
    assert not cuda.pinned


@pytest.mark.parametrize("staged", [False, True], ids=["direct", "staged"])
def test_a_payload_that_is_discarded(pair: Pair, ends: Ends, cuda: FakeCuda, staged: bool) -> None:
    """Its memory is left alone from then on, and the connection goes on."""
    here, there = pair
    cuda.dmabuf = not staged
    (data,) = random_parts([64 * SLAB])
    place = device_memory(cuda, bytes(len(data)))
    here.send(b"", [Region(device_memory(cuda, data))])
    incoming = ends.receive(there)
    incoming.into([target(place)])
    ends.until(lambda: incoming.received)
    assert incoming.received < len(data)
    gone: list[Incoming] = []
    incoming.discard(gone.append)
    before = bytes_of(place)
    ends.until(lambda: gone)
    assert bytes_of(place) == before
    move(pair, ends, device_memory(cuda, data), target(place))
    assert bytes_of(place) == data


def test_without_page_locked_memory(pair: Pair, ends: Ends, cuda: FakeCuda) -> None:
    cuda.dmabuf = False
    cuda.pinnable = 0
    (data,) = random_parts([3 * SLAB])
    place = device_memory(cuda, bytes(len(data)))
    move(pair, ends, device_memory(cuda, data), target(place))
    assert bytes_of(place) == data
    assert not cuda.pinned
