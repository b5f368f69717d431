"""Comparing remote arrays with NumPy's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.faults.sides import Side

__all__ = ["DTYPES", "Pair", "attempt", "case", "numbers", "same"]

DTYPES: Final = [np.dtype(name).name for name in "?bhilBHILefdFD"]

_TOLERANCE: Final = {"f2": 2e-3, "f4": 1e-5, "f8": 1e-11, "c8": 1e-5, "c16": 1e-11}

_REFUSALS: Final = (
    TypeError,
    ValueError,
    OverflowError,
    IndexError,
    np.exceptions.ComplexWarning,
)

Array = npt.NDArray[Any]


def numbers(shape: int | tuple[int, ...], dtype: npt.DTypeLike, seed: int = 0) -> Array:
    """Small numbers, none of them 0, negative ones too where the dtype has them."""
    chance = np.random.default_rng(seed)
    wanted = np.dtype(dtype)
    if wanted.kind == "b":
        return np.asarray(chance.integers(0, 2, shape), bool)
    made: Array = np.asarray(chance.integers(1, 9, shape))
    if wanted.kind in "ifc":
        made = made * chance.choice([-1, 1], shape)
    if wanted.kind in "fc":
        made = made + chance.integers(0, 4, shape) / 4
    if wanted.kind == "c":
        made = made + 1j * chance.integers(1, 5, shape)
    return np.asarray(made, wanted)


def same(side: Side, remote: Any, expected: Any) -> None:
    """Shape and dtype as the client knows them, shape and dtype as the server knows them, and
    the values, are those of ``expected``."""
    wanted = np.asarray(expected)
    # Known here at once, before anything is waited for.
    assert (remote.shape, remote.dtype) == (wanted.shape, wanted.dtype)
    assert (remote.ndim, remote.size, remote.nbytes) == (wanted.ndim, wanted.size, wanted.nbytes)
    shape, dtype = side.do(remote._core.wait(remote._ask_meta()))
    assert (tuple(shape), np.dtype(dtype)) == (wanted.shape, wanted.dtype)
    close(side.do(remote.get()), wanted)


def close(got: Array, wanted: Array) -> None:
    """Equal; floats up to rounding (``x ** 2`` has a shortcut that ``power`` has not)."""
    tolerance = _TOLERANCE.get(wanted.dtype.str[1:], 0.0)
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance / 10, strict=True)


def attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it gives, or what it raises."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        warnings.simplefilter("error", np.exceptions.ComplexWarning)
        try:
            return function(), None
        except _REFUSALS as error:
            return None, error


@contextmanager
def case(*names: object) -> Iterator[None]:
    """One of many cases of a test: says in a failure which one it was.

    Every test looks through ``/proc`` for what it left behind, so a thousand small ones are slow.
    """
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {', '.join(map(str, names))}")
        raise


class Pair:
    """A remote array and a NumPy array that hold the same, to do the same to both."""

    def __init__(self, side: Side, device: Any, host: Any) -> None:
        self.side = side
        self.host = np.array(host)
        self.remote = side.do(device.put(self.host))

    def check(self, function: Callable[[Any], Any]) -> None:
        """``function`` gives the same for both."""
        with np.errstate(all="ignore"):
            expected = function(self.host)
        same(self.side, function(self.remote), expected)

    def equal(self) -> None:
        """They still hold the same."""
        same(self.side, self.remote, self.host)
