"""How the CUDA driver is called. The library is made of callbacks with the prototypes of cuda.h, so
each call goes through the foreign function interface as it would with a real one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char_p,
    c_int,
    c_int32,
    c_size_t,
    c_uint,
    c_uint64,
    c_ulonglong,
    c_void_p,
)
from typing import Any

import pytest

from gpuremote.memory import cuda
from gpuremote.memory.cuda import Allocation, CudaError, LibCuda, cuda_driver

Handle = c_void_p  # CUcontext, CUstream, CUevent
Pointer = c_ulonglong  # CUdeviceptr
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(Handle), c_int),
    "cuCtxPushCurrent_v2": (Handle,),
    "cuCtxPopCurrent_v2": (POINTER(Handle),),
    "cuPointerGetAttribute": (c_void_p, c_int, Pointer),
    "cuPointerSetAttribute": (POINTER(c_uint), c_int, Pointer),
    "cuMemGetAddressRange_v2": (POINTER(Pointer), POINTER(c_size_t), Pointer),
    "cuMemGetHandleForAddressRange": (POINTER(c_int), Pointer, c_size_t, c_int, c_ulonglong),
    "cuFlushGPUDirectRDMAWrites": (c_int, c_int),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (Pointer, c_void_p, c_size_t, Handle),
    "cuMemcpyDtoHAsync_v2": (c_void_p, Pointer, c_size_t, Handle),
    "cuStreamCreate": (POINTER(Handle), c_uint),
    "cuStreamDestroy_v2": (Handle,),
    "cuStreamSynchronize": (Handle,),
    "cuEventCreate": (POINTER(Handle), c_uint),
    "cuEventRecord": (Handle, Handle),
    "cuEventQuery": (Handle,),
    "cuEventDestroy_v2": (Handle,),
}
# As wide as a pointer, and with a sign where one would be seen.
CONTEXT, STREAM, EVENT = 0xC0DE_0000_0000_0001, 0xF00D_0000_0000_0002, 0xBEEF_0000_0000_0003
BASE, SIZE = 0x7F00_1234_0000_0000, 5 << 32
INSIDE = BASE + (3 << 32)
HOST = 0x7E00_0000_1000
# The numbers that cuda.h gives to attributes.
MEMORY_TYPE, SYNC_MEMOPS, BUFFER_ID, IS_MANAGED, ORDINAL, MEMPOOL = 2, 6, 7, 8, 9, 17
FLUSH_OPTIONS, WRITES_ORDERING, DMA_BUF = 117, 118, 124
INVALID_VALUE, NOT_READY = 1, 600


class Library:
    """Stands where ``ctypes.CDLL("libcuda.so.1")`` would; each function notes its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.results: dict[str, int] = {}
        self.absent: set[str] = set()
        self.attributes = {FLUSH_OPTIONS: 1, WRITES_ORDERING: 100, DMA_BUF: 1}
        self.of_pointer = {
            MEMORY_TYPE: (c_uint, 2),
            IS_MANAGED: (c_uint, 0),
            BUFFER_ID: (c_uint64, 1 << 40),
            ORDINAL: (c_int32, 3),
            MEMPOOL: (c_uint64, 0),
        }
        self._kept: list[Any] = []

    def __getitem__(self, name: str) -> Any:
        if name in self.absent:
            raise AttributeError(name)

        def called(*arguments: Any) -> int:
            plain = tuple(a for a in arguments if a is None or isinstance(a, int))
            self.calls.append((name, *plain))
            step: Callable[..., None] | None = getattr(self, name, None)
            result = self.results.get(name, 0)
            if step is not None and not result:
                step(*arguments)
            return result

        function = CFUNCTYPE(c_int, *PROTOTYPES[name])(called)
        self._kept.append(function)
        return function

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def cuGetErrorName(self, number: int, text: Any) -> None:
        text[0] = {INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE"}.get(number)

    def cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device[0] = ordinal + 10

    def cuDeviceGetCount(self, count: Any) -> None:
        count[0] = 4

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        assert device == 13
        value[0] = self.attributes[attribute]

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = CONTEXT

    def cuPointerGetAttribute(self, value: int, attribute: int, pointer: int) -> None:
        kind, found = self.of_pointer[attribute]
        kind.from_address(value).value = found

    def cuPointerSetAttribute(self, value: Any, attribute: int, pointer: int) -> None:
        assert value[0] == 1

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, pointer: int) -> None:
        base[0], size[0] = BASE, SIZE

    def cuMemGetHandleForAddressRange(self, handle: Any, *_: int) -> None:
        handle[0] = 77

    def cuMemHostAlloc(self, address: Any, size: int, flags: int) -> None:
        address[0] = HOST

    def cuStreamCreate(self, stream: Any, flags: int) -> None:
        stream[0] = STREAM

    def cuEventCreate(self, event: Any, flags: int) -> None:
        event[0] = EVENT


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    return found


@pytest.fixture
def driver(library: Library) -> LibCuda:
    made = LibCuda()
    assert library.named("cuInit") == [(0,)]
    return made


def test_every_function_has_the_prototype_of_the_header() -> None:
    assert set(cuda._PROTOTYPES) == set(PROTOTYPES)
    for name, arguments in PROTOTYPES.items():
        ours = cuda._PROTOTYPES[name]
        assert [ctypes.sizeof(a) for a in ours] == [ctypes.sizeof(a) for a in arguments], name


def test_an_allocation(driver: LibCuda, library: Library) -> None:
    assert driver.devices() == 4
    assert driver.allocation(INSIDE) == Allocation(BASE, SIZE, 1 << 40, 3, False)
    assert {call[-1] for call in library.named("cuPointerGetAttribute")} == {INSIDE}
    library.of_pointer[MEMPOOL] = (c_uint64, 1 << 50)
    assert driver.allocation(INSIDE).pooled


@pytest.mark.parametrize(("attribute", "value"), [(MEMORY_TYPE, 1), (IS_MANAGED, 1)])
def test_memory_that_is_not_a_devices(
    driver: LibCuda, library: Library, attribute: int, value: int
) -> None:
    library.of_pointer[attribute] = (c_uint, value)
    with pytest.raises(CudaError, match="not memory of one device"):
        driver.allocation(INSIDE)


def test_what_a_card_may_do(driver: LibCuda, library: Library) -> None:
    assert driver.exports_dmabuf(3)
    assert driver.orders_writes(3)
    assert driver.flushes_writes(3)
    library.attributes = {FLUSH_OPTIONS: 2, WRITES_ORDERING: 0, DMA_BUF: 0}
    assert not driver.exports_dmabuf(3)
    assert not driver.orders_writes(3)
    assert not driver.flushes_writes(3)


def test_calls_on_a_device(driver: LibCuda, library: Library) -> None:
    assert driver.export_dmabuf(3, BASE, 8192) == 77
    driver.synchronous_copies(3, BASE)
    driver.flush_writes(3)
    assert driver.allocate_host(3, SIZE) == HOST
    driver.free_host(3, HOST)
    assert driver.create_stream(3) == STREAM
    driver.copy_out(3, HOST, BASE, SIZE, STREAM)
    driver.copy_in(3, BASE, HOST, SIZE, 0)
    assert driver.record(3, STREAM) == EVENT
    assert driver.reached(3, EVENT)
    library.results["cuEventQuery"] = NOT_READY
    assert not driver.reached(3, EVENT)
    driver.synchronize(3, STREAM)
    driver.destroy_event(3, EVENT)
    driver.destroy_stream(3, STREAM)
    # Every one of them within the device's primary context, which was retained once.
    assert library.named("cuDevicePrimaryCtxRetain") == [(13,)]
    names = [call[0] for call in library.calls]
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2") == 14
    assert set(library.named("cuCtxPushCurrent_v2")) == {(CONTEXT,)}
    told = [
        call
        for call in library.calls
        if not call[0].startswith(("cuCtx", "cuDevice", "cuInit", "cuStreamCreate"))
    ]
    assert told == [
        ("cuMemGetHandleForAddressRange", BASE, 8192, 1, 0),
        ("cuPointerSetAttribute", SYNC_MEMOPS, BASE),
        ("cuFlushGPUDirectRDMAWrites", 0, 100),
        ("cuMemHostAlloc", SIZE, 1),
        ("cuMemFreeHost", HOST),
        ("cuMemcpyDtoHAsync_v2", HOST, BASE, SIZE, STREAM),
        ("cuMemcpyHtoDAsync_v2", BASE, HOST, SIZE, None),
        ("cuEventCreate", 2),
        ("cuEventRecord", EVENT, STREAM),
        ("cuEventQuery", EVENT),
        ("cuEventQuery", EVENT),
        ("cuStreamSynchronize", STREAM),
        ("cuEventDestroy_v2", EVENT),
        ("cuStreamDestroy_v2", STREAM),
    ]
    assert library.named("cuStreamCreate") == [(1,)]


@pytest.mark.parametrize("name", ["cuEventQuery", "cuEventRecord", "cuMemHostAlloc"])
def test_a_call_that_fails(driver: LibCuda, library: Library, name: str) -> None:
    library.results[name] = INVALID_VALUE
    steps: dict[str, Callable[[], object]] = {
        "cuEventQuery": lambda: driver.reached(3, EVENT),
        "cuEventRecord": lambda: driver.record(3, STREAM),
        "cuMemHostAlloc": lambda: driver.allocate_host(3, 1),
    }
    with pytest.raises(CudaError, match=f"{name}: CUDA_ERROR_INVALID_VALUE") as raised:
        steps[name]()
    assert raised.value.result == INVALID_VALUE
    # The thread's context is as it was, and an event that was made for it is gone.
    names = [call[0] for call in library.calls]
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2") == 1
    assert names.count("cuEventDestroy_v2") == names.count("cuEventCreate")


def test_an_error_without_a_name(driver: LibCuda, library: Library) -> None:
    library.results["cuStreamSynchronize"] = 12345
    with pytest.raises(CudaError, match="cuStreamSynchronize: error 12345"):
        driver.synchronize(3, STREAM)


def test_a_driver_that_is_too_old(driver: LibCuda, library: Library) -> None:
    library.absent.add("cuMemGetHandleForAddressRange")
    with pytest.raises(CudaError, match="no cuMemGetHandleForAddressRange; it is too old"):
        driver.export_dmabuf(3, BASE, 4096)
    library.results["cuPointerGetAttribute"] = INVALID_VALUE
    with pytest.raises(CudaError):
        driver.allocation(BASE)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def missing(name: str) -> Any:
        tried.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda._loaded.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(CudaError, match=r"no CUDA driver \(libcuda"):
                cuda_driver()
        assert tried == ["libcuda.so.1"]  # looked for once
    finally:
        cuda._loaded.cache_clear()
