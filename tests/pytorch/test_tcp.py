"""The part in C++ over a way without shared memory."""

from __future__ import annotations

import torch

from tests.pytorch.device import remote_device


def test_a_large_upload_after_ops_that_are_not_out_yet() -> None:
    """Each record has a number of its own, whoever gives it."""
    with remote_device("&transport=tcp"):
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
