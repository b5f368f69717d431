"""Arrays of other libraries in CUDA memory, with a double of the driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, InvalidBuffer
from gpuremote.memory import device, host
from gpuremote.memory.cuda import CudaError
from gpuremote.memory.device import DeviceMemory, DeviceTarget, device_array, on_cuda_device
from gpuremote.memory.host import host_array
from gpuremote.memory.staging import Staging, tidy
from gpuremote.testing.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """What the machine has."""
    found = FakeCuda()
    monkeypatch.setattr(device, "cuda_driver", lambda: found)
    return found


def described(
    cuda: FakeCuda, values: np.ndarray[Any, Any], *, strides: Any = None, **more: Any
) -> Any:
    """An array that says where it is as CuPy's do."""
    if values.nbytes:
        cuda.adopt(values.ctypes.data, values.nbytes, values, device=1)
    return SimpleNamespace(
        __cuda_array_interface__={
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (values.ctypes.data, False),
            "strides": strides,
            "version": 3,
            **more,
        }
    )


def capsule(values: np.ndarray[Any, Any], **changed: Any) -> Any:
    """A DLPack capsule that says that an array is in CUDA memory."""
    made = values.__dlpack__()
    tensor = device._DLTensor.from_address(device._capsule_pointer(made, b"dltensor"))
    tensor.device.kind = 2
    for name, value in changed.items():
        setattr(tensor.dtype, name, value)
    return made


class Tensor:
    """An array that gives its memory as torch's do, on a device of that kind."""

    def __init__(self, values: np.ndarray[Any, Any], kind: int = 2, **changed: Any) -> None:
        self.values = values
        self.kind = kind
        self.changed = changed

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self) -> Any:
        return capsule(self.values, **self.changed)

    @property
    def __cuda_array_interface__(self) -> Any:
        raise TypeError("not for this dtype, or not on this device")


def test_what_an_array_says_of_itself(cuda: FakeCuda) -> None:
    values = np.arange(12, dtype="<i4").reshape(3, 4)
    array = described(cuda, values, stream=5)
    assert on_cuda_device(array)
    found = device_array(array)
    assert (found.shape, found.dtype) == ((3, 4), np.dtype("i4"))
    memory = found.memory
    assert (memory.pointer, memory.nbytes, memory.device) == (values.ctypes.data, 48, 1)
    assert memory.owner is array
    assert memory.stream == 5
    part = memory.part(8, 16)
    assert (part.pointer, part.nbytes, part.stream) == (values.ctypes.data + 8, 16, 5)
    for stream in (None, 1):
        assert device_array(described(cuda, values, stream=stream)).memory.stream == 0


@pytest.mark.parametrize(
    ("shape", "strides", "fits"),
    [
        ((3, 4), (16, 4), True),
        ((3, 4), (4, 12), False),
        ((1, 4), (999, 4), True),
        ((0, 4), (1, 1), True),
        ((4,), (8,), False),
        ((), (), True),
    ],
)
def test_the_order_of_the_elements(cuda: FakeCuda, shape: Any, strides: Any, fits: bool) -> None:
    array = described(cuda, np.zeros(shape, "f4"), strides=strides)
    if fits:
        assert device_array(array).shape == shape
    else:
        with pytest.raises(InvalidBuffer, match="not C-contiguous"):
            device_array(array)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i1", "u8", "c16", "?"])
def test_dlpack(cuda: FakeCuda, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    cuda.adopt(values.ctypes.data, values.nbytes, values)
    found = device_array(Tensor(values))
    assert (found.shape, found.dtype) == ((3, 4), np.dtype(dtype))
    assert found.memory.pointer == values.ctypes.data
    back = np.empty_like(values)
    found.memory.copy_to(back.reshape(-1).view(np.uint8).data)
    assert np.array_equal(back, values)


def test_dlpack_that_does_not_fit(cuda: FakeCuda) -> None:
    values = np.zeros((3, 4), "f4")
    with pytest.raises(InvalidBuffer, match="not C-contiguous"):
        device_array(Tensor(values.T))
    with pytest.raises(DTypeError, match="no counterpart in NumPy"):
        device_array(Tensor(values, code=4, bits=16))  # bfloat16
    with pytest.raises(InvalidBuffer, match="no array in CUDA memory"):
        device_array(Tensor(values, kind=1))
    assert not on_cuda_device(Tensor(values, kind=1))
    assert not on_cuda_device([1, 2])


def test_an_exporter_that_refuses(cuda: FakeCuda) -> None:
    class Refusing(Tensor):
        def __dlpack__(self) -> Any:
            raise BufferError("it requires a gradient")

    with pytest.raises(InvalidBuffer, match="through DLPack: it requires a gradient"):
        device_array(Refusing(np.zeros(3)))


def test_an_upload_of_a_tensor_on_a_gpu(cuda: FakeCuda) -> None:
    values = np.arange(5, dtype="f4")
    cuda.adopt(values.ctypes.data, values.nbytes, values)
    for array in (Tensor(values), described(cuda, values)):
        found = host_array(array)
        assert (found.shape, found.dtype) == ((5,), np.dtype("f4"))
        assert bytes(found.view) == values.tobytes()
    # The copy comes behind what its stream has been given, and is over before it is used.
    assert cuda.called("copy_out", "synchronize") == 2 * ["copy_out", "synchronize"]
    assert host_array(Tensor(np.zeros(0, "f4"))).view.nbytes == 0


def test_an_upload_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise CudaError("no CUDA driver")

    monkeypatch.setattr(device, "cuda_driver", none)
    with pytest.raises(InvalidBuffer, match="Tensor can't be copied from its device: no CUDA dri"):
        host_array(Tensor(np.zeros(3)))


def test_a_tensor_on_the_cpu_needs_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(host, "device_array", None)
    assert host_array(torch.arange(3)).view.nbytes == 24


# -- where a payload goes --------------------------------------------------------------------------


def test_the_rest_of_a_target(cuda: FakeCuda) -> None:
    """A payload may arrive over several connections, of either kind."""
    memory = DeviceMemory(cuda, cuda.allocate(4096), 1000, 0, None)
    target = DeviceTarget(memory, lambda size: memoryview(bytearray(size)))
    first = target.host()
    assert (first.nbytes, target.staged[0][0]) == (1000, 0)
    rest = target[300:]
    assert (rest.nbytes, rest.memory.pointer) == (700, memory.pointer + 300)
    assert [(at, view.nbytes) for at, view in target.staged] == [(0, 300)]
    rest.host()
    last = target[900:]
    assert [(at, view.nbytes) for at, view in target.staged] == [(0, 300), (300, 600)]
    assert last.memory.pointer == memory.pointer + 900
    assert target[0:].nbytes == 1000
    assert target.staged == []
    with pytest.raises(IndexError):
        target[:10]


# -- slabs -----------------------------------------------------------------------------------------


@pytest.fixture
def staging(cuda: FakeCuda) -> Iterator[Staging]:
    made = Staging(cuda, 0, size=4096, count=2)
    yield made
    made.close()
    cuda.let_go()
    tidy()
    assert (cuda.pinned, cuda.streams, cuda.events) == ({}, set(), set())


def test_slabs_come_back_when_their_copy_is_over(cuda: FakeCuda, staging: Staging) -> None:
    memory = DeviceMemory(cuda, cuda.allocate(4096), 4096, 0, None, stream=9)
    assert not cuda.called("allocate_host")
    slabs = [staging.take(), staging.take()]
    assert staging.take() is None
    assert not staging.copying
    cuda.holding = True
    first, second = slabs
    assert first is not None
    assert second is not None
    first.view[:] = b"1" * 4096
    staging.store(first, memory)
    staging.load(second, memory)
    assert staging.copying
    assert staging.take() is None
    assert not staging.loaded(second)
    cuda.let_go()
    assert staging.loaded(second)
    assert staging.take() is first
    assert not staging.copying
    assert ctypes.string_at(memory.pointer, 4096) == b"1" * 4096
    # One that is given back in the middle of its copy is not used before that is over.
    cuda.holding = True
    staging.load(second, memory)
    staging.give(second)
    assert staging.take() is None
    assert staging.copying
    cuda.let_go()
    assert staging.take() is second
    assert {call[2] for call in cuda.calls if call[0] == "copy_in"} == {9}
    assert len(cuda.called("allocate_host")) == 2
