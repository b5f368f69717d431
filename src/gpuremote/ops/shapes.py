"""Shape rules and checked parameters that several groups of ops share.

Nothing here depends on the number of elements, only on the number of axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import AxisError, DTypeError, ShapeError
from gpuremote.ops.meta import DTYPES
from gpuremote.ops.operands import DType, Kind, sample
from gpuremote.ops.spec import Params

__all__ = [
    "bool_param",
    "broadcast",
    "dtype_param",
    "dtypes_of",
    "int_param",
    "is_int",
    "joined_dtype",
    "names_of",
    "normal_axes",
    "normal_axis",
    "number_param",
    "reduced",
    "shape_param",
    "size_of",
    "supported",
]


def broadcast(*shapes: Shape) -> Shape:
    """The shape that NumPy's broadcasting gives.

    Raises
    ------
    ShapeError
        The shapes don't go together.
    """
    first = shapes[0]
    if shapes.count(first) == len(shapes):
        return first
    ndim = max(map(len, shapes))
    out = [1] * ndim
    for shape in shapes:
        for i, length in enumerate(shape, ndim - len(shape)):
            if length != out[i]:
                if out[i] == 1:
                    out[i] = length
                elif length != 1:
                    text = " and ".join(map(str, shapes[:8]))
                    raise ShapeError(f"shapes {text} can't be broadcast together")
    return tuple(out)


def normal_axis(axis: Any, ndim: int) -> int:
    """The axis as a number from 0 to ``ndim - 1``."""
    if axis.__class__ is int and -ndim <= axis < ndim:
        return axis + ndim if axis < 0 else axis
    if not is_int(axis):
        raise ShapeError(f"axis {axis!r} is not an integer")
    if not -ndim <= axis < ndim:
        raise AxisError(f"axis {axis} does not exist: the array has {ndim} axes")
    return int(axis) + ndim if axis < 0 else int(axis)


def normal_axes(axes: Any, ndim: int) -> tuple[int, ...]:
    """Axes (None for all, one, or several) as numbers from 0 to ``ndim - 1``, each once."""
    if axes is None:
        return tuple(range(ndim))
    if is_int(axes):
        return (normal_axis(axes, ndim),)
    if not isinstance(axes, tuple | list):
        raise ShapeError(f"axis {axes!r} is neither an integer nor a tuple of integers")
    found = tuple([normal_axis(axis, ndim) for axis in axes])
    if len(set(found)) != len(found):
        raise ShapeError(f"axis {tuple(axes)} names an axis twice")
    return found


def reduced(shape: Shape, axes: tuple[int, ...], keepdims: bool) -> Shape:
    """What is left of a shape when the given (normal) axes are reduced."""
    if len(axes) == len(shape):
        return (1,) * len(shape) if keepdims else ()
    if keepdims:
        return tuple([1 if i in axes else n for i, n in enumerate(shape)])
    return tuple([n for i, n in enumerate(shape) if i not in axes])


def is_int(value: Any) -> bool:
    """Whether a parameter is an integer (a bool is not)."""
    return value.__class__ is int or (isinstance(value, int) and not isinstance(value, bool))


def int_param(params: Params, name: str, default: int | None = None) -> int:
    """An integer parameter."""
    value = params.get(name, default)
    if value.__class__ is int:
        return value
    if not is_int(value):
        raise ShapeError(f"parameter {name} has to be an integer, not {value!r}")
    return int(value)


def bool_param(params: Params, name: str, default: bool = False) -> bool:
    """A parameter that is true or false."""
    value = params.get(name, default)
    if not isinstance(value, bool):
        raise ShapeError(f"parameter {name} has to be a bool, not {value!r}")
    return value


def number_param(params: Params, name: str, default: float) -> float:
    """A parameter that is an integer or a float."""
    value = params.get(name, default)
    if not is_int(value) and not isinstance(value, float):
        raise ShapeError(f"parameter {name} has to be a number, not {value!r}")
    return float(value) if isinstance(value, float) else int(value)


def dtype_param(params: Params, name: str = "dtype") -> DType | None:
    """A dtype parameter, which travels by its wire name; None where it is not given."""
    value = params.get(name)
    if value is None:
        return None
    found = DTYPES.get(value) if isinstance(value, str) else None
    if found is None:
        raise DTypeError(f"parameter {name} has to be a wire dtype such as 'f4', not {value!r}")
    return found


def shape_param(params: Params, name: str = "shape", lowest: int = 0) -> Shape:
    """A shape parameter: one length, or a tuple of lengths, none below ``lowest``."""
    value = params.get(name)
    lengths = (value,) if is_int(value) else value
    if not isinstance(lengths, tuple | list) or not all(map(is_int, lengths)):
        raise ShapeError(f"parameter {name} has to be a tuple of integers, not {value!r}")
    if any(length < lowest for length in lengths):
        raise ShapeError(f"parameter {name} {tuple(lengths)} has a negative length")
    return tuple(int(length) for length in lengths)


def supported(dtype: DType) -> DType:
    """The same dtype as the object in ``DTYPES``, or DTypeError."""
    found = DTYPES.get(dtype.str.lstrip("<|="))
    if found is None:
        raise DTypeError(f"the result would have dtype {dtype}, which can't live on a device")
    return found


@lru_cache(maxsize=4096, typed=True)
def dtypes_of(
    function: Callable[..., Any], *kinds: Kind, ndim: int = 1, **kwargs: Any
) -> tuple[DType, ...]:
    """Dtypes of what a NumPy function returns for operands of the given kinds.

    Found by running it on arrays of one element with ``ndim`` axes, once per combination.

    Raises
    ------
    DTypeError
        NumPy refuses the dtypes, or the result's dtype may not travel.
    """
    try:
        with np.errstate(all="ignore"):
            found = function(*(sample(kind, ndim) for kind in kinds), **kwargs)
    except (TypeError, ValueError, OverflowError) as error:
        raise DTypeError(f"dtypes {names_of(kinds)} are refused: {error}") from error
    results = found if isinstance(found, tuple) else (found,)
    return tuple(supported(np.asarray(result).dtype) for result in results)


def joined_dtype(*samples: Any) -> Any:
    """For :func:`dtypes_of`: what has the dtype of arrays that are put together."""
    return np.result_type(*samples).type(0)


def names_of(kinds: Iterable[Kind]) -> str:
    """Kinds for an error's text."""
    scalars = {"b": "bool", "i": "int", "I": "int", "f": "float", "c": "complex"}
    return ", ".join(
        scalars.get(kind, kind) if isinstance(kind, str) else str(kind) for kind in kinds
    )


def size_of(shape: Shape) -> int:
    """Number of elements."""
    return math.prod(shape)
