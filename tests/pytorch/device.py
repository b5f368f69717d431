"""A remote device for the tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import gpuremote.torch
from gpuremote.torch import _homes

__all__ = ["remote_device"]


@contextmanager
def remote_device(url: str) -> Iterator[torch.device]:
    """``remote:0`` of a server, and what goes wrong last."""
    gpuremote.torch.connect(url)
    try:
        _homes.home(0)
        yield torch.device("remote", 0)
        gc.collect()
        for home in _homes.opened():
            home.session.synchronize()
    finally:
        gpuremote.torch.close()
