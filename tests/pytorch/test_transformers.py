"""Models of the package transformers, made from configurations: what they compute is what they
compute here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gpuremote.testing.servers import RunningServer
from gpuremote.torch import _homes
from gpuremote.torch._tier import native
from tests.pytorch.device import remote_device

# What the two parts differ in is small ops, and these models have no others.
pytestmark = pytest.mark.skipif(native is None, reason="the other half of the suite runs them")
transformers.logging.set_verbosity_error()
SIZES: Any = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 63}
CONFIGS: dict[str, Any] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, **SIZES)),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **SIZES,
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def device(torch_server: RunningServer) -> Iterator[torch.device]:
    with remote_device(torch_server.url) as found:
        yield found


@pytest.fixture(params=CONFIGS)
def models(request: pytest.FixtureRequest, device: torch.device) -> tuple[Any, Any]:
    """The same model here and there."""
    make, config = CONFIGS[request.param]
    torch.manual_seed(0)
    here = make(config).eval()
    return here, copy.deepcopy(here).to(device)


def test_losses(models: tuple[Any, Any], device: torch.device) -> None:
    """Also that weights which are one (of embedding and head) stay one."""
    x = torch.randint(1, 60, (2, 12))
    losses = []
    for model, data in zip(models, (x, x.to(device)), strict=True):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(4):
            optimiser.zero_grad()
            loss = model(data, labels=data).loss
            loss.backward()
            optimiser.step()
            found.append(loss.detach())
        losses.append(torch.stack(found).cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert losses[0][3] < losses[0][0]
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in models]
    assert tied[0] == tied[1]


def test_generation_is_the_same_word_for_word(
    models: tuple[Any, Any], device: torch.device
) -> None:
    here, there = models
    x = torch.randint(1, 60, (2, 6))
    mask = torch.ones_like(x)
    many: Any = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = here.generate(x, attention_mask=mask, **many)
    x, mask = x.to(device), mask.to(device)
    found = there.generate(x, attention_mask=mask, **many)
    assert found.tolist() == expected.tolist()


def test_generation_waits_once_for_a_word(models: tuple[Any, Any], device: torch.device) -> None:
    """It asks after each whether all are done; what it asks before the first is the same for any
    number."""
    _, there = models
    x = torch.randint(1, 60, (1, 6)).to(device)
    mask = torch.ones_like(x)
    session = _homes.home().session
    trips = []
    for count in (8, 24):
        before = session.stats().round_trips.copy()
        there.generate(
            x,
            attention_mask=mask,
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        trips.append((session.stats().round_trips - before).total())
    assert trips[1] - trips[0] <= 16
