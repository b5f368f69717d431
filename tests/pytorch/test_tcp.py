"""Over a way without shared memory."""

from __future__ import annotations

import copy

import pytest
import torch

from gpuremote.rpc import dial
from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.wire.repeats import offered
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


@pytest.mark.skipif(not offered(), reason="the part in C is not used")
def test_training_steps_are_replayed_by_name(
    torch_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "LONG_WAY", 0.0)
    torch.manual_seed(3)
    here = torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    batch = torch.randn(2, 8, 32)
    with remote_device(f"{torch_server.url}?transport=tcp&lanes=1"):
        there = copy.deepcopy(here).to("remote")
        data = batch.to("remote")
        optimisers = [torch.optim.AdamW(m.parameters(), foreach=True) for m in (here, there)]
        session = _homes.home().session
        before = session.stats()
        for step in range(16):
            if step == 4:
                before = session.stats()
            for model, x, optimiser in zip((here, there), (batch, data), optimisers, strict=True):
                optimiser.zero_grad()
                # Another way now and then.
                (model(x) * (2 if step == 11 else 1)).square().mean().backward()
                optimiser.step()
        session.synchronize()
        after = session.stats()
        ops = after.ops - before.ops
        assert after.repeated - before.repeated > 0.75 * ops
        assert (after.bytes_sent - before.bytes_sent) / ops < 20
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(other.detach().cpu(), one.detach())
