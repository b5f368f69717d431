"""A small GPT-2 learns a text on a remote device, and goes on writing it: letter by letter, with a
cache of keys and values.

The model is that of the package transformers, made from a configuration, so nothing is downloaded.
The text is this project's licence.

Prints, among other things::

    the first losses are equal: True
    what it writes is equal: True
"""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

try:
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError:
    sys.exit("this example needs PyTorch and transformers: pip install torch transformers")

import gpuremote.torch

TEXT = " ".join((Path(__file__).parents[1] / "LICENSE").read_text().split())
LETTERS = sorted(set(TEXT))
LENGTH = 48
STEPS = 90
EVERY = 10
"""Steps after which the loss is looked at."""


def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=64,
            n_head=4,
            n_positions=128,
            vocab_size=len(LETTERS),
            bos_token_id=0,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def batches() -> torch.Tensor:
    """Pieces of the text, as numbers of letters."""
    numbers = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(len(TEXT) - LENGTH, (STEPS, 8), generator=generator)
    return numbers[starts.unsqueeze(-1) + torch.arange(LENGTH)]


def train(net: GPT2LMHeadModel, device: str, data: torch.Tensor) -> list[float]:
    net.to(device).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    losses = []
    for step, batch in enumerate(data.to(device)):
        optimiser.zero_grad()
        loss = net(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        if step % EVERY == 0:
            losses.append(loss.item())
    return losses


def write(net: GPT2LMHeadModel, device: str) -> tuple[list[int], float]:
    """What it writes after the first words, and the seconds that each letter takes."""
    net.to(device).eval()
    start = torch.tensor([[LETTERS.index(letter) for letter in TEXT[:40]]], device=device)
    begin = time.perf_counter()
    mask = torch.ones_like(start)
    made = net.generate(
        start, attention_mask=mask, max_new_tokens=60, do_sample=False, pad_token_id=0
    )
    numbers = made[0].tolist()
    return numbers, (time.perf_counter() - begin) / 60


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    data = batches()
    there = model()
    here = copy.deepcopy(there)
    first = train(here, "cpu", data[:1])
    losses = train(there, "remote", data)
    print(f"losses on the remote device {' '.join(f'{loss:.3f}' for loss in losses)}")
    print("the first losses are equal:", abs(first[0] - losses[0]) < 1e-4)

    expected, local = write(copy.deepcopy(there), "cpu")
    found, remote = write(there, "remote")
    print("".join(LETTERS[number] for number in found).strip())
    print(f"{local * 1e3:.1f} ms per letter here, {remote * 1e3:.1f} ms on the remote device")
    print("what it writes is equal:", found == expected)
    gpuremote.torch.close()


if __name__ == "__main__":
    main()
