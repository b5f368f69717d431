"""What doctor says about the memory of GPUs, with a double of the driver."""

from __future__ import annotations

import pytest

from gpuremote.cli import doctor
from gpuremote.memory.cuda import CudaError
from gpuremote.testing.fake_cuda import FakeCuda


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (FakeCuda(), "GPU 0: dma-buf, nvidia-peermem is not loaded, a card's writes are flushed"),
        (
            FakeCuda(dmabuf=False, ordered=True),
            "GPU 0: no dma-buf, nvidia-peermem is not loaded, a card's writes are ordered",
        ),
        (
            FakeCuda(flushes=False),
            "GPU 0: dma-buf, nvidia-peermem is not loaded, a card's writes are staged",
        ),
    ],
)
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, driver: FakeCuda, said: str) -> None:
    monkeypatch.setattr(doctor, "cuda_driver", lambda: driver)
    found = doctor._gpu_memory()
    found["nvidia_peermem"] = False  # whatever this machine has
    assert doctor._ways(found) == said
    found["nvidia_peermem"] = True
    assert ", nvidia-peermem, " in doctor._ways(found)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> FakeCuda:
        raise CudaError("no CUDA driver (libcuda.so.1: cannot open shared object file)")

    monkeypatch.setattr(doctor, "cuda_driver", none)
    assert doctor._ways(doctor._gpu_memory()).startswith("no CUDA driver (libcuda.so.1")
