"""A program where memory is short."""

from __future__ import annotations

import pytest
import torch

import gpuremote.torch
from gpuremote.testing.servers import RunningServer
from tests.pytorch.device import remote_device


def test_a_program_needs_no_more_memory_than_there_is(torch_server: RunningServer) -> None:
    """It fails before it has written to anything."""
    with remote_device(f"{torch_server.url}?memory=9MiB") as small:
        total = torch.zeros(4, device=small)

        def step(x: torch.Tensor) -> torch.Tensor:
            total.add_(1)
            return (x + 1).sum() + total.sum()

        captured = gpuremote.torch.capture(step)
        x = torch.ones(1 << 20, device=small)  # 4 MiB
        for k in range(4):
            assert captured(x).item() == 2 * (1 << 20) + 4 * (k + 1)
        more = torch.ones(1 << 19, device=small)
        with pytest.raises(MemoryError, match="do not fit"):
            captured(x).item()
        del more
        assert captured(x).item() == 2 * (1 << 20) + 4 * 5
