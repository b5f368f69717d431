"""A server that lacks what a newer client knows: its calls fail, and nothing else does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from gpuremote.client.issue import apply, inplace
from gpuremote.errors import DTypeError, UnsupportedOp
from gpuremote.ops.catalogue import CATALOGUE
from gpuremote.ops.spec import OpSpec
from tests.faults.sides import Side


def newer(name: str, **changes: Any) -> OpSpec:
    """An op that the server's catalogue does not have under this name."""
    return dataclasses.replace(CATALOGUE[name], name=f"{name}_of_tomorrow", **changes)


def test_an_op_that_the_server_does_not_know(side: Side, session: Any, device: Any) -> None:
    x = device.arange(3) + 1
    (y,) = apply(newer("add"), (x, x))
    (w,) = apply(newer("multiply"), (x, np.complex128(2j)))
    z = y * 2
    for array in (y, z, w):
        with pytest.raises(UnsupportedOp, match="of_tomorrow"):
            side.do(array.get())
    (again,) = apply(newer("add"), (x, x))
    with pytest.raises(UnsupportedOp):
        side.do(again.get())
    assert side.do((x + x).tolist()) == [2, 4, 6]
    side.do(session.synchronize())  # every failure has been raised where it was waited for


def test_an_op_in_place_that_the_server_does_not_know(side: Side, device: Any) -> None:
    """What it should have written to can't be relied on."""
    x, other = device.arange(3) + 1, device.ones(3)
    name = next(n for n, spec in CATALOGUE.items() if spec.inplace and not spec.indexed)
    inplace(newer(name), x, 2)
    with pytest.raises(UnsupportedOp):
        side.do(x.get())
    assert side.do(other.tolist()) == [1, 1, 1]


def test_a_server_that_promotes_differently(side: Side, device: Any) -> None:
    """The client expects another dtype than the server's NumPy gives."""
    spec = CATALOGUE["add"]

    def infer(operands: Any, params: Any) -> Any:
        return [(shape, np.dtype("f4")) for shape, _ in spec.infer(operands, params)]

    x = device.arange(3) + 0.5
    (y,) = apply(dataclasses.replace(spec, infer=infer), (x, x))
    with pytest.raises(DTypeError, match="same version of NumPy"):
        side.do(y.get())
    assert side.do(x.tolist()) == [0.5, 1.5, 2.5]
