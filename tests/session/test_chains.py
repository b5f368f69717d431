"""Chains of ops chosen at random: whatever NumPy computes, the device computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.sides import Side
from tests.session.comparing import attempt, numbers, same

Step = Callable[[list[Any], int, int], None]
"""Does something with the arrays of a list: to some of the first, or with another number."""


def _pick(arrays: list[Any], k: int) -> Any:
    return arrays[k % len(arrays)]


def _binary(function: Callable[[Any, Any], Any]) -> Step:
    def step(arrays: list[Any], a: int, b: int) -> None:
        arrays.append(function(_pick(arrays, a), _pick(arrays, b)))

    return step


def _scalar(function: Callable[[Any, Any], Any]) -> Step:
    def step(arrays: list[Any], a: int, b: int) -> None:
        scalar = [2, -3, 0.5, True, np.float32(1.25), np.int8(4), 1 - 1j][b % 7]
        arrays.append(function(_pick(arrays, a), scalar))

    return step


def _unary(function: Callable[[Any], Any]) -> Step:
    def step(arrays: list[Any], a: int, b: int) -> None:
        arrays.append(function(_pick(arrays, a)))

    return step


def _part(arrays: list[Any], a: int, b: int) -> None:
    x = _pick(arrays, a)
    indices = [
        ...,
        slice(None, None, -1),
        slice(1, None),
        None,
        -1,
        [0, -1],
        (..., 0),
        slice(0, 9, 2),
    ]
    arrays.append(x[indices[b % len(indices)]])


def _add_in_place(arrays: list[Any], a: int, b: int) -> None:
    x = _pick(arrays, a)
    x += _pick(arrays, b)


def _multiply_in_place(arrays: list[Any], a: int, b: int) -> None:
    x = _pick(arrays, a)
    x *= [2, 3, 0.5, True][b % 4]


def _assign(arrays: list[Any], a: int, b: int) -> None:
    x, y = _pick(arrays, a), _pick(arrays, b)
    if y.dtype.kind == "c" and x.dtype.kind != "c":
        raise TypeError("NumPy warns (not where it makes a bool), the device refuses")
    x[...] = y


def _assign_part(arrays: list[Any], a: int, b: int) -> None:
    _pick(arrays, a)[1::2] = b % 5


def _drop(arrays: list[Any], a: int, b: int) -> None:
    if len(arrays) > 2:
        del arrays[a % len(arrays)]


def _axis(function: Callable[..., Any]) -> Step:
    def step(arrays: list[Any], a: int, b: int) -> None:
        x = _pick(arrays, a)
        arrays.append(function(x, axis=None if b % 3 == 0 or not x.ndim else b % x.ndim))

    return step


STEPS: dict[str, Step] = {
    "add": _binary(np.add),
    "subtract": _binary(lambda x, y: x - y),
    "multiply": _binary(lambda x, y: x * y),
    "divide": _binary(lambda x, y: x / y),
    "maximum": _binary(np.maximum),
    "less": _binary(lambda x, y: x < y),
    "matmul": _binary(lambda x, y: x @ y.T),
    "where": _binary(lambda x, y: np.where(x > 1, x, y)),
    "concatenate": _binary(lambda x, y: np.concatenate([x, y], axis=None)),
    "add a scalar": _scalar(np.add),
    "multiply with a scalar": _scalar(np.multiply),
    "subtract from a scalar": _scalar(lambda x, s: s - x),
    "equals a scalar": _scalar(lambda x, s: x == s),
    "sqrt": _unary(np.sqrt),
    "negative": _unary(lambda x: -x),
    "abs": _unary(abs),
    "T": _unary(lambda x: x.T),
    "reshape": _unary(lambda x: x.reshape(-1)),
    "astype": _unary(lambda x: x.astype(np.float32)),
    "copy": _unary(lambda x: x.copy()),
    "clip": _unary(lambda x: np.clip(x, 0, 3)),
    "sum": _axis(np.sum),
    "max": _axis(np.max),
    "argmin": _axis(np.argmin),
    "mean": _axis(np.mean),
    "part": _part,
    "another part": _part,
    "add in place": _add_in_place,
    "multiply in place": _multiply_in_place,
    "assign": _assign,
    "assign to a part": _assign_part,
    "drop": _drop,
}

SHAPES = [(), (3,), (2, 3), (3, 3), (1, 3), (0, 3), (4, 1, 3)]
STARTS = st.tuples(st.sampled_from(SHAPES), st.sampled_from([*"?blBfdF"]))
NUMBERS = st.integers(0, 40)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    starts=st.lists(STARTS, min_size=2, max_size=3),
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), NUMBERS, NUMBERS), min_size=3, max_size=25
    ),
)
def test_chains(
    side: Side, device: Any, starts: list[Any], steps: list[tuple[str, int, int]]
) -> None:
    """Views of views, writes through them, frees in between; nothing is waited for on the way."""
    here = [numbers(shape, dtype, k) for k, (shape, dtype) in enumerate(starts)]
    there = [side.do(device.put(array)) for array in here]
    for name, a, b in steps:
        step = STEPS[name]
        trial = list(here)
        kept = [array.copy() for array in here]
        _, error = attempt(partial(step, trial, a, b))
        # What NumPy refuses is another test.
        last = trial[-1]
        if error is not None or last.size > 4096:
            for array, values in zip(here, kept, strict=True):
                if array.flags.writeable:
                    array[...] = values
            continue
        step(there, a, b)
        if len(trial) > len(here) and not isinstance(last, np.ndarray):
            # A scalar of NumPy's is a copy; the device (like CuPy) gives a view of one element.
            trial[-1] = np.array(last)
            there[-1] = there[-1].copy()
        here = trial
    assert len(here) == len(there)
    for host, remote in zip(here, there, strict=True):
        same(side, remote, host)
