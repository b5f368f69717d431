"""Weights that a server has do not travel again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gpuremote.torch
from gpuremote.testing.servers import RunningServer, device_server
from gpuremote.torch import _homes
from tests.pytorch.test_operator import write

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    arguments = ("--backend", "torch-cpu", "--content-cache", "64MiB", "--warm", "1")
    with device_server(*arguments) as running:
        yield running


def model(seed: int) -> torch.nn.Sequential:
    """Two matrices of 4 MiB, tied ones among them, and what is too small for a digest."""
    torch.manual_seed(seed)
    first = torch.nn.Linear(1024, 1024)
    tied = torch.nn.Linear(1024, 1024)
    tied.weight = first.weight
    return torch.nn.Sequential(first, tied, torch.nn.Linear(1024, 1024))


def sent() -> tuple[int, int]:
    """Bytes that went out in this session, and that did not have to."""
    found = _homes.home().session.stats()
    return found.payload_sent, found.payload_spared


def test_a_model_and_a_file(server: RunningServer, tmp_path: Path) -> None:
    weights = 2 << 22
    path = tmp_path / "model.safetensors"
    write(path, dict(model(1).state_dict()))
    expected = model(1)(torch.ones(1, 1024))
    for turn in range(3):
        gpuremote.torch.connect(f"{server.url}?transport=tcp&dedupe=on")
        try:
            there = model(1 if turn < 2 else 2).to("remote")
            if turn < 2:
                assert there[0].weight is there[1].weight
            else:
                there.load_state_dict(gpuremote.torch.load_file(path))
            out = there(torch.ones(1, 1024).to("remote")).cpu()
            assert torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
            payload, spared = sent()
            if turn == 0:
                assert payload >= weights
                assert not spared
            elif turn == 1:
                assert payload < 1 << 20
                assert spared == weights
            else:  # the file has what is tied twice
                assert payload < weights + (1 << 20)
                assert spared == 3 << 22
            layer = there[0]
            assert isinstance(layer, torch.nn.Linear)
            with torch.no_grad():
                layer.weight.zero_()  # its own
            assert layer.weight.sum().item() == 0
        finally:
            gpuremote.torch.close()
