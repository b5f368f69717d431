"""Tensors and arrays in one memory of the server."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import gpuremote
import gpuremote.torch
from gpuremote.errors import DeviceMismatch, DTypeError, GpuRemoteError
from gpuremote.testing.servers import RunningServer
from tests.pytorch.device import remote_device


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


@pytest.fixture
def xp() -> Any:
    return gpuremote.torch.session().devices[0].xp


def moved(before: Any) -> int:
    after = gpuremote.torch.session().stats()
    return int(after.payload_sent - before.payload_sent + after.payload_received
               - before.payload_received)  # fmt: skip


def test_a_tensor_as_an_array(device: torch.device, xp: Any) -> None:
    tensor = torch.arange(100_000, dtype=torch.float64, device=device).reshape(1000, 100)
    session = gpuremote.torch.session()
    session.synchronize()
    before = session.stats()
    array = gpuremote.torch.as_array(tensor)
    assert isinstance(array, xp.ndarray)
    assert (array.shape, array.dtype) == ((1000, 100), np.float64)
    array *= 2
    tensor += 1
    rows = gpuremote.torch.as_array(tensor[3:5])
    assert moved(before) == 0
    assert sum((session.stats().round_trips - before.round_trips).values()) == 0
    expected = np.arange(100_000.0).reshape(1000, 100) * 2 + 1
    np.testing.assert_array_equal(array.get(), expected)
    np.testing.assert_array_equal(rows.get(), expected[3:5])
    np.testing.assert_array_equal(tensor.cpu().numpy(), expected)
    # The memory lives as long as one of the two.
    del tensor, rows
    gc.collect()
    np.testing.assert_array_equal(array.get(), expected)
    assert float(xp.median(array)) == np.median(expected)


def test_an_array_as_a_tensor(device: torch.device, xp: Any) -> None:
    array = xp.arange(60_000.0).reshape(200, 300)
    session = gpuremote.torch.session()
    session.synchronize()
    before = session.stats()
    tensor = gpuremote.torch.as_tensor(array)
    assert tensor.device == device
    tensor.mul_(3)
    array += 1
    assert moved(before) == 0
    expected = np.arange(60_000.0).reshape(200, 300) * 3 + 1
    np.testing.assert_array_equal(tensor.cpu().numpy(), expected)
    np.testing.assert_array_equal(array.get(), expected)
    again = gpuremote.torch.as_array(tensor)
    again[0, 0] = -5
    assert array[0, 0].item() == tensor[0, 0].item() == -5
    tensor.requires_grad_()
    (tensor * 2).sum().backward()
    assert tensor.grad is not None
    np.testing.assert_array_equal(gpuremote.torch.as_array(tensor.grad).get(), 2)
    del array, again
    gc.collect()
    assert tensor[0, 1].item() == 4


def test_memory_is_counted_once(device: torch.device, xp: Any) -> None:
    session = gpuremote.torch.session()

    def used() -> int:
        gc.collect()
        session.flush()
        return int(session.server_stats()["memory_used"])

    before = used()
    tensor = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    array = gpuremote.torch.as_array(tensor)
    assert used() - before == 1 << 20
    del tensor
    assert used() - before == 1 << 20
    del array
    assert used() == before


def test_every_dtype_that_both_have(device: torch.device, xp: Any) -> None:
    for name in ("bool", "int8", "uint8", "int64", "float16", "float32", "complex64"):
        array = xp.ones((2, 3), name)
        tensor = gpuremote.torch.as_tensor(array)
        assert str(tensor.dtype) == f"torch.{name}"
        assert gpuremote.torch.as_array(tensor).dtype == np.dtype(name)
        assert tensor.cpu().sum().item() == 6
    assert gpuremote.torch.as_tensor(xp.ones(())).shape == ()
    assert gpuremote.torch.as_array(torch.ones((), device=device)).item() == 1
    assert gpuremote.torch.as_array(torch.ones(0, 3, device=device)).shape == (0, 3)


def test_sets_are_counted_anew(device: torch.device, xp: Any) -> None:
    """What was known of an array's values is not relied on where torch may write to it."""
    tensor = torch.tensor([1, 1, 1], device=device)
    array = gpuremote.torch.as_array(tensor)
    assert xp.unique_values(array).tolist() == [1]
    tensor[0] = 7
    assert xp.unique_values(array).tolist() == [1, 7]


def test_what_can_not_be_shared(device: torch.device, xp: Any) -> None:
    matrix = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        gpuremote.torch.as_array(matrix.T)
    with pytest.raises(DTypeError, match="bfloat16"):
        gpuremote.torch.as_array(matrix.bfloat16())
    with pytest.raises(DeviceMismatch, match="cpu"):
        gpuremote.torch.as_array(torch.ones(2))
    with (
        gpuremote.connect_sync("local://") as other,
        pytest.raises(DeviceMismatch, match="session"),
    ):
        gpuremote.torch.as_tensor(other.devices[0].xp.ones(2))
    turned = gpuremote.torch.as_tensor(xp.arange(6.0).reshape(2, 3).T)
    with pytest.raises(GpuRemoteError, match="contiguous"):
        (turned + 1).cpu()
    gpuremote.torch.session()._core.take_failures()
