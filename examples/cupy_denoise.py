"""A photograph gets rid of its noise: a Fourier transform on the remote device, where only the
strong frequencies are kept, and a picture of before and after.

    python examples/cupy_denoise.py [PICTURE.png]

Prints, among other things::

    equals NumPy: True
    round trips: 1
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_sample_image

import gpuremote.cupy as cp

NOISE = 40.0
"""Standard deviation of the noise, in steps of grey of 0 to 255."""
TILE, SHIFT = 16, 4
"""Pixels of a tile's side, and from one tile to the next."""
KEEP = 3.0
"""How many times the noise's own strength a frequency must have to be kept."""

Array = npt.NDArray[Any]


def denoise(xp: Any, noisy: Any) -> Any:
    """Each tile without its weak frequencies; every pixel is the mean of the tiles it is in."""
    height, width = noisy.shape
    total, count = xp.zeros_like(noisy), xp.zeros_like(noisy)
    limit = KEEP * NOISE * TILE
    for top in range(0, TILE, SHIFT):
        for left in range(0, TILE, SHIFT):
            rows, columns = (height - top) // TILE, (width - left) // TILE
            part = np.s_[top : top + rows * TILE, left : left + columns * TILE]
            tiles = noisy[part].reshape(rows, TILE, columns, TILE)
            waves = xp.fft.rfft2(tiles, axes=(1, 3))
            strong = xp.abs(waves) > limit
            strong[:, 0, :, 0] = True  # the brightness
            kept = xp.where(strong, waves, 0.0)
            total[part] += xp.fft.irfft2(kept, axes=(1, 3)).reshape(rows * TILE, columns * TILE)
            count[part] += 1.0
    return xp.clip(total / xp.maximum(count, 1.0), 0.0, 255.0)


def main(picture: Path) -> None:
    clean = load_sample_image("flower.jpg").mean(axis=2)[:416, :640]
    noisy = clean + np.random.default_rng(1).normal(scale=NOISE, size=clean.shape)

    before = cp.session().stats().round_trips
    remote = denoise(cp, cp.asarray(noisy))
    found = remote.get()
    trips = (cp.session().stats().round_trips - before).total()

    print(f"an image of {clean.shape[1]} × {clean.shape[0]} pixels")
    print("equals NumPy:", bool(np.allclose(found, denoise(np, noisy), atol=1e-8)))
    print("round trips:", trips)
    print(f"noise: {deviation(noisy, clean):.1f} steps of grey before, ", end="")
    print(f"{deviation(found, clean):.1f} after")
    draw(picture, noisy, found, clean)
    inside = picture.resolve().is_relative_to(Path.cwd())
    print("picture:", os.path.relpath(picture) if inside else picture)
    cp.close()


def deviation(image: Array, clean: Array) -> float:
    inner = np.s_[TILE:-TILE, TILE:-TILE]
    return float(np.sqrt(np.mean((image - clean)[inner] ** 2)))


def draw(path: Path, *images: Array) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = ("with noise", "denoised on the remote device", "as it was")
    figure, axes = plt.subplots(1, 3, figsize=(15, 3.8), layout="constrained")
    for place, image, title in zip(axes, images, titles, strict=True):
        place.imshow(image, cmap="gray", vmin=0, vmax=255)
        place.set_title(title)
        place.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    default = Path(__file__).parent / "output" / "denoised.png"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
