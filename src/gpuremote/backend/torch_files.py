"""Weights that lie on the server: tensors of safetensors files in the folder that its operator
names. A client names files in it and bytes of them, and nothing else.

The format is that of https://github.com/huggingface/safetensors#format: the length of a header
(u64), the header in JSON, and the bytes of the tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch

from gpuremote.errors import IndexOutOfBounds, UnsupportedOp

__all__ = ["Weights"]

MAX_HEADER: Final = 64 << 20
SUFFIX: Final = ".safetensors"


class Weights:
    """The files of a folder.

    Parameters
    ----------
    folder : str
        "": there is none.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder).resolve() if folder else None

    def header(self, device: torch.device, name: str) -> torch.Tensor:
        """The header of a file, as bytes."""
        path = self._path(name)
        return torch.from_numpy(np.fromfile(path, np.uint8, _header(path), offset=8)).to(device)

    def read(self, device: torch.device, name: str, begin: int, nbytes: int) -> torch.Tensor:
        """Bytes of a file's tensors, from ``begin`` on after its header."""
        path = self._path(name)
        start = 8 + _header(path) + begin
        if begin < 0 or nbytes < 0 or start + nbytes > path.stat().st_size:
            raise IndexOutOfBounds(f"{name} has no {nbytes} bytes of tensors from {begin} on")
        return torch.from_numpy(np.fromfile(path, np.uint8, nbytes, offset=start)).to(device)

    def _path(self, name: str) -> Path:
        if self._folder is None:
            raise UnsupportedOp("this server offers no files of weights (serve --weights FOLDER)")
        path = (self._folder / name).resolve()
        # Links are followed first, so none leads out.
        if not path.is_relative_to(self._folder) or path.suffix != SUFFIX or not path.is_file():
            raise UnsupportedOp(f"this server offers no file {name!r} of weights")
        return path


def _header(path: Path) -> int:
    (length,) = np.fromfile(path, "<u8", 1).tolist() or (0,)
    if not 0 < length <= min(MAX_HEADER, path.stat().st_size - 8):
        raise UnsupportedOp(f"{path.name} is no file of weights")
    return int(length)
