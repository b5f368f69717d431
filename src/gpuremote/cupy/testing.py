"""Comparing with NumPy, for tests of programs: values are fetched and compared there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuremote.cupy._creation import asarray
from gpuremote.cupy._printing import asnumpy

__all__ = [
    "assert_allclose",
    "assert_array_almost_equal",
    "assert_array_almost_equal_nulp",
    "assert_array_equal",
    "assert_array_less",
    "assert_array_list_equal",
    "assert_array_max_ulp",
    "for_all_dtypes",
    "for_dtypes",
    "numpy_cupy_allclose",
    "numpy_cupy_array_equal",
    "numpy_cupy_equal",
    "shaped_arange",
    "shaped_random",
    "shaped_reverse_arange",
]


def _comparison(name: str) -> Callable[..., None]:
    compare = getattr(np.testing, name)

    def function(x: Any, y: Any, *args: Any, **kwargs: Any) -> None:
        compare(asnumpy(x), asnumpy(y), *args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"As ``numpy.testing.{name}``, of fetched values."
    return function


assert_allclose = _comparison("assert_allclose")
assert_array_almost_equal = _comparison("assert_array_almost_equal")
assert_array_almost_equal_nulp = _comparison("assert_array_almost_equal_nulp")
assert_array_equal = _comparison("assert_array_equal")
assert_array_less = _comparison("assert_array_less")
assert_array_max_ulp = _comparison("assert_array_max_ulp")


def assert_array_list_equal(
    xlist: Any, ylist: Any, err_msg: str = "", verbose: bool = True
) -> None:
    """Each pair of two lists of arrays is equal."""
    assert len(xlist) == len(ylist), f"{len(xlist)} arrays and {len(ylist)}"
    for x, y in zip(xlist, ylist, strict=True):
        assert_array_equal(x, y, err_msg=err_msg, verbose=verbose)


def _parity(compare: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """A decorator: the test is called with NumPy and with this namespace, and has to give the
    same."""

    def decorate(test: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            import sys

            ours = test(*args, **{name: sys.modules["gpuremote.cupy"]}, **kwargs)
            theirs = test(*args, **{name: np}, **kwargs)
            pairs = (
                zip(ours, theirs, strict=True)
                if isinstance(ours, tuple | list)
                else [(ours, theirs)]
            )
            for x, y in pairs:
                compare(x, y, **options)

        # pytest asks for fixtures by the wrapped function's signature.
        del run.__wrapped__
        return run

    return decorate


def numpy_cupy_allclose(
    rtol: float = 1e-7, atol: float = 0, err_msg: str = "", verbose: bool = True, name: str = "xp"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The test gives values that are close with both namespaces."""
    decorate = _parity(assert_allclose, rtol=rtol, atol=atol, err_msg=err_msg, verbose=verbose)
    return lambda test: decorate(test, name)


def numpy_cupy_array_equal(
    err_msg: str = "", verbose: bool = True, name: str = "xp"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The test gives equal arrays with both namespaces."""
    decorate = _parity(assert_array_equal, err_msg=err_msg, verbose=verbose)
    return lambda test: decorate(test, name)


def numpy_cupy_equal(name: str = "xp") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The test gives the same object with both namespaces."""

    def compare(x: Any, y: Any) -> None:
        assert x == y, f"{x!r} is not {y!r}"

    decorate = _parity(compare)
    return lambda test: decorate(test, name)


def for_dtypes(
    dtypes: Any, name: str = "dtype"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The test is called with each of the dtypes."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for dtype in dtypes:
                try:
                    test(*args, **{name: np.dtype(dtype).type}, **kwargs)
                except Exception as error:
                    error.add_note(f"with {name} {np.dtype(dtype)}")
                    raise

        del run.__wrapped__
        return run

    return decorate


def for_all_dtypes(
    name: str = "dtype", no_float16: bool = False, no_bool: bool = False, no_complex: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The test is called with every dtype that may live on a device."""
    codes = "bhilBHIL" + "e" * (not no_float16) + "fd" + "FD" * (not no_complex)
    return for_dtypes(codes + "?" * (not no_bool), name)


def _ours(values: Any, xp: Any) -> Any:
    return values if xp is np else asarray(values)


def shaped_arange(shape: Any, xp: Any = None, dtype: Any = np.float32, order: str = "C") -> Any:
    """1, 2, 3, ... in a shape."""
    size = int(np.prod(shape))
    values = np.arange(1, size + 1).astype(dtype).reshape(shape)
    return _ours(values, xp)


def shaped_reverse_arange(shape: Any, xp: Any = None, dtype: Any = np.float32) -> Any:
    """..., 3, 2, 1 in a shape."""
    size = int(np.prod(shape))
    return _ours(np.arange(size, 0, -1).astype(dtype).reshape(shape), xp)


def shaped_random(
    shape: Any, xp: Any = None, dtype: Any = np.float32, scale: float = 10, seed: int = 0
) -> Any:
    """Random numbers in a shape, the same with both namespaces."""
    chance = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return _ours(np.asarray(chance.integers(0, 2, shape), bool), xp)
    values = np.asarray(chance.random(shape) * scale)
    if kind.kind == "c":
        values = values + 1j * chance.random(shape) * scale
    return _ours(values.astype(kind), xp)
