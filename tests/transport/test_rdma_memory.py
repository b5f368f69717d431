"""What stays registered, for whom and how long; memory that is given out."""

from __future__ import annotations

import gc
import mmap
import weakref
from array import array

import numpy as np
import pytest

from gpuremote.testing.fake_verbs import FakeVerbs
from gpuremote.transport.rdma.memory import Registry, Slabs, address_of, exporter_of
from gpuremote.transport.verbs.base import Access, VerbsError

READ, WRITE = Access.READ_HERE, Access.WRITE_HERE | Access.WRITE_THERE


@pytest.fixture
def verbs() -> FakeVerbs:
    return FakeVerbs()


@pytest.fixture
def registry(verbs: FakeVerbs) -> Registry:
    return Registry(verbs.open("fake0"), limit=1 << 20)


def memory(size: int = 65536) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.zeros(size, dtype=np.uint8)


def test_addresses() -> None:
    owned = memory()
    assert address_of(owned.data) == owned.__array_interface__["data"][0]
    assert address_of(owned[100:].data) == address_of(owned.data) + 100
    text = b"read-only"
    assert address_of(memoryview(text)[4:]) == address_of(memoryview(text)) + 4


def test_owners() -> None:
    owned = memory()
    assert exporter_of(owned.data) is owned
    assert exporter_of(owned[5:][::1].view(np.int8).data) is owned
    assert exporter_of(memoryview(b"abc")) is None
    assert exporter_of(memoryview(bytearray(3))) is None
    mapped = mmap.mmap(-1, 4096)
    assert exporter_of(memoryview(mapped)) is mapped
    numbers = array("d", [1.0])
    assert exporter_of(memoryview(numbers)) is numbers


def test_it_stays_registered(registry: Registry, verbs: FakeVerbs) -> None:
    owned = memory()
    first = registry.acquire(owned.data, 0, 4096, READ)
    registry.release(first)
    assert registry.acquire(owned.data, 0, 4096, READ) is first
    assert registry.acquire(owned.data, 0, 4096, READ) is first
    assert (registry.made, registry.reused) == (1, 2)
    # Another part, and another use, are other registrations.
    assert registry.acquire(owned.data, 4096, 4096, READ) is not first
    assert registry.acquire(owned.data, 0, 4096, WRITE) is not first
    assert verbs.registered == 3 * 4096 == registry.kept


def test_what_has_no_owner_to_watch_is_registered_each_time(
    registry: Registry, verbs: FakeVerbs
) -> None:
    source = bytearray(4096)
    for _ in range(3):
        held = registry.acquire(memoryview(source), 0, 4096, READ)
        registry.release(held)
    assert registry.made == 3
    assert verbs.registered == registry.kept == 0


def test_it_ends_with_its_owner(registry: Registry, verbs: FakeVerbs) -> None:
    owned = memory()
    registry.release(registry.acquire(owned.data, 0, 4096, READ))
    del owned
    gc.collect()
    # At once: the peer may have the key, and the memory belongs to others now.
    assert verbs.registered == 0
    registry.tidy()
    assert registry.kept == 0


def test_an_owner_that_goes_while_it_is_in_use(registry: Registry, verbs: FakeVerbs) -> None:
    owned = memory()
    view = owned.data
    held = registry.acquire(view, 0, 4096, READ)
    del owned
    gc.collect()
    registry.tidy()
    assert verbs.registered == 4096  # what is in use has a view of it
    del view
    gc.collect()
    registry.release(held)
    assert verbs.registered == 0


def test_an_address_that_is_used_again(registry: Registry) -> None:
    """Another owner, even at the same place and with the same identity, is another one."""
    owned = memory()
    view = owned.data
    first = registry.acquire(view, 0, 4096, READ)
    registry.release(first)

    class Gone:
        pass

    # What a reused identity looks like: the key is the same, the owner is not.
    gone = Gone()
    first.owner = weakref.ref(gone)
    second = registry.acquire(view, 0, 4096, READ)
    assert second is not first


def test_what_the_peer_writes_to_has_a_registration_of_its_own(
    registry: Registry, verbs: FakeVerbs
) -> None:
    owned = memory()
    first = registry.acquire(owned.data, 0, 4096, WRITE)
    second = registry.acquire(owned.data, 0, 4096, WRITE)
    assert first.rkey != second.rkey
    registry.revoke(first)
    assert first.rkey not in verbs.memory
    assert second.rkey in verbs.memory
    registry.release(second)
    assert verbs.registered == registry.kept == 0


def test_what_was_used_least_lately_goes_first(registry: Registry) -> None:
    arrays = [memory(512 << 10) for _ in range(3)]
    entries = []
    for owned in arrays[:2]:
        entries.append(registry.acquire(owned.data, 0, 512 << 10, READ))
        registry.release(entries[-1])
    registry.release(registry.acquire(arrays[0].data, 0, 512 << 10, READ))
    registry.release(registry.acquire(arrays[2].data, 0, 512 << 10, READ))
    assert registry.kept == 1 << 20
    assert entries[0].kept
    assert not entries[1].kept


def test_nothing_in_use_goes(registry: Registry, verbs: FakeVerbs) -> None:
    arrays = [memory(1 << 20) for _ in range(3)]
    held = [registry.acquire(owned.data, 0, 1 << 20, READ) for owned in arrays]
    assert all(entry.lkey in verbs.memory for entry in held)
    for entry in held:
        registry.release(entry)
    assert registry.kept <= 1 << 20


def test_what_is_kept_makes_room(verbs: FakeVerbs) -> None:
    verbs.lockable = 1 << 20
    registry = Registry(verbs.open("fake0"))
    arrays = [memory(1 << 20) for _ in range(2)]
    registry.release(registry.acquire(arrays[0].data, 0, 1 << 20, READ))
    held = registry.acquire(arrays[1].data, 0, 1 << 20, READ)
    assert held.lkey in verbs.memory
    with pytest.raises(VerbsError, match="ENOMEM"):
        registry.acquire(arrays[0].data, 0, 1 << 20, READ)


def test_the_end_unregisters_everything(registry: Registry, verbs: FakeVerbs) -> None:
    owned = memory()
    registry.acquire(owned.data, 0, 4096, READ)
    registry.add_slab(address_of(owned.data), 8192)
    registry.close()
    assert verbs.registered == 0


def test_slabs(registry: Registry) -> None:
    slabs = Slabs([registry], limit=32 << 20)
    first = slabs.allocate(10_000)
    second = slabs.allocate(3)
    assert first is not None
    assert second is not None
    assert (first.nbytes, second.nbytes, first.format, first.readonly) == (10_000, 3, "B", False)
    made = registry.made
    held = registry.acquire(first, 5000, 100, READ)
    assert held.address <= address_of(first)
    registry.release(held)
    assert registry.made == made
    # Everything that is made from the view keeps the memory.
    where = address_of(first)
    part = np.frombuffer(first, dtype=np.uint8)[10:]
    del first
    gc.collect()
    other = slabs.allocate(10_000)
    assert other is not None
    assert address_of(other) != where
    del part
    gc.collect()
    again = slabs.allocate(10_000)
    assert again is not None
    assert address_of(again) == where


def test_slabs_have_an_end(registry: Registry) -> None:
    slabs = Slabs([registry], limit=16 << 20)
    views = [slabs.allocate(4 << 20) for _ in range(5)]
    assert views[:4].count(None) == 0
    assert views[4] is None
    assert slabs.allocate(0) is None
    views.clear()
    gc.collect()
    assert slabs.allocate(16 << 20) is not None


def test_no_slab_where_nothing_may_be_locked(verbs: FakeVerbs) -> None:
    verbs.lockable = 4096
    slabs = Slabs([Registry(verbs.open("fake0"))])
    assert slabs.allocate(100) is None
