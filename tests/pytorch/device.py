"""A remote device for the tests: a server of its own, and what it held at the end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import gpuremote.torch
from gpuremote.torch import _homes

__all__ = ["remote_device"]


@contextmanager
def remote_device(options: str = "") -> Iterator[torch.device]:
    """``remote:0`` on a server that is started for this."""
    gpuremote.torch.connect(f"local://?backend=torch{options}")
    try:
        _homes.home(0)
        yield torch.device("remote", 0)
        gc.collect()
        for home in _homes.opened():
            home.session.synchronize()
    finally:
        gpuremote.torch.close()
