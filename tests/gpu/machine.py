"""What this machine has of a GPU: found out by asking for it."""

from __future__ import annotations

import functools
import importlib.util

from gpuremote.memory.cuda import CudaError, cuda_driver

__all__ = ["no_cupy", "no_driver", "no_torch"]


@functools.cache
def no_driver() -> str:
    """Why there is no CUDA device; empty if there is one."""
    try:
        return "" if cuda_driver().devices() else "the CUDA driver finds no device"
    except CudaError as error:
        return str(error)


@functools.cache
def no_cupy() -> str:
    """Why CuPy can't be used; empty if it can."""
    if importlib.util.find_spec("cupy") is None:
        return no_driver() or "CuPy is not installed"
    return no_driver()


@functools.cache
def no_torch() -> str:
    """Why torch can't use a CUDA device; empty if it can."""
    if reason := no_driver():
        return reason
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} is built without CUDA"
