"""The op catalogue: everything that may run on a device. What is not here can't be asked for."""

from __future__ import annotations

from gpuremote.errors import UnsupportedOp
from gpuremote.ops import (
    client_kernels,
    counting,
    creation,
    fft,
    functions,
    linalg,
    manipulation,
    products,
    random,
    reductions,
    selection,
    ufuncs,
)
from gpuremote.ops.spec import VARIES, OpSpec, table

__all__ = ["CATALOGUE", "VARIES", "OpSpec", "find"]

CATALOGUE: dict[str, OpSpec] = table(
    spec
    for group in (
        ufuncs,
        reductions,
        linalg,
        manipulation,
        creation,
        selection,
        functions,
        counting,
        products,
        fft,
        random,
        client_kernels,
    )
    for spec in group.SPECS
)
"""Every op by name."""


def find(name: str) -> OpSpec:
    """The op of a name.

    Raises
    ------
    UnsupportedOp
        There is none.
    """
    try:
        return CATALOGUE[name]
    except KeyError:
        raise UnsupportedOp(f"no op named {name[:64]!r} in the catalogue", op=name[:64]) from None
