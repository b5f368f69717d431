"""Fourier transforms: functions that a namespace like NumPy's has in ``fft``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import ShapeError
from gpuremote.ops.functions import exactly, function
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import Operand, array_operand
from gpuremote.ops.shapes import dtypes_of, int_param, normal_axes, normal_axis, shape_param
from gpuremote.ops.spec import Infer, Inferred, OpSpec, Params

__all__ = ["SPECS"]

# To the half of a spectrum that says it all of real values, and back.
_HALVED = ("rfft", "ihfft", "rfftn")
_DOUBLED = ("irfft", "hfft")


def _norm(params: Params) -> None:
    if params.get("norm") not in (None, "backward", "ortho", "forward"):
        raise ShapeError(f"parameter norm is backward, ortho or forward, not {params['norm']!r}")


def _nonempty(x: Meta, axis: int) -> None:
    """Half a spectrum has its first element: NumPy's transform reads it, there or not."""
    if not x.shape[axis]:
        raise ShapeError(f"shape {x.shape} has no elements along axis {axis}")


def _along(name: str) -> Infer:
    """A transform along one axis."""
    of: Callable[..., Any] = getattr(np.fft, name)

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 1)
        _norm(params)
        x = array_operand(operands)
        at = normal_axis(params.get("axis", -1), x.ndim)
        if name in _DOUBLED:
            _nonempty(x, at)
        if params.get("n") is None:
            n = 2 * (x.shape[at] - 1) if name in _DOUBLED else x.shape[at]
        else:
            n = int_param(params, "n")
        if n < 1:
            raise ShapeError(f"a transform of {n} points")
        length = n // 2 + 1 if name in _HALVED else n
        # Two points, as the transforms back to real values can't have one by themselves.
        (dtype,) = dtypes_of(of, x.dtype, n=2)
        return (((*x.shape[:at], length, *x.shape[at + 1 :]), dtype),)

    return infer


def _along_several(name: str) -> Infer:
    """A transform along several axes, each of them and its number of points named."""
    of: Callable[..., Any] = getattr(np.fft, name)

    def infer(operands: Sequence[Operand], params: Params) -> Inferred:
        exactly(operands, 1)
        _norm(params)
        x = array_operand(operands)
        axes, lengths = params.get("axes"), shape_param(params, "s", 1)
        if axes is None:
            raise ShapeError("parameter axes is missing")
        places = normal_axes(axes, x.ndim)
        if not places or len(places) != len(lengths):
            raise ShapeError(f"numbers of points {lengths} along axes {places}")
        if name == "irfftn":
            _nonempty(x, places[-1])
        shape = _placed(x.shape, places, lengths)
        if name in _HALVED:
            shape = _placed(shape, places[-1:], (lengths[-1] // 2 + 1,))
        # Of two axes what comes out of the first is no longer of the operand's dtype.
        ndim = min(len(places), 2)
        (dtype,) = dtypes_of(of, x.dtype, ndim=ndim, s=(2,) * ndim, axes=tuple(range(ndim)))
        return ((shape, dtype),)

    return infer


def _placed(shape: Shape, axes: Sequence[int], lengths: Sequence[int]) -> Shape:
    found = list(shape)
    for axis, length in zip(axes, lengths, strict=True):
        found[axis] = length
    return tuple(found)


SPECS: list[OpSpec] = [
    *(
        function(f"fft.{name}", _along(name), "n", "axis", "norm")
        for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
    ),
    *(
        function(f"fft.{name}", _along_several(name), "s", "axes", "norm")
        for name in ("fftn", "ifftn", "rfftn", "irfftn")
    ),
]
