"""Counting in bins, and sums of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpuremote.cupy._array import ndarray, several, single
from gpuremote.cupy._creation import array_of, asarray, operand
from gpuremote.cupy._statistics import flag, plain
from gpuremote.errors import ShapeError, UnsupportedOp

__all__ = [
    "bincount",
    "convolve",
    "correlate",
    "digitize",
    "histogram",
    "histogram2d",
    "histogramdd",
    "interp",
]


def bincount(x: Any, weights: Any = None, minlength: int = 0) -> ndarray:
    """How often each number comes; waits for the largest."""
    values = array_of(x)
    if values.ndim != 1:
        raise ShapeError(f"shape {values.shape}: one axis is needed", op="bincount")
    most = int(values.max()) + 1 if values.size else 0
    length = minlength if minlength > most else most
    if weights is None:
        return single("bincount", values, minlength=length)
    return several("bincount", (values, array_of(weights)), minlength=length, given=("weights",))[0]


def histogram(
    x: Any, bins: Any = 10, range: Any = None, weights: Any = None, density: bool = False
) -> tuple[ndarray, ndarray]:
    """Counts in bins, and the edges of these. Nothing is waited for."""
    if isinstance(bins, str):
        raise UnsupportedOp("bins by a rule: name their number, or their edges", op="histogram")
    operands, given = [array_of(x)], []
    params: dict[str, Any] = {"density": flag(density)}
    if isinstance(bins, ndarray) and not bins.ndim:
        bins = int(bins)
    if isinstance(bins, int | np.integer):
        params["bins"] = int(bins)
        if range is not None:
            params["range"] = tuple(map(float, range))
    else:
        operands.append(asarray(bins))
        given.append("bins")
    if weights is not None:
        operands.append(array_of(weights))
        given.append("weights")
    counts, edges = several("histogram", operands, given=tuple(given) or None, **params)
    return counts, edges


def histogramdd(
    sample: Any, bins: Any = 10, range: Any = None, weights: Any = None, density: bool = False
) -> tuple[ndarray, list[ndarray]]:
    x = (
        several("stack", [array_of(c).ravel() for c in sample], axis=1)[0]
        if isinstance(sample, list | tuple)
        else array_of(sample)
    )
    if x.ndim == 1:
        x = x.reshape(-1, 1)
    numbers = (bins,) * x.shape[1] if isinstance(bins, int) else tuple(bins)
    if not _all_ints(numbers):
        raise UnsupportedOp("histogramdd takes numbers of bins, not edges", op="histogramdd")
    params: dict[str, Any] = {"bins": numbers, "density": flag(density)}
    if range is not None:
        params["range"] = tuple(None if r is None else tuple(map(float, r)) for r in range)
    operands = [x] if weights is None else [x, array_of(weights)]
    given = None if weights is None else ("weights",)
    counts, *edges = several("histogramdd", operands, given=given, **params)
    return counts, edges


def _all_ints(values: Sequence[Any]) -> bool:
    return not [v for v in values if not isinstance(v, int | np.integer)]


def histogram2d(
    x: Any,
    y: Any,
    bins: Any = 10,
    range: Any = None,
    weights: Any = None,
    density: bool = False,
) -> tuple[ndarray, ndarray, ndarray]:
    counts, (first, second) = histogramdd([x, y], bins, range, weights, density)
    return counts, first, second


def digitize(x: Any, bins: Any, right: bool = False) -> ndarray:
    """The bin of each element, of edges that grow (or shrink: waits to see which)."""
    values, edges = array_of(x), array_of(bins)
    side = "left" if right else "right"
    if edges.size < 2 or bool(edges[0] <= edges[-1]):
        return single("searchsorted", edges, values, side=side)
    return edges.size - single("searchsorted", edges[::-1], values, side=side)


def interp(
    x: Any, xp: Any, fp: Any, left: Any = None, right: Any = None, period: Any = None
) -> ndarray:
    points = operand(x)
    return single(
        "interp",
        points,
        array_of(xp),
        array_of(fp),
        left=plain(left),
        right=plain(right),
        period=plain(period),
    )


def convolve(a: Any, v: Any, mode: str = "full") -> ndarray:
    return single("convolve", array_of(a), array_of(v), mode=mode)


def correlate(a: Any, v: Any, mode: str = "valid") -> ndarray:
    return single("correlate", array_of(a), array_of(v), mode=mode)
