"""Random numbers: draws from the distributions that others are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.operands import DType, Operand, default_dtype, kind_of, shape_of
from gpuremote.ops.shapes import broadcast, dtype_param, shape_param
from gpuremote.ops.spec import Inferred, OpSpec, Params

__all__ = ["DRAWS", "SPECS", "Draw"]

_FLOAT: Final = np.dtype(np.float64)
_INT: Final = np.dtype(np.int64)


class Draw(NamedTuple):
    """What one of the distributions takes and gives.

    Attributes
    ----------
    takes : str
        A letter for each parameter: ``f`` a number, ``i`` an integer.
    dtypes : tuple of dtype
        Of the numbers drawn; the first by default.
    """

    takes: str
    dtypes: tuple[DType, ...]


_FLOATS: Final = (_FLOAT, np.dtype(np.float32))
_INTEGERS: Final = (_INT, *(np.dtype(code) for code in "bBhHiILQq"))

DRAWS: Final[dict[str, Draw]] = {
    "random": Draw("", _FLOATS),
    "standard_normal": Draw("", _FLOATS),
    "standard_exponential": Draw("", _FLOATS),
    "standard_gamma": Draw("f", _FLOATS),
    "beta": Draw("ff", (_FLOAT,)),
    "vonmises": Draw("ff", (_FLOAT,)),
    "integers": Draw("ii", _INTEGERS),  # both bounds included
    "binomial": Draw("if", (_INT,)),
    "geometric": Draw("f", (_INT,)),
    "hypergeometric": Draw("iii", (_INT,)),
    "logseries": Draw("f", (_INT,)),
    "poisson": Draw("f", (_INT,)),
    "zipf": Draw("f", (_INT,)),
}
"""By name. Everything else is made from these, so that every backend has it."""


def _draw(operands: Sequence[Operand], params: Params) -> Inferred:
    method = params.get("method")
    draw = DRAWS.get(method) if isinstance(method, str) else None
    if draw is None:
        raise ShapeError(f"no distribution {method!r} to draw from")
    if len(operands) != 1 + len(draw.takes):
        raise ShapeError(f"{method} takes a seed and {len(draw.takes)} parameters")
    if operands[0] not in ("i", "I"):
        raise DTypeError("the seed has to be an integer")
    for position, (kind, operand) in enumerate(zip(draw.takes, operands[1:], strict=True)):
        _check_parameter(f"parameter {position} of {method}", kind, operand)
    shape = shape_param(params)
    if draw.takes and broadcast(shape, *map(shape_of, operands[1:])) != shape:
        parts = " and ".join(str(shape_of(operand)) for operand in operands[1:])
        raise ShapeError(f"parameters of shape {parts} for numbers of shape {shape}")
    dtype = dtype_param(params) or draw.dtypes[0]
    if dtype not in draw.dtypes:
        raise DTypeError(f"{method} gives {', '.join(map(str, draw.dtypes))}, not {dtype}")
    return ((shape, dtype),)


def _check_parameter(name: str, kind: str, operand: Operand) -> None:
    given = default_dtype(kind_of(operand))
    if given.kind not in ("iub" if kind == "i" else "iubf"):
        raise DTypeError(f"{name} has to be {_KINDS[kind]}, not {given}")


_KINDS: Final = {"i": "an integer", "f": "a real number"}

SPECS: list[OpSpec] = [
    OpSpec("random_draw", _draw, params=frozenset(["method", "shape", "dtype"])),
]
