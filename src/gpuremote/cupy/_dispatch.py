"""NumPy's functions called with arrays of this namespace (NEP 13 and 18): ``np.add(x, 1)``,
``np.concatenate([x, y])``. Each is the function of this namespace of the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpuremote.cupy._array import FUNCTIONS
from gpuremote.cupy._elementwise import UFUNCS, ufunc
from gpuremote.errors import UnsupportedOp

__all__ = ["array_function", "array_ufunc", "learn"]

_METHODS = frozenset({"__call__", "reduce", "accumulate", "outer", "at"})
_functions: dict[Callable[..., Any], Callable[..., Any]] = {}


def learn(numpy: Any, names: Mapping[str, Any]) -> None:
    """The functions of a namespace of NumPy's that those in ``names`` stand for."""
    for name, ours in names.items():
        theirs = getattr(numpy, name, None)
        if callable(theirs) and callable(ours) and not isinstance(theirs, type | np.ufunc):
            _functions[theirs] = ours


def array_ufunc(
    function: np.ufunc, method: str, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    name = function.__name__
    found: Any = UFUNCS.get(name)
    if found is None and method == "__call__":
        found = FUNCTIONS.get(name)
    if (
        found is None
        or method not in _METHODS
        or not (isinstance(found, ufunc) or method == "__call__")
    ):
        raise UnsupportedOp(
            f"numpy.{name}.{method} does not run on a remote device; get() the array to use it "
            "here",
            op=name,
        )
    call = found if method == "__call__" else getattr(found, method)
    out = kwargs.get("out")
    if isinstance(out, tuple) and len(out) == 1:
        kwargs["out"] = out[0]
    return call(*inputs, **kwargs)


def array_function(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    found = _functions.get(function)
    if found is None:
        raise UnsupportedOp(
            f"numpy.{function.__name__} does not run on a remote device; get() the array to use "
            "it here",
            op=function.__name__,
        )
    return found(*args, **kwargs)
