"""Every function of the namespace against NumPy's of the same name, over generated calls."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuremote.cupy import _names
from tests.arrays import shape_calls
from tests.arrays.calls import CALLS, Maker
from tests.arrays.drawing import Call, Draw

ALL: dict[str, Maker] = {
    **CALLS,
    **shape_calls.CREATION,
    **shape_calls.SHAPES,
    **shape_calls.SELECTION,
    **shape_calls.PRODUCTS,
}

# NumPy's names for what differs in name only.
NUMPY: dict[str, Any] = {
    # Complex in any case: NumPy looks whether all imaginary parts are zero.
    "roots": lambda p: np.roots(p).astype(complex),
    "unique_values": lambda x: np.unique(x, equal_nan=False),  # NumPy's comes in any order
    "msort": lambda a: np.sort(a, 0),
    "unstack": getattr(np, "unstack", None),
}

TOLERANCE = {"e": 2e-2, "f": 2e-4, "d": 1e-9, "F": 2e-4, "D": 1e-9}


def upload(xp: Any, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if isinstance(value, list) and any(isinstance(v, np.ndarray) for v in value):
        return [upload(xp, v) for v in value]
    if isinstance(value, tuple) and any(isinstance(v, np.ndarray) for v in value):
        return tuple(upload(xp, v) for v in value)
    return value


def compare(xp: Any, found: Any, expected: Any) -> None:
    """Shape and dtype as known here, as known there, and values."""
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(xp, one, other)
        return
    if not isinstance(found, xp.ndarray):
        assert found == expected
        return
    wanted = np.asarray(expected)
    assert found.shape == wanted.shape, f"shape {found.shape}, NumPy's {wanted.shape}"
    assert found.dtype == wanted.dtype, f"dtype {found.dtype}, NumPy's {wanted.dtype}"
    shape, dtype = found._core.wait(found._ask_meta())
    assert (tuple(shape), np.dtype(dtype)) == (wanted.shape, wanted.dtype), "the server's"
    tolerance = TOLERANCE.get(wanted.dtype.char, 0)
    np.testing.assert_allclose(found.get(), wanted, rtol=tolerance, atol=tolerance)


def outcome(function: Any, call: Call) -> tuple[Any, Exception | None]:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*call.args, **call.kwargs), None
        except Exception as error:
            return None, error


def check(xp: Any, name: str, call: Call) -> bool:
    """One call; whether NumPy takes it."""
    expected, refused = outcome(NUMPY.get(name) or getattr(np, name), call)
    args = [upload(xp, arg) for arg in call.args]
    kwargs = {key: upload(xp, value) for key, value in call.kwargs.items()}
    try:
        found = getattr(xp, name)(*args, **kwargs)
        if refused is None:
            compare(xp, found, expected)
    except Exception as error:
        if refused is None:
            error.add_note(f"in {name}{call.args} {call.kwargs}")
            raise
        xp.session()._core.take_failures()
    return refused is None


@pytest.mark.parametrize("name", sorted(ALL))
def test_function(xp: Any, name: str) -> None:
    taken = 0

    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal taken
        taken += check(xp, name, ALL[name](Draw(data)))

    run()
    assert taken


@pytest.mark.parametrize("name", sorted(shape_calls.INPLACE))
def test_writing_function(xp: Any, name: str) -> None:
    @settings(max_examples=12, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        call = shape_calls.INPLACE[name](Draw(data))
        args = [upload(xp, arg) for arg in call.args]
        kwargs = {key: upload(xp, value) for key, value in call.kwargs.items()}
        getattr(np, name)(*call.args, **call.kwargs)
        getattr(xp, name)(*args, **kwargs)
        compare(xp, args[0], call.args[0])

    run()


ELSEWHERE = {
    "empty",
    "empty_like",
    "from_dlpack",
    "fromfile",
    "fromstring",
    "genfromtxt",
    "loadtxt",
    "array2string",
    "array_repr",
    "array_str",
    "load",
    "save",
    "savetxt",
    "savez",
    "savez_compressed",
    "can_cast",
    "isdtype",
    "result_type",
    "common_type",
    "min_scalar_type",
    "__array_namespace_info__",
}
"""In ``test_namespace.py``."""


def test_every_function_is_compared() -> None:
    compared = {id(_names.NAMES[name]) for name in (*ALL, *shape_calls.INPLACE)}
    left = [
        name
        for name, value in _names.NAMES.items()
        if callable(value)
        and not isinstance(value, type)
        and id(value) not in compared  # another name for the same function will do
        and name not in ELSEWHERE
        and hasattr(np, name)
        and getattr(np, name) is not value
    ]
    assert not left


def test_complex_expm1_at_infinities(xp: Any) -> None:
    """As C99 (G.6.3.2) and the standard have it; NumPy gives nan."""
    inf, nan = np.inf, np.nan
    values = np.array(
        [complex(*parts) for parts in [(inf, 0), (-inf, inf), (-inf, nan), (nan, 0), (inf, 1)]]
    )
    expected = np.array(
        [complex(*parts) for parts in [(inf, 0), (-1, 0), (-1, 0), (nan, 0), (inf, inf)]]
    )
    for dtype in ("c8", "c16"):
        found = xp.expm1(xp.asarray(values.astype(dtype)))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.get(), expected.astype(dtype))
    finite = np.linspace(-2, 2, 7) + 1j
    np.testing.assert_array_equal(xp.expm1(xp.asarray(finite)).get(), np.expm1(finite))
    big = np.full(1 << 18, complex(inf, 0))  # enough for a chain
    assert xp.all((xp.expm1(xp.asarray(big)) * 1).real == inf)
