"""Two remote devices train one model as a pipeline, in mixed precision; here two servers on this
machine.

Each device has half of the layers. A batch goes through in pieces: while the second device works on
a piece, the first one has the next. What passes between the servers does not come here.

Prints, among other things::

    the losses are near those of one device in full precision: True
"""

from __future__ import annotations

import sys

try:
    import torch
except ImportError:
    sys.exit("this example needs PyTorch: pip install torch")
from torch import nn

import gpuremote.torch

STEPS = 20
PIECES = 4


def layers() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
    return first, nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(256, 32)
    return x, (x[:, :4].prod(1, keepdim=True) + x[:, 4:5]).tanh()


def train(first: str, second: str, mixed: bool) -> list[float]:
    front, back = layers()
    front, back = front.to(first), back.to(second)
    optimiser = torch.optim.Adam([*front.parameters(), *back.parameters()], lr=3e-3)
    x, y = data()
    inputs = x.to(first).chunk(PIECES)
    targets = y.to(second).chunk(PIECES)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        total = torch.zeros((), device=second)
        for part, target in zip(inputs, targets, strict=True):
            with torch.autocast(first.partition(":")[0], torch.bfloat16, enabled=mixed):
                made = back(front(part).to(second))
            loss = nn.functional.mse_loss(made.float(), target) / PIECES
            loss.backward()
            total += loss.detach()
        optimiser.step()
        losses.append(total)
    return torch.stack(losses).tolist()  # the only wait


def main() -> None:
    torch.set_num_threads(1)
    gpuremote.torch.connect("local://?backend=torch", "local://?backend=torch")
    if torch.get_device_module("remote").device_count() < 2:
        sys.exit("two devices need the part in C++: gpuremote torch build")
    with gpuremote.torch.profile() as found:
        losses = train("remote:0", "remote:1", mixed=True)
    expected = train("cpu", "cpu", mixed=False)
    print("two devices, bfloat16  ", " ".join(f"{loss:.4f}" for loss in losses[::5]))
    print("one device, full       ", " ".join(f"{loss:.4f}" for loss in expected[::5]))
    near = torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=0.05, atol=0.005)
    print("the losses are near those of one device in full precision:", near)
    print(found)
    gpuremote.torch.close()


if __name__ == "__main__":
    main()
