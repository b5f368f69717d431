"""The CUDA driver, as far as memory goes: pointers, dma-buf, page-locked staging. No network card
is needed for that."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from gpuremote.errors import InvalidBuffer
from gpuremote.memory.cuda import CudaError, LibCuda, cuda_driver
from gpuremote.memory.device import DeviceMemory, device_array, on_cuda_device
from gpuremote.memory.staging import SLAB, SLABS, Staging
from tests.gpu.machine import no_cupy, no_torch

pytestmark = pytest.mark.skipif(bool(no_cupy()), reason=no_cupy() or "-")
MiB: Final = 1 << 20


@pytest.fixture(scope="module")
def cupy() -> Any:
    return importlib.import_module("cupy")


@pytest.fixture(scope="module")
def driver(cupy: Any) -> LibCuda:
    cupy.zeros(1)  # CuPy makes the context that both use
    return cuda_driver()


def noise(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def digest(data: Any) -> str:
    return hashlib.blake2b(data).hexdigest()


def test_whose_memory_a_pointer_is(cupy: Any, driver: LibCuda) -> None:
    x = cupy.arange(3 * MiB, dtype="u1")
    found = driver.allocation(x.data.ptr + 5)
    assert found.base <= x.data.ptr
    assert found.base + found.size >= x.data.ptr + x.nbytes
    assert (found.device, found.pooled) == (0, False)
    # As long as the allocation lives: CuPy's pool keeps it.
    assert driver.allocation(x.data.ptr).ident == found.ident
    host = np.zeros(8)
    with pytest.raises(CudaError):
        driver.allocation(host.ctypes.data)
    pinned = cupy.cuda.alloc_pinned_memory(4096)
    with pytest.raises(CudaError, match="not memory of one device"):
        driver.allocation(pinned.ptr)
    managed = cupy.cuda.malloc_managed(4096)
    with pytest.raises(CudaError, match="not memory of one device"):
        driver.allocation(managed.ptr)


def test_memory_of_the_drivers_pool(cupy: Any, driver: LibCuda) -> None:
    pooled = cupy.cuda.malloc_async(2 * MiB)
    assert driver.allocation(pooled.ptr).pooled


def test_what_a_card_could_do(driver: LibCuda) -> None:
    assert driver.devices() >= 1
    # Whatever this machine has, each is an answer and not a refusal.
    for ask in (driver.exports_dmabuf, driver.orders_writes, driver.flushes_writes):
        assert ask(0) in (True, False)
    if driver.flushes_writes(0):
        driver.flush_writes(0)


def test_a_dmabuf(cupy: Any, driver: LibCuda) -> None:
    if not driver.exports_dmabuf(0):
        pytest.skip("this driver exports no dma-buf")
    memory = cupy.cuda.Memory(4 * MiB)  # an allocation of its own: whole pages
    driver.synchronous_copies(0, memory.ptr)
    descriptor = driver.export_dmabuf(0, memory.ptr, 4 * MiB)
    try:
        assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("/dmabuf")
    finally:
        os.close(descriptor)


def test_arrays_of_both_libraries(cupy: Any, driver: LibCuda) -> None:
    x = cupy.arange(12, dtype="f4").reshape(3, 4)
    assert on_cuda_device(x)
    found = device_array(x)
    assert (found.shape, found.dtype) == ((3, 4), np.dtype("f4"))
    assert (found.memory.pointer, found.memory.nbytes) == (x.data.ptr, 48)
    with pytest.raises(InvalidBuffer, match="C-contiguous"):
        device_array(x.T)
    out = bytearray(48)
    found.memory.copy_to(memoryview(out))
    assert bytes(out) == x.get().tobytes()


@pytest.mark.skipif(bool(no_torch()), reason=no_torch() or "-")
def test_a_tensor_through_dlpack(driver: LibCuda) -> None:
    import torch

    x = torch.arange(6, device="cuda", dtype=torch.float64, requires_grad=True)
    assert on_cuda_device(x)
    found = device_array(x)
    assert (found.shape, found.dtype) == ((6,), np.dtype("f8"))
    out = bytearray(48)
    found.memory.copy_to(memoryview(out))
    assert np.frombuffer(out).tolist() == [0, 1, 2, 3, 4, 5]


def test_staging_both_ways(cupy: Any, driver: LibCuda) -> None:
    """256 MiB in and out by way of page-locked slabs, as a connection brings it there."""
    size = 16 * SLAB
    host = noise(size)
    array = cupy.empty(size, "u1")
    whole = DeviceMemory(driver, array.data.ptr, size, 0, array)
    inward, outward = Staging(driver, 0), Staging(driver, 0)
    try:
        for offset in range(0, size, SLAB):
            while (slab := inward.take()) is None:
                pass
            assert slab.pinned
            slab.view[:] = host[offset : offset + SLAB].data
            inward.store(slab, whole.part(offset, SLAB))
        cupy.cuda.Stream.null.synchronize()
        assert digest(array.get()) == digest(host)
        back = np.empty(size, np.uint8)
        for offset in range(0, size, SLAB):
            slab = outward.take()
            assert slab is not None
            outward.load(slab, whole.part(offset, SLAB))
            while not outward.loaded(slab):
                pass
            back[offset : offset + SLAB] = np.frombuffer(slab.view, np.uint8)
            outward.give(slab)
        assert digest(back) == digest(host)
        inward.look()
        assert not inward.copying
        taken = [inward.take() for _ in range(SLABS)]
        assert None not in taken
        assert inward.take() is None
    finally:
        inward.close()
        outward.close()


def test_doctor() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuremote", "doctor", "--json"],
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    report = json.loads(done.stdout)
    gpus = report["machine"]["gpu_memory"]
    assert len(gpus["devices"]) == cuda_driver().devices()
    assert set(gpus["devices"][0]) == {"dma_buf", "ordered", "flush"}
    backends = {found["name"]: found for found in report["backends"]}
    assert backends["cupy"]["available"], backends["cupy"]["reason"]
    if not no_torch():
        assert "cuda" in backends["torch"]["reason"]
