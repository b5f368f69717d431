"""Functions of one element at a time that are made of others."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuremote.client.array import RemoteArray
from gpuremote.cupy._array import ndarray, single, store
from gpuremote.cupy._creation import arange, array_of, operand, zeros
from gpuremote.cupy._elementwise import UFUNCS
from gpuremote.cupy._home import chosen

__all__ = [
    "allclose",
    "angle",
    "around",
    "array_equal",
    "array_equiv",
    "bartlett",
    "blackman",
    "broadcast",
    "clear_memo",
    "fix",
    "fuse",
    "hamming",
    "hanning",
    "i0",
    "imag",
    "isclose",
    "iscomplex",
    "iscomplexobj",
    "isneginf",
    "isposinf",
    "isreal",
    "isrealobj",
    "isscalar",
    "kaiser",
    "memoize",
    "nan_to_num",
    "ndim",
    "real",
    "real_if_close",
    "round",
    "shape",
    "sinc",
    "size",
    "vectorize",
]


def round(a: Any, decimals: int = 0, out: Any = None) -> ndarray:
    return single("round", array_of(a), decimals=operator.index(decimals), out=out)


around = round


def fix(x: Any, out: Any = None) -> ndarray:
    found = UFUNCS["trunc"](array_of(x))
    return found if out is None else store(found, out)


def real(val: Any) -> Any:
    return array_of(val).real


def imag(val: Any) -> Any:
    return array_of(val).imag


def angle(z: Any, deg: bool = False) -> Any:
    x = array_of(z)
    found = UFUNCS["arctan2"](x.imag, x.real) if x.dtype.kind == "c" else UFUNCS["arctan2"](0, x)
    return found * (180 / np.pi) if deg else found


def i0(x: Any) -> ndarray:
    return single("i0", array_of(x))


def sinc(x: Any) -> ndarray:
    return single("sinc", array_of(x))


def nan_to_num(
    x: Any,
    copy: bool = True,
    nan: float = 0.0,
    posinf: float | None = None,
    neginf: float | None = None,
) -> ndarray:
    array = array_of(x)
    found = single(
        "nan_to_num", array, nan=float(nan), posinf=_float(posinf), neginf=_float(neginf)
    )
    return found if copy else store(found, array)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def real_if_close(a: Any, tol: float = 100) -> ndarray:
    """The real part where the imaginary one is as good as zero; waits to see."""
    x = array_of(a)
    if x.dtype.kind != "c":
        return x
    if tol > 1:
        tol = float(np.finfo(x.dtype).eps) * tol
    return x.real if bool((abs(x.imag) < tol).all()) else x


# -- questions ----------------------------------------------------------------------------------


def isclose(
    a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> ndarray:
    x, y = operand(a), operand(b)
    if not isinstance(x, RemoteArray) and not isinstance(y, RemoteArray):
        x = array_of(x)
    return single("isclose", x, y, rtol=float(rtol), atol=float(atol), equal_nan=equal_nan or None)


def allclose(
    a: Any, b: Any, rtol: float = 1e-05, atol: float = 1e-08, equal_nan: bool = False
) -> Any:
    """Whether all are close: an array without axes, as CuPy's."""
    return isclose(a, b, rtol, atol, equal_nan).all()


def array_equal(a1: Any, a2: Any, equal_nan: bool = False) -> Any:
    """Whether shapes and values are equal: an array without axes, as CuPy's."""
    x, y = array_of(a1), array_of(a2)
    if x.shape != y.shape:
        return zeros((), bool)
    same = x == y
    if equal_nan and x.dtype.kind in "fc" and y.dtype.kind in "fc":
        same = same | (UFUNCS["isnan"](x) & UFUNCS["isnan"](y))
    return same.all()


def array_equiv(a1: Any, a2: Any) -> Any:
    x, y = array_of(a1), array_of(a2)
    try:
        np.broadcast_shapes(x.shape, y.shape)
    except ValueError:
        return zeros((), bool)
    return (x == y).all()


def isneginf(x: Any, out: Any = None) -> ndarray:
    array = array_of(x)
    found = UFUNCS["isinf"](array) & UFUNCS["signbit"](array)
    return found if out is None else store(found, out)


def isposinf(x: Any, out: Any = None) -> ndarray:
    array = array_of(x)
    found = UFUNCS["isinf"](array) & ~UFUNCS["signbit"](array)
    return found if out is None else store(found, out)


def iscomplex(x: Any) -> Any:
    array = array_of(x)
    return array.imag != 0


def isreal(x: Any) -> Any:
    array = array_of(x)
    return array.imag == 0


def iscomplexobj(x: Any) -> bool:
    return bool(np.dtype(getattr(x, "dtype", type(x))).kind == "c")


def isrealobj(x: Any) -> bool:
    return not iscomplexobj(x)


def isscalar(element: Any) -> bool:
    return bool(np.isscalar(element))


def ndim(a: Any) -> int:
    return a.ndim if isinstance(a, RemoteArray) else int(np.ndim(a))


def shape(a: Any) -> tuple[int, ...]:
    return a.shape if isinstance(a, RemoteArray) else tuple(np.shape(a))


def size(a: Any, axis: int | None = None) -> int:
    lengths = shape(a)
    return int(np.prod(lengths, dtype=int)) if axis is None else lengths[axis]


# -- windows ------------------------------------------------------------------------------------


def _phase(M: int) -> Any:
    return arange(1 - M, M, 2, dtype=float) / max(M - 1, 1)


def bartlett(M: int) -> Any:
    return 1 - abs(_phase(M)) if M > 1 else 1 - 0 * _phase(M)


def blackman(M: int) -> Any:
    x = _phase(M) * np.pi
    return 0.42 + 0.5 * UFUNCS["cos"](x) + 0.08 * UFUNCS["cos"](2.0 * x)


def hanning(M: int) -> Any:
    return 0.5 + 0.5 * UFUNCS["cos"](_phase(M) * np.pi)


def hamming(M: int) -> Any:
    return 0.54 + 0.46 * UFUNCS["cos"](_phase(M) * np.pi)


def kaiser(M: int, beta: float) -> ndarray:
    x = _phase(M)
    return i0(beta * UFUNCS["sqrt"](1 - x * x)) / i0(np.asarray(float(beta))[()])


class broadcast:
    """What broadcasting makes of some arrays.

    Attributes
    ----------
    shape : tuple of int
    ndim, size : int
    values : list of ndarray
        The arrays in that shape; views.
    """

    def __init__(self, *arrays: Any) -> None:
        given = [array_of(x) for x in arrays]
        self.shape = tuple(np.broadcast_shapes(*(x.shape for x in given)))
        self.ndim, self.nd = len(self.shape), len(self.shape)
        self.size = int(np.prod(self.shape, dtype=int))
        self.values = [single("broadcast_to", x, shape=self.shape) for x in given]


def fuse(*args: Any, **kwargs: Any) -> Any:
    """Marks a function whose ops CuPy makes one kernel of. Here the function stays as it is: a
    server with NumPy runs any chain as one by itself, one with CuPy runs op by op."""
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0]
    return lambda function: function


def memoize(for_each_device: bool = False) -> Callable[..., Any]:
    """A decorator: the results of a function are kept by its arguments."""
    return _memoized


def _memoized(function: Callable[..., Any]) -> Callable[..., Any]:
    kept = functools.lru_cache(maxsize=4096)(function)
    _kept.add(kept)
    return kept


def clear_memo() -> None:
    """Forget what ``memoize`` has kept."""
    for kept in list(_kept):
        kept.cache_clear()


_kept: weakref.WeakSet[Any] = weakref.WeakSet()


class vectorize:
    """A function of elements as one of arrays: it is called with the arrays themselves.

    As CuPy, which makes a kernel of it, this allows arithmetic and functions of this namespace,
    and no branches on values.
    """

    def __init__(self, pyfunc: Any, otypes: Any = None, doc: Any = None, **kwargs: Any) -> None:
        self.pyfunc = pyfunc
        self.otypes = otypes
        self._device = chosen()
        self.__doc__ = doc or getattr(pyfunc, "__doc__", None)

    def __call__(self, *args: Any) -> Any:
        found = self.pyfunc(*(array_of(x, self._device) for x in args))
        return found.astype(self.otypes[0]) if self.otypes else found
