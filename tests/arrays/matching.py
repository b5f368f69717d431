"""The same call here and in NumPy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.errors import LinearAlgebraError
from tests.session.comparing import case

__all__ = ["Same", "remote"]

_TOLERANCE: Final = {"e": 2e-3, "f": 2e-5, "d": 1e-10, "F": 2e-5, "D": 1e-10}


def remote(xp: Any, value: Any) -> Any:
    """NumPy arrays uploaded, wherever they are in an argument."""
    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if isinstance(value, list | tuple) and any(isinstance(v, np.ndarray) for v in value):
        return type(value)(remote(xp, v) for v in value)
    return value


class Same:
    """Compares the functions of a module with those of NumPy's."""

    def __init__(self, xp: Any, here: Any, there: Any) -> None:
        self.xp, self.here, self.there = xp, here, there
        self.refused = 0

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The result of both, or both refuse (ours at once, unless it depends on values)."""
        shapes = [getattr(a, "shape", a) for a in args]
        kinds = [getattr(a, "dtype", "") for a in args]
        with case(name, *shapes, *kinds, kwargs):
            expected, reason = attempt(lambda: getattr(self.there, name)(*args, **kwargs))
            given = [remote(self.xp, arg) for arg in args]
            function = getattr(self.here, name)
            if reason is not None:
                self.refused += 1
                if "Singular" in str(reason) or "definite" in str(reason):
                    with pytest.raises(LinearAlgebraError):  # the values are to blame
                        np.asarray(function(*given, **kwargs).get())
                    return None
                with pytest.raises((TypeError, ValueError, IndexError)):
                    function(*given, **kwargs)
                return None
            found = function(*given, **kwargs)
            self.compare(found, expected)
            return found

    def compare(self, found: Any, expected: Any) -> None:
        """Shape and dtype as known here and as known there, and the values."""
        if isinstance(expected, tuple | list):
            assert len(found) == len(expected)
            for position, name in enumerate(getattr(expected, "_fields", ())):
                assert getattr(found, name) is found[position]
            for one, other in zip(found, expected, strict=True):
                self.compare(one, other)
            return
        wanted = np.asarray(expected)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        shape, dtype = found._core.wait(found._ask_meta())
        assert (tuple(shape), np.dtype(dtype)) == (wanted.shape, wanted.dtype)
        near = _TOLERANCE.get(wanted.dtype.char, 0)
        np.testing.assert_allclose(found.get(), wanted, rtol=near, atol=near)


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(), None
        except (TypeError, ValueError, IndexError) as error:
            return None, error
