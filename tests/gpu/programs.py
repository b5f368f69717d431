"""Programs that run on the card from a process of its own, and by way of a server.

With `gpuremote.torch` in a process torch's accelerator is `remote`, and a backward on CUDA tensors
fails there (torch has one accelerator in a process). So what they should give is computed in a
process without it: nothing here imports gpuremote.
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final, TypeAlias

import torch
from torch import nn

__all__ = ["PROGRAMS", "Here", "seeded"]

Tensor = torch.Tensor
F: Final = nn.functional
Wrap: TypeAlias = Callable[[Any], Any]
"""What a program puts around its step: compilation, capturing, or nothing."""
SEED: Final = 17


def _as_it_is(step: Any) -> Any:
    return step


class Picture(nn.Module):
    """Convolutions, batch norm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, stride=2, groups=2),
            nn.GroupNorm(4, 32),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Words(nn.Module):
    """An embedding, a transformer layer with dropout, a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.rnn = nn.LSTM(32, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Any:
        found = self.layer(self.words(x))
        # A server is asked for torch's own cells; those of cuDNN round to less.
        with torch.backends.cudnn.flags(enabled=False):
            found = self.rnn(found)[0]
        return self.head(found[:, -1])


def train(place: str, wrap: Wrap, kind: str, lower: str) -> list[Tensor]:
    """Losses and parameters of some steps."""
    model: Any = Picture() if kind == "picture" else Words()
    data = torch.randn(8, 3, 20, 20) if kind == "picture" else torch.randint(50, (8, 12))
    target = torch.randint(10, (8,))
    model.to(place)
    data, target = data.to(place), target.to(place)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(4):
        optimiser.zero_grad()
        with torch.autocast(place, getattr(torch, lower or "half"), enabled=bool(lower)):
            loss = F.cross_entropy(model(data), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        found.append(loss.detach().float())
    model.eval()
    return [*found, *(p.detach() for p in model.parameters()), model(data).detach()]


def scale(place: str, wrap: Wrap) -> list[Tensor]:
    """Gradients that are scaled, in float16."""
    model = nn.Linear(20, 5).to(place)
    data = torch.randn(7, 20).to(place)
    optimiser, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler(place)
    for _ in range(3):
        optimiser.zero_grad()
        with torch.autocast(place, torch.float16):
            loss = model(data).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
    return [model.weight.detach()]


def attend(place: str, wrap: Wrap, way: str, dtype: str) -> list[Tensor]:
    """Attention and its gradients."""
    shape, kind = (2, 8, 128, 64), getattr(torch, dtype)
    q, k, v = (torch.randn(shape).to(kind).to(place).requires_grad_() for _ in range(3))
    mask = torch.rand(128, 128).gt(0.3).to(place) if way == "mask" else None
    keys, values = (k[:, :2], v[:, :2]) if way == "grouped" else (k, v)
    made = F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=mask,
        dropout_p=0.2 if way == "dropout" else 0.0,
        is_causal=way == "causal",
        enable_gqa=way == "grouped",
    )
    wanted = torch.randn(shape).to(kind).to(place)
    return [made.detach(), *torch.autograd.grad(made, [q, k, v], wanted)]


def repeat(place: str, wrap: Wrap) -> list[Tensor]:
    """Losses of a step that may be one record."""
    model = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True).to(place)
    data = torch.randn(4, 10, 32).to(place)
    optimiser = torch.optim.AdamW(model.parameters(), capturable=True)

    def step(x: Tensor) -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimiser.step()
        return loss

    call = wrap(step)
    return [torch.stack([call(data).detach() for _ in range(8)])]


def fit(place: str, wrap: Wrap) -> list[Tensor]:
    """Losses with a model that may be compiled."""
    model = nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 3))
    model.to(place)
    data = torch.randn(16, 30).to(place)
    call = wrap(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = call(data).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return [torch.stack(losses)]


PROGRAMS: Final[dict[str, Callable[..., list[Tensor]]]] = {
    "train": train,
    "scale": scale,
    "attend": attend,
    "repeat": repeat,
    "fit": fit,
}


def seeded(name: str, place: str, *arguments: str, wrap: Wrap = _as_it_is) -> list[Tensor]:
    """What a program gives, on the host."""
    torch.manual_seed(SEED)
    return [tensor.cpu() for tensor in PROGRAMS[name](place, wrap, *arguments)]


class Here:
    """A process with the card, and without gpuremote."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, name: str, *arguments: str) -> list[Tensor]:
        self._pipe.send((name, arguments))
        failed = self._pipe.recv()
        if failed:
            raise RuntimeError(f"without gpuremote: {failed}")
        found: list[Tensor] = torch.load(io.BytesIO(self._pipe.recv_bytes()))
        return found

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)


def _serve(pipe: Connection[Any, Any]) -> None:
    try:
        while True:
            name, arguments = pipe.recv()
            found = io.BytesIO()
            try:
                torch.save(seeded(name, "cuda", *arguments), found)
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")
            else:
                pipe.send("")
                pipe.send_bytes(found.getvalue())
    except EOFError:
        pass
