"""Storages that are found again: an anchor stays with a storage, whatever handle it has."""

from __future__ import annotations

from typing import Any, TypeAlias

from gpuremote.client.core import Core
from gpuremote.torch._homes import opened
from gpuremote.torch._storages import HELD, give_back
from gpuremote.torch._tier import native

__all__ = ["Anchor", "anchors", "number_at", "rebind"]

Anchor: TypeAlias = Any
"""What finds a storage as long as it lives, and does not keep it."""


def anchors(core: Core) -> dict[int, Anchor]:
    """Of every storage of a session's devices that lives, by its handle."""
    if native is not None:
        found: dict[int, Anchor] = {}
        for home in opened():
            if home.core is core:
                found |= native.anchors(home)
        return found
    return {held.number: held for held in list(HELD.values()) if held.home.core is core}


def number_at(anchor: Anchor) -> int | None:
    """The handle that the storage has now; None: it has ended."""
    if native is not None:
        number: int | None = native.number_at(anchor)
        return number
    return anchor.number if HELD.get(anchor.name) is anchor else None


def rebind(anchor: Anchor, number: int) -> bool:
    """Give the storage another handle, and its old one back; False: it has ended."""
    if native is not None:
        return bool(native.rebind(anchor, number))
    if HELD.get(anchor.name) is not anchor:
        return False
    give_back(anchor)
    anchor.number = number
    return True
