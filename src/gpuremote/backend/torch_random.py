"""The generators of a session's devices: the one that each has, and those that the client makes.

A process serves one session, so they are kept here by device and number; 0 is the device's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from gpuremote.errors import LimitExceeded

__all__ = ["OWN", "generator"]

MOST: Final = 4096
"""Generators of a process."""
_made: dict[tuple[torch.device, int], torch.Generator] = {}


def generator(device: torch.device, number: int) -> torch.Generator:
    """The generator of a number; made where it is named first."""
    key = (device, number)
    found = _made.get(key)
    if found is None:
        if len(_made) >= MOST:
            raise LimitExceeded(f"this session has {MOST} generators already: drop some")
        found = _made[key] = torch.Generator(device) if number else _own(device)
    return found


def _own(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    found: torch.Generator = torch.get_device_module(device).default_generators[device.index or 0]
    return found


def _manual_seed(device: torch.device, number: int, seed: int) -> None:
    generator(device, number).manual_seed(seed)


def _get_rng_state(device: torch.device, number: int) -> torch.Tensor:
    return generator(device, number).get_state()


def _set_rng_state(device: torch.device, state: torch.Tensor, number: int) -> None:
    generator(device, number).set_state(state.cpu())


def _drop_generator(device: torch.device, number: int) -> None:
    _made.pop((device, number), None)


OWN: Final[dict[str, Callable[..., Any]]] = {
    "gpuremote::manual_seed": _manual_seed,
    "gpuremote::get_rng_state": _get_rng_state,
    "gpuremote::set_rng_state": _set_rng_state,
    "gpuremote::drop_generator": _drop_generator,
}
"""What is no op of torch's, and has to come in turn with those; each takes the device first."""
