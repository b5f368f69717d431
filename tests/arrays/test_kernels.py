"""Kernels that programs bring, as the program sees them on a server that runs none (NumPy's)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, ImplicitTransfer, ShapeError, UnsupportedOp


def test_kernels_of_the_program_on_a_server_that_does_not_run_them(xp: Any) -> None:
    """What they would have written to can't be relied on; all else goes on."""
    x, y, other = xp.ones(4), xp.ones(4), xp.ones(4)
    xp.RawKernel("...", "f")((1,), (4,), (x, y, np.float32(2)))
    for array in (x, y):
        with pytest.raises(UnsupportedOp, match="--backend cupy --allow-kernels"):
            array.get()
    double = xp.ElementwiseKernel("T x", "T y", "y = 2 * x", "double_it")
    made = double(other)
    assert (made.shape, made.dtype) == ((4,), other.dtype)
    with pytest.raises(UnsupportedOp):
        made.get()
    total = xp.ReductionKernel("T x", "T y", "x", "a + b", "y = a", "0")
    assert total(xp.ones((2, 3)), axis=1).shape == (2,)
    assert other.get().tolist() == [1, 1, 1, 1]


def test_kernels_refused_where_they_are_called(xp: Any) -> None:
    x = xp.ones(4)
    double = xp.ElementwiseKernel("float32 x", "float32 y", "y = 2 * x", "double_it")
    assert (double.nin, double.nout, double.nargs) == (1, 1, 2)
    with pytest.raises(DTypeError, match="parameter x is float32, and the array float64"):
        double(x)
    with pytest.raises(ShapeError, match="double_it takes 1 arguments, or 2 with its results"):
        double(x, x, x)
    with pytest.raises(ImplicitTransfer):
        double(np.ones(4, "f4"))
    kernel = xp.RawModule(code="...").get_function("f")
    for wrong in ("my kernel", "f" * 70):
        with pytest.raises(ShapeError, match="can't be named"):
            xp.RawKernel("...", wrong)(1, 1, (x,))
    with pytest.raises(ShapeError, match="300000 characters"):
        xp.RawKernel("x" * 300_000, "f")(1, 1, (x,))
    with pytest.raises(ShapeError, match="block has to be one to three integers"):
        kernel(1, 4096, (x,))
    with pytest.raises(DTypeError, match="has to be integers"):
        kernel(x, 1, (x,))
    with pytest.raises(ValueError, match="nvrtc"):
        xp.RawKernel("...", "f", backend="nvcc")
    with pytest.raises(NotImplementedError, match="jitify"):
        xp.RawKernel("...", "f", jitify=True)
    assert x.get().tolist() == [1, 1, 1, 1]
