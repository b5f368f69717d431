"""Fourier transforms: NumPy's and CuPy's names and arguments."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpuremote.cupy._array import axis_of, integers, ndarray, several, single, store
from gpuremote.cupy._creation import arange, array_of
from gpuremote.errors import DTypeError

__all__ = [
    "config",
    "fft",
    "fft2",
    "fftfreq",
    "fftn",
    "fftshift",
    "hfft",
    "ifft",
    "ifft2",
    "ifftn",
    "ifftshift",
    "ihfft",
    "irfft",
    "irfft2",
    "irfftn",
    "rfft",
    "rfft2",
    "rfftfreq",
    "rfftn",
]


config: Final = SimpleNamespace(enable_nd_planning=True, use_multi_gpus=False)
"""What CuPy's programs set: plans are the server's business, so it changes nothing."""


def _along(name: str, a: Any, n: Any, axis: int, norm: Any, out: Any) -> ndarray:
    points = None if n is None else operator.index(n)
    return single(
        f"fft.{name}", array_of(a), n=points, axis=operator.index(axis), norm=norm, out=out
    )


def fft(a: Any, n: int | None = None, axis: int = -1, norm: Any = None, out: Any = None) -> ndarray:
    """As ``numpy.fft.fft``."""
    return _along("fft", a, n, axis, norm, out)


def ifft(
    a: Any, n: int | None = None, axis: int = -1, norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.ifft``."""
    return _along("ifft", a, n, axis, norm, out)


def rfft(
    a: Any, n: int | None = None, axis: int = -1, norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.rfft``: of real values, the half of the spectrum that says it all."""
    return _along("rfft", a, n, axis, norm, out)


def irfft(
    a: Any, n: int | None = None, axis: int = -1, norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.irfft``; by default to an even number of points."""
    return _along("irfft", a, n, axis, norm, out)


def hfft(
    a: Any, n: int | None = None, axis: int = -1, norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.hfft``: of half a signal whose other half mirrors it."""
    return _along("hfft", a, n, axis, norm, out)


def ihfft(
    a: Any, n: int | None = None, axis: int = -1, norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.ihfft``."""
    return _along("ihfft", a, n, axis, norm, out)


def _several(name: str, a: Any, s: Any, axes: Any, norm: Any, out: Any) -> ndarray:
    x = array_of(a)
    places, lengths = _places(x, integers(s), integers(axes), name == "irfftn")
    if not places and name not in ("rfftn", "irfftn"):
        return x if out is None else store(x, out)
    if len(set(places)) == len(places):
        return single(f"fft.{name}", x, s=lengths, axes=places, norm=norm, out=out)
    steps = [(name[:-1], n, axis) for n, axis in zip(lengths, places, strict=True)]
    whole = "ifft" if name in ("ifftn", "irfftn") else "fft"
    steps[:-1] = [(whole, n, axis) for _, n, axis in steps[:-1]]
    for step, n, axis in steps if name == "irfftn" else reversed(steps):
        x = single(f"fft.{step}", x, n=n, axis=axis, norm=norm)
    return x if out is None else store(x, out)


def _places(
    x: ndarray, s: Any, axes: Any, doubled: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Each axis to transform along, from 0 up, with its number of points."""
    if axes is None:
        axes = range(x.ndim) if s is None else range(-len(s), 0)
    places = tuple(axis_of(axis, x.ndim) for axis in axes)
    if s is None:
        lengths = [x.shape[axis] for axis in places]
        if doubled and lengths:
            lengths[-1] = 2 * (lengths[-1] - 1)
    elif len(s) != len(places):
        raise ValueError(f"{len(s)} numbers of points for {len(places)} axes")
    else:
        lengths = [x.shape[axis] if n == -1 else n for n, axis in zip(s, places, strict=True)]
    return places, tuple(lengths)


def fftn(a: Any, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> ndarray:
    """As ``numpy.fft.fftn``."""
    return _several("fftn", a, s, axes, norm, out)


def ifftn(a: Any, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> ndarray:
    """As ``numpy.fft.ifftn``."""
    return _several("ifftn", a, s, axes, norm, out)


def rfftn(a: Any, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> ndarray:
    """As ``numpy.fft.rfftn``."""
    return _several("rfftn", a, s, axes, norm, out)


def irfftn(a: Any, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> ndarray:
    """As ``numpy.fft.irfftn``."""
    return _several("irfftn", a, s, axes, norm, out)


def fft2(a: Any, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None) -> ndarray:
    """As ``numpy.fft.fft2``."""
    return _several("fftn", a, s, axes, norm, out)


def ifft2(
    a: Any, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.ifft2``."""
    return _several("ifftn", a, s, axes, norm, out)


def rfft2(
    a: Any, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.rfft2``."""
    return _several("rfftn", a, s, axes, norm, out)


def irfft2(
    a: Any, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None
) -> ndarray:
    """As ``numpy.fft.irfft2``."""
    return _several("irfftn", a, s, axes, norm, out)


# -- frequencies --------------------------------------------------------------------------------


def _scaled(numbers: ndarray, n: int, d: Any, dtype: npt.DTypeLike | None) -> Any:
    found: ndarray = numbers * (1.0 / (n * d))
    if dtype is None:
        return found
    kind = np.dtype(dtype)
    if kind.kind != "f":
        raise DTypeError(f"frequencies are real floats, not {kind}")
    return found.astype(kind, copy=False)


def fftfreq(n: int, d: Any = 1.0, *, dtype: npt.DTypeLike | None = None, device: Any = None) -> Any:
    """The frequencies of a transform of ``n`` points that are ``d`` apart."""
    n = operator.index(n)
    low = arange(0, (n - 1) // 2 + 1, device=device)
    high = arange(-(n // 2), 0, device=device)
    return _scaled(several("concat", (low, high), axis=0)[0], n, d, dtype)


def rfftfreq(
    n: int, d: Any = 1.0, *, dtype: npt.DTypeLike | None = None, device: Any = None
) -> Any:
    """The frequencies of a transform of ``n`` real values that are ``d`` apart."""
    n = operator.index(n)
    return _scaled(arange(0, n // 2 + 1, device=device), n, d, dtype)


def _shifted(x: ndarray, axes: Any, forward: bool) -> ndarray:
    named = integers(axes)
    places: Sequence[int] = (
        range(x.ndim) if named is None else (named,) if isinstance(named, int) else named
    )
    halves = [x.shape[axis_of(axis, x.ndim)] // 2 for axis in places]
    shifts = tuple(n if forward else -n for n in halves)
    return single("roll", x, shift=shifts, axis=tuple(places))


def fftshift(x: Any, axes: Any = None) -> ndarray:
    """Move the frequency zero to the middle."""
    return _shifted(array_of(x), axes, True)


def ifftshift(x: Any, axes: Any = None) -> ndarray:
    """Move the frequency zero back to the front."""
    return _shifted(array_of(x), axes, False)
