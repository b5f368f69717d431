"""Over a way without shared memory."""

from __future__ import annotations

import torch

from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from tests.pytorch.device import remote_device


def test_a_large_upload_after_ops_that_are_not_out_yet(torch_server: RunningServer) -> None:
    """Each record has a number of its own, whoever gives it."""
    with remote_device(f"{torch_server.url}?transport=tcp"):
        big = torch.ones(1 << 20)
        y = torch.ones(4, device="remote")
        for _ in range(50):
            a = y + 1
            del a
            small = torch.ones(3).to("remote")
            b = y + small.sum()
            there = big.to("remote")
            assert b.sum().item() == 16
            assert there.sum().item() == 1 << 20


def test_what_goes_there_is_not_waited_for(torch_server: RunningServer) -> None:
    """A copy travels, as a copy of pageable memory does with CUDA."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(12)))
    batch = torch.randn(512, 256)
    expected = model(batch).sum().item()
    with remote_device(f"{torch_server.url}?transport=tcp"):
        session = _homes.home().session
        session.synchronize()
        before = session.stats().round_trips.total()
        there = model.to("remote")
        x = batch.to("remote")
        batch.zero_()
        loss = there(x).sum()
        assert session.stats().round_trips.total() == before
        assert abs(loss.item() - expected) < 1e-2
        assert session.stats().round_trips.total() == before + 1
