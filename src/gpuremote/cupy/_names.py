"""Every name of the namespace, put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np

from gpuremote.client.array import RemoteArray
from gpuremote.cupy import (
    _composed,
    _counting,
    _creation,
    _dispatch,
    _elementwise,
    _home,
    _indexing,
    _kernels,
    _manipulation,
    _namespace,
    _printing,
    _products,
    _selection,
    _sets,
    _statistics,
    _types,
    cuda,
    fft,
    linalg,
    random,
    testing,
)
from gpuremote.cupy._array import FUNCTIONS, ndarray
from gpuremote.cupy._missing import missing
from gpuremote.errors import AxisError

__all__ = ["NAMES"]

_ALIASES: Final = {
    "abs": "absolute",
    "acos": "arccos",
    "acosh": "arccosh",
    "asin": "arcsin",
    "asinh": "arcsinh",
    "atan": "arctan",
    "atan2": "arctan2",
    "atanh": "arctanh",
    "bitwise_invert": "invert",
    "bitwise_left_shift": "left_shift",
    "bitwise_not": "invert",
    "bitwise_right_shift": "right_shift",
    "conj": "conjugate",
    "degrees": "rad2deg",
    "mod": "remainder",
    "pow": "power",
    "radians": "deg2rad",
    "round_": "round",
    "true_divide": "divide",
    # Names that NumPy had before its second version, and CuPy still has.
    "Inf": "inf",
    "Infinity": "inf",
    "NaN": "nan",
    "PINF": "inf",
    "alltrue": "all",
    "complex_": "complex128",
    "cfloat": "complex128",
    "cumproduct": "cumprod",
    "float_": "float64",
    "fromDlpack": "from_dlpack",
    "infty": "inf",
    "product": "prod",
    "row_stack": "vstack",
    "singlecomplex": "complex64",
    "sometrue": "any",
    "trapz": "trapezoid",
}
"""Names of the standard's, and such as NumPy had before its second version and CuPy still has."""

_INTERNAL: Final = frozenset(
    {"flag", "plain", "FROM_NUMPY", "array_of", "info", "operand", "settled"}
)


def _collected() -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(np, name) for name in _types.FROM_NUMPY}
    found |= _elementwise.UFUNCS
    for module in (
        _creation,
        _statistics,
        _counting,
        _manipulation,
        _selection,
        _sets,
        _products,
        _composed,
        _indexing,
        _kernels,
        _printing,
        _types,
    ):
        found |= {name: getattr(module, name) for name in module.__all__ if name not in _INTERNAL}
    return found | {alias: found[name] for alias, name in _ALIASES.items()}


def _described(names: Mapping[str, Any]) -> None:
    """Functions that do what NumPy's do say so, and no more."""
    for name, value in names.items():
        if callable(value) and not isinstance(value, type) and not value.__doc__:
            value.__doc__ = f"As ``numpy.{name}``, on the device."


def array_namespace_info() -> _types.info:
    """What the standard lets a library ask: devices, dtypes, capabilities."""
    return _types.info()


def get_array_module(*args: Any) -> Any:
    """This namespace if one of the arguments is an array of it, else NumPy."""
    for arg in args:
        if isinstance(arg, ndarray):
            return arg.__array_namespace__()
    return np


_TOGETHER: Final = (
    # Functions of several arrays.
    "allclose",
    "append",
    "array_equal",
    "array_equiv",
    "average",
    "bincount",
    "choose",
    "clip",
    "compress",
    "convolve",
    "corrcoef",
    "correlate",
    "cov",
    "cross",
    "diff",
    "digitize",
    "dot",
    "ediff1d",
    "einsum",
    "extract",
    "gradient",
    "histogram",
    "histogram2d",
    "histogramdd",
    "in1d",
    "inner",
    "insert",
    "interp",
    "intersect1d",
    "isclose",
    "isin",
    "kron",
    "matmul",
    "outer",
    "percentile",
    "piecewise",
    "place",
    "polyadd",
    "polyfit",
    "polymul",
    "polysub",
    "polyval",
    "put",
    "put_along_axis",
    "putmask",
    "quantile",
    "ravel_multi_index",
    "searchsorted",
    "select",
    "setdiff1d",
    "setxor1d",
    "take_along_axis",
    "tensordot",
    "trapezoid",
    "union1d",
    "vdot",
    "vecdot",
    "where",
)


def _beside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lists and numbers that a function takes go where its arrays are."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        place = _place(args) or _place(kwargs.values())
        if place is None or _home.is_default(place):
            return function(*args, **kwargs)
        with _home.using(place):
            return function(*args, **kwargs)

    return call


def _place(values: Iterable[Any]) -> Any:
    for value in values:
        if isinstance(value, RemoteArray):
            return value.device
        if isinstance(value, list | tuple) and (found := _place(value)) is not None:
            return found
    return None


NAMES: Final[dict[str, Any]] = _collected()
NAMES.update({name: _beside(NAMES[name]) for name in _TOGETHER})
_described(NAMES)
FUNCTIONS |= {name: value for name, value in NAMES.items() if callable(value)}
FUNCTIONS |= {
    "array_function": _dispatch.array_function,
    "array_ufunc": _dispatch.array_ufunc,
    "namespace_of": _namespace.namespace_of,
}
_dispatch.learn(np, NAMES)
_dispatch.learn(np.linalg, vars(linalg))
_dispatch.learn(np.fft, vars(fft))
NAMES.update(
    {
        "DataSource": np.lib.npyio.DataSource,
        "NAN": np.nan,
        "NINF": -np.inf,
        "NZERO": -0.0,
        "PZERO": 0.0,
        "__array_api_version__": "2024.12",
        "__array_namespace_info__": array_namespace_info,
        "bool": np.bool_,
        "close": _home.close,
        "cuda": cuda,
        "fft": fft,
        "get_array_module": get_array_module,
        "get_default_memory_pool": cuda.MemoryPool,
        "get_default_pinned_memory_pool": cuda.MemoryPool,
        "is_available": cuda.is_available,
        "linalg": linalg,
        "missing": missing,
        "ndarray": ndarray,
        "random": random,
        "session": _home.session,
        "testing": testing,
        **{
            name: getattr(np.exceptions, name)
            for name in (
                "ComplexWarning",
                "ModuleDeprecationWarning",
                "RankWarning",
                "TooHardError",
                "VisibleDeprecationWarning",
            )
        },
        "AxisError": AxisError,
        "ufunc": _elementwise.ufunc,
        "use": _home.use,
        "using": _home.using,
    }
)
"""Every name of ``gpuremote.cupy``."""
