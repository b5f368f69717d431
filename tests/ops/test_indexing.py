"""Indices against NumPy: shapes, bounds, and the way through a template and back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, IndexOutOfBounds, OpError, ShapeError
from gpuremote.ops.indexing import (
    GETITEM,
    advanced_shape,
    basic_shape,
    check_template,
    check_value_shape,
    largest_shape,
    parse_index,
    rebuild,
    setitem_shape,
)
from gpuremote.ops.meta import Meta
from tests.ops.case import METAS, Array, values


def meta(shape: tuple[int, ...]) -> Meta:
    return METAS.get(shape, np.dtype("f4"), 0)


def random_index(rng: random.Random, shape: tuple[int, ...], arrays: bool) -> Any:
    """An index that is often right and sometimes not."""
    items: list[Any] = []
    axis = 0
    common = rng.choice([(), (2,), (1,), (2, 1), (0,)])
    while axis < len(shape) and rng.random() < 0.85:
        length = shape[axis]
        kind = rng.choice(["int", "slice", "full", "new", "array", "mask"][: 6 if arrays else 4])
        if kind == "int":
            items.append(rng.randint(-length - (rng.random() < 0.05), max(length - 1, 0)))
        elif kind == "slice":
            start, stop = (rng.choice([None, rng.randint(-length - 2, length + 2)]) for _ in "ab")
            items.append(slice(start, stop, rng.choice([None, 1, 2, -1, -3])))
        elif kind == "full":
            items.append(slice(None))
        elif kind == "new":
            items.append(None)
            continue
        elif kind == "array":
            size = rng.choice([common, (1,), ()])
            items.append(np.array(np.zeros(size, int)) if length else np.zeros(common, int))
        else:
            covered = shape[axis : axis + rng.choice([1, 1, 2])]
            # Nothing is picked by an array without elements, which need not be that long.
            lengths = tuple([n * (rng.random() < 0.9) for n in covered])
            drawn = [rng.random() < 0.5 for _ in range(int(np.prod(lengths)))]
            items.append(np.array(drawn, bool).reshape(lengths))
            axis += len(covered)
            continue
        axis += 1
    if rng.random() < 0.3:
        items.insert(rng.randint(0, len(items)), ...)
    return tuple(items) if len(items) != 1 or rng.random() < 0.5 else items[0]


def numpy_says(x: Array, index: Any) -> Any:
    try:
        return x[index]
    except (IndexError, ValueError) as error:
        return error


@pytest.mark.parametrize("arrays", [False, True])
def test_random_indices(arrays: bool) -> None:
    rng = random.Random(7)
    accepted = 0
    for _ in range(6000):
        shape = tuple(rng.choice([0, 1, 2, 3, 5]) for _ in range(rng.randint(0, 4)))
        x = np.arange(int(np.prod(shape))).reshape(shape)
        index = random_index(rng, shape, arrays)
        expected = numpy_says(x, index)
        try:
            parsed = parse_index(meta(shape), index)
            shapes = [a.shape for a in parsed.arrays]
            found = setitem_shape(shape, parsed.template, parsed.ints, shapes)
        except OpError:
            assert isinstance(expected, Exception), (shape, index)
            continue
        if isinstance(expected, Exception):
            # What is in the index arrays decides; nothing else may be left to find.
            assert parsed.kind != "basic", (shape, index, expected)
            continue
        accepted += 1
        again = x[rebuild(parsed.template, parsed.ints, parsed.arrays)]
        assert isinstance(again, np.ndarray)
        np.testing.assert_array_equal(again, expected)
        most = largest_shape(shape, parsed.template, shapes)
        assert len(most) == again.ndim
        assert all(n <= m for n, m in zip(again.shape, most, strict=True))
        if parsed.kind == "mask":
            assert all(n <= m for n, m in zip(again.shape, found, strict=True)), (shape, index)
        else:
            assert found == again.shape, (shape, index)
            assert advanced_shape(shape, parsed.template, parsed.ints, shapes) == found
        if parsed.kind == "basic":
            assert np.shares_memory(again, x) or not again.size
            assert basic_shape(shape, parsed.template, parsed.ints) == found
    assert accepted > 3000


def test_templates() -> None:
    x = meta((4, 5, 6))
    parsed = parse_index(x, (slice(1, 9), ..., None, -2))
    assert parsed == (("s110", "...", "n", "i"), (1, 9, -2), (), "basic")
    assert parse_index(x, slice(None, None, -1)).template == ("s001",)
    assert parse_index(x, slice(None)).template == (":",)
    assert parse_index(x, 3) == (("i",), (3,), (), "basic")
    assert parse_index(x, np.int8(3)).ints == (3,)
    assert parse_index(x, np.array(3)) == (("i",), (3,), (), "basic")
    assert parse_index(x, [0, 1]).kind == "advanced"
    assert parse_index(x, []).arrays[0].dtype == np.intp
    assert parse_index(x, True).template == ("m",)
    assert parse_index(x, ([True] * 4, 0)).kind == "mask"
    assert parse_index(x, (values((4,), "b1"), [0])).kind == "mask"
    assert set(GETITEM) == {"basic", "advanced", "mask"}
    # Beyond any axis: as far as an int64 goes means the same.
    assert parse_index(x, slice(-(1 << 90), 1 << 90)).ints == (-(1 << 63) + 1, (1 << 63) - 1)


class Remote:
    """Stands for a remote array: it has a dtype and a shape, and must not be asked for more."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)

    def __index__(self) -> int:
        raise AssertionError("a silent download")

    __array__ = __iter__ = __index__


def test_remote_arrays_are_not_touched() -> None:
    index, mask = Remote((), "i8"), Remote((4,), "b1")
    parsed = parse_index(meta((4, 5)), (mask, index))
    assert parsed.template == ("m", "a")
    assert parsed.arrays == (mask, index)


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (1.0, DTypeError),
        ("a", DTypeError),
        ([0.5], DTypeError),
        ([[1], [1, 2]], DTypeError),
        (slice(0.5), DTypeError),
        (Remote((2,), "f4"), DTypeError),
        ((..., ...), IndexOutOfBounds),
        (1 << 70, IndexOutOfBounds),
        ((None,) * 200, IndexOutOfBounds),
    ],
)
def test_what_is_no_index(index: Any, error: type[OpError]) -> None:
    with pytest.raises(error):
        parse_index(meta((4, 5)), index)


def test_bounds() -> None:
    with pytest.raises(IndexOutOfBounds, match="index 4 is out of bounds for axis 0 of length 4"):
        basic_shape((4,), ("i",), (4,))
    with pytest.raises(IndexOutOfBounds, match="axis 1"):
        basic_shape((4, 2), (":", "i"), (-3,))
    with pytest.raises(IndexOutOfBounds, match="2 indices"):
        basic_shape((4,), ("i", "i"), (0, 0))
    with pytest.raises(IndexOutOfBounds, match="1 indices"):
        basic_shape((), ("i",), (0,))
    with pytest.raises(ShapeError, match="step"):
        basic_shape((4,), ("s001",), (0,))


@pytest.mark.parametrize(
    "value", [None, "i", ("x",), ("s000",), ("s12",), ("...", "..."), (1,), ("i",) * 200, (("i",),)]
)
def test_templates_from_elsewhere(value: Any) -> None:
    with pytest.raises(ShapeError):
        check_template(value)


def test_values_to_assign() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        target = tuple(rng.choice([0, 1, 2, 3]) for _ in range(rng.randint(0, 3)))
        value = tuple(rng.choice([0, 1, 2, 3]) for _ in range(rng.randint(0, 4)))
        fits = True
        try:
            np.zeros(target)[...] = np.zeros(value)
        except ValueError:
            fits = False
        try:
            check_value_shape(target, value)
        except ShapeError:
            assert not fits, (target, value)
        else:
            assert fits, (target, value)
