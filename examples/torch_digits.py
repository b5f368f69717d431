"""A small network of convolutions learns handwritten digits, here and on a remote device.

Prints, among other things::

    the losses are equal: True
"""

from __future__ import annotations

import sys
import time

try:
    import torch
except ImportError:
    sys.exit("this example needs PyTorch: pip install torch")
from sklearn.datasets import load_digits
from torch import nn

import gpuremote.torch

STEPS = 60
EVERY = 10
"""Steps after which the loss is looked at: nothing else waits for the server."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train(device: str, images: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], float]:
    """The losses, and the share of images that are read right after all steps."""
    model = network().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    images, labels = images.to(device), labels.to(device)
    losses = []
    for step in range(STEPS):
        batch = slice(step * 64 % 1728, step * 64 % 1728 + 64)
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimiser.step()
        if step % EVERY == EVERY - 1:
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    return losses, right


def main() -> None:
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    found = {}
    for device in ("cpu", "remote"):
        begin = time.perf_counter()
        found[device] = losses, right = train(device, images, labels)
        took = time.perf_counter() - begin
        text = " ".join(f"{loss:.3f}" for loss in losses)
        print(f"{device:7} losses {text}, {right:.1%} right, {took:.1f} s")
    near = torch.allclose(*(torch.tensor(losses) for losses, _ in found.values()), rtol=0.02)
    print("the losses are equal:", near)
    gpuremote.torch.close()


if __name__ == "__main__":
    main()
