"""The random numbers of remote devices: their generators are on the server, and are seeded in turn
with the ops."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import torch

from gpuremote.torch import _homes
from gpuremote.torch._homes import Home
from gpuremote.torch._inference import view_of
from gpuremote.torch._own import UNKNOWN, issue_own
from gpuremote.torch._storages import form_of, handle_of, make_tensor
from gpuremote.torch._transfers import download, upload
from gpuremote.wire.batch import Op

__all__ = ["get_state", "seed", "seed_one", "serve_generator", "set_state"]

_MASK: Final = (1 << 63) - 1
_later: list[int] = []
_dropped: deque[tuple[Home, int]] = deque()
"""Generators that have ended; a finaliser only appends."""


def seed(number: int) -> None:
    """Seed the generator of every remote device, those too that are connected to later."""
    _later[:] = [number]
    for place in _homes.opened():
        _seed(place, 0, number)


def seed_one(place: Home, number: int) -> None:
    """Seed the generator of one device."""
    _seed(place, 0, number)


def _seed(place: Home, generator: int, number: int) -> None:
    # As torch.manual_seed takes them: the same 64 bits.
    signed = (number & _MASK) - (number & (1 << 63))
    issue_own(place, "gpuremote::manual_seed", ("i", "i"), (generator, signed))


def get_state(place: Home, generator: int = 0) -> torch.Tensor:
    """The generator's state, as a tensor of bytes on the host; waits for it."""
    number = issue_own(place, "gpuremote::get_rng_state", ("i",), (generator,), size=UNKNOWN)
    core = place.core
    (length,), _ = core.wait(core.ask(Op.META, number, kind="shape"))
    state = make_tensor(place, number, form_of(torch.uint8, (length,), (1,), 0, length))
    return download(state)


def set_state(place: Home, state: torch.Tensor, generator: int = 0) -> None:
    """Bring the generator to a state of :func:`get_state`."""
    there = upload(place, state)
    view = view_of(there, place.views)
    values = (handle_of(there).number, generator)
    issue_own(place, "gpuremote::set_rng_state", (view, "i"), values)


def serve_generator(action: str, index: int, generator: int, value: Any) -> Any:
    """What a ``torch.Generator`` of a remote device is asked: ``seed``, ``get``, ``set`` or
    ``drop``."""
    if action == "drop":
        places = _homes.opened()
        if index < len(places):
            _dropped.append((places[index], generator))
        return None
    place = _homes.home(index)
    while _dropped:
        other, number = _dropped.popleft()
        if other in _homes.opened():
            issue_own(other, "gpuremote::drop_generator", ("i",), (number,))
    if action == "seed":
        return _seed(place, generator, value)
    if action == "get":
        return get_state(place, generator).numpy().tobytes()
    return set_state(place, torch.frombuffer(bytearray(value), dtype=torch.uint8), generator)


def _start(place: Home) -> None:
    if _later:
        _seed(place, 0, _later[0])


_homes.on_open.append(_start)
