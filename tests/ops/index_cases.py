"""Indices to try the indexing ops with, and what else picks or writes elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpuremote.ops.indexing import parse_index
from tests.ops.case import ALL, CUBE, METAS, SHAPES, STRONG, WEAK, Array, Case, values

BASIC: list[Any] = [
    0,
    -1,
    2,
    ...,
    None,
    slice(None),
    slice(1, None),
    slice(None, None, -1),
    slice(-2, 9, 2),
    (0, 1),
    (slice(None), 1),
    (..., 0),
    (None, 0),
    (0, ..., None, 1),
    (slice(2), slice(5, 1, -1)),
    (),
    (slice(None), slice(None), slice(0, 0)),
    (1, 1, 1),
    (..., None, slice(1, 3)),
    7,
    (0, 0, 0, 0),
    np.int8(1),
]
ADVANCED: list[Any] = [
    [0, 1],
    ([0, 1], [1, 0]),
    (slice(None), [0, 2]),
    ([0, 1], slice(None), [0, 1]),
    (0, [1, 0]),
    ([[0, 1], [1, 0]], 0),
    (None, [0, 1]),
    ([0, 1], None, [1, 0]),
    (0, slice(None), [1, 0]),
    (..., [0, 1]),
    ([0], ..., slice(1, None)),
    (slice(0, 1), [0, 1], [0, 1]),
    ([], 0),
    np.array([1, 0], "u1"),
    ([0, 1], [0, 1, 2]),
    (slice(1, None), [[1], [0]], [0, 1, 2]),
    ([0, 1], [0, 1], [0, 1], [0, 1]),
]
MASKS: list[Any] = [
    values((2,), "b1"),
    (slice(None), values((3,), "b1")),
    values((2, 3), "b1"),
    values((0, 3), "b1"),
    values((2, 0), "b1"),
    values((2, 3, 4), "b1"),
    (0, values((3,), "b1")),
    (values((2,), "b1"), 0),
    True,
    False,
    (values((2,), "b1"), ..., slice(1, 3)),
    (np.array([True, True]), [0, 1]),
    values((3,), "b1"),
    (0, ..., values((4,), "b1")),
]


def indexed(x: Array, index: Any, value: Any = None) -> Case:
    """The operands that the client makes of ``x[index]`` or ``x[index] = value``."""
    parsed = parse_index(METAS.get(x.shape, x.dtype, 0), index)
    head = (x,) if value is None else (x, value)
    return Case((*head, *parsed.ints, *parsed.arrays), {"index": parsed.template}, index)


def getitems(indices: Sequence[Any]) -> Iterator[Case]:
    for shape in [CUBE, (3,), (2, 3), ()]:
        for index in indices:
            yield indexed(values(shape, "f4"), index)
    for dtype in ALL:
        yield indexed(values(CUBE, dtype), indices[0])


def setitems() -> Iterator[Case]:
    for index in BASIC + ADVANCED + MASKS:
        yield indexed(values(CUBE, "f4"), index, 2.5)
        yield indexed(values(CUBE, "f4"), index, values((1, 1), "i4"))
    for dtype, scalar in itertools.product(ALL, WEAK + STRONG):
        if np.iscomplexobj(scalar) <= (dtype[0] == "c"):
            yield indexed(values((3, 2), dtype), 1, scalar)
    for source, target in itertools.product(ALL, ALL):
        if source[0] != "c" or target[0] == "c":
            yield indexed(values((3, 2), target), ..., values((2,), source))
    for shape in [(), (4,), (3, 1), (2, 3, 4), (1, 2, 3, 4), (2, 1, 3, 4), (3,), (0,)]:
        yield indexed(values(CUBE, "f4"), ..., values(shape, "f4"))
        yield indexed(values(CUBE, "f4"), [1, 0], values(shape, "f4"))


def fills() -> Iterator[Case]:
    for dtype, scalar in itertools.product(ALL, [*WEAK, *STRONG, values((), "f4")]):
        if np.iscomplexobj(scalar) <= (dtype[0] == "c"):
            yield Case((values((2, 3), dtype), scalar))


def searches(*params: dict[str, Any]) -> Iterator[Case]:
    for dtype, shape in itertools.product(ALL, SHAPES):
        yield Case((values(shape, dtype),))
    for given in params:
        yield Case((np.array([np.nan, 1, np.nan]),), given)
