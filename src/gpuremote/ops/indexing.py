"""Indices, split into a template that stays the same and the integers that change.

A template is a tuple of strings, one per item of the index:

========== ==========================================================================
``":"``    a full slice
``"s101"`` a slice; the digits say which of start, stop and step are given as integers
``"i"``    one integer
``"n"``    a new axis
``"..."``  an ellipsis
``"a"``    an array of integers
``"m"``    an array of bools
========== ==========================================================================

So ``x[3:n, ..., k]`` has the template ``("s110", "...", "i")`` and the integers ``(3, n, k)``,
and calls that differ only in the integers share a plan.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, IndexOutOfBounds, ShapeError
from gpuremote.ops.meta import Meta
from gpuremote.ops.shapes import broadcast, size_of

__all__ = [
    "GETITEM",
    "Kind",
    "ParsedIndex",
    "Template",
    "advanced_shape",
    "basic_shape",
    "check_template",
    "check_value_shape",
    "largest_shape",
    "parse_index",
    "rebuild",
    "setitem_shape",
]

Template: TypeAlias = tuple[str, ...]
Kind: TypeAlias = Literal["basic", "advanced", "mask"]

GETITEM: dict[Kind, str] = {
    "basic": "getitem",
    "advanced": "getitem_advanced",
    "mask": "getitem_mask",
}
"""The op that reads through an index of each kind (setitem takes all)."""

_SLICES = frozenset(f"s{n:03b}" for n in range(1, 8))
_ITEMS = frozenset({":", "i", "n", "...", "a", "m"}) | _SLICES
_NDIM_LIMIT = 64
_ITEM_LIMIT = 2 * _NDIM_LIMIT + 2
_INT64 = (1 << 63) - 1


class ParsedIndex(NamedTuple):
    """What :func:`parse_index` finds in an index.

    Attributes
    ----------
    template : tuple of str
        The part that a plan keeps (parameter ``index``).
    ints : tuple of int
        The integers, in the order in which the template asks for them.
    arrays : tuple
        What stood where the template says ``"a"`` or ``"m"``: remote arrays as they are, lists
        and bools as NumPy arrays.
    kind : str
        ``"basic"`` (the result is a view), ``"advanced"`` (integer arrays), or ``"mask"`` (bool
        arrays: reading gives a shape that depends on values).
    """

    template: Template
    ints: tuple[int, ...]
    arrays: tuple[Any, ...]
    kind: Kind


def parse_index(meta: Meta, index: Any) -> ParsedIndex:
    """Split an index. Bounds are checked by the functions that give shapes, not here.

    Raises
    ------
    IndexOutOfBounds
        More than one ellipsis, more items than axes, or an integer beyond 64 bits.
    DTypeError
        An item that can't be an index (a float, a string, an array of floats).
    """
    if type(index) is int and -_INT64 <= index <= _INT64 and meta.ndim:
        return ParsedIndex(("i",), (index,), (), "basic")
    template: list[str] = []
    ints: list[int] = []
    arrays: list[Any] = []
    kind: Kind = "basic"
    for item in index if type(index) is tuple else (index,):
        if item is None:
            template.append("n")
        elif item is Ellipsis:
            template.append("...")
        elif isinstance(item, slice):
            template.append(_slice(item, ints))
        elif not isinstance(item, bool) and isinstance(item, int | np.integer):
            template.append("i")
            ints.append(_checked_int(int(item)))
        else:
            array = _array(item)
            if isinstance(array, int):
                template.append("i")
                ints.append(_checked_int(array))
                continue
            arrays.append(array)
            if array.dtype.kind == "b":
                template.append("m")
                kind = "mask"
            else:
                template.append("a")
                if kind == "basic":
                    kind = "advanced"
    if len(template) > _ITEM_LIMIT:
        raise IndexOutOfBounds(f"an index of {len(template)} items")
    if template.count("...") > 1:
        raise IndexOutOfBounds("an index can have one ellipsis ('...') only")
    return ParsedIndex(tuple(template), tuple(ints), tuple(arrays), kind)


def _checked_int(value: int) -> int:
    if not -_INT64 <= value <= _INT64:
        raise IndexOutOfBounds(f"index {value} is out of bounds for any axis")
    return value


def _slice(item: slice, ints: list[int]) -> str:
    """Template item of a slice, whose integers are appended to ``ints``."""
    flags = ""
    for part in (item.start, item.stop, item.step):
        if part is None:
            flags += "0"
            continue
        flags += "1"
        if type(part) is not int:
            try:
                part = operator.index(part)
            except TypeError as error:
                raise DTypeError(f"{part!r} in a slice is not an integer") from error
        # Further out than any axis is long: the limit means the same.
        ints.append(part if -_INT64 <= part <= _INT64 else _INT64 if part > 0 else -_INT64)
    return ":" if flags == "000" else "s" + flags


def _array(item: Any) -> Any:
    """An index item that is neither int, slice, None nor ellipsis, as an array or an int."""
    array = item
    if not hasattr(item, "dtype") or not hasattr(item, "shape"):
        if not isinstance(item, list | tuple | bool):
            try:
                return operator.index(item)
            except TypeError as error:
                raise DTypeError(f"{type(item).__name__} object can't be an index") from error
        try:
            array = np.asarray(item)
        except ValueError as error:
            raise DTypeError(f"a list that is not an array can't be an index: {error}") from error
        if not array.size:
            array = array.astype(np.intp)
    if array.dtype.kind not in "biu":
        raise DTypeError(f"an index array of {array.dtype}: integers or bools are needed")
    if isinstance(array, np.generic | np.ndarray) and not array.shape and array.dtype.kind != "b":
        return int(array)
    return np.asarray(array) if isinstance(array, np.generic) else array


def check_template(value: Any) -> Template:
    """A template that came from elsewhere, or ShapeError."""
    if (
        not isinstance(value, tuple | list)
        or len(value) > _ITEM_LIMIT
        or not all(isinstance(item, str) and item in _ITEMS for item in value)
        or value.count("...") > 1
    ):
        raise ShapeError("parameter index is not an index template")
    return tuple(value)


@lru_cache(maxsize=4096)
def _named(template: Template) -> int:
    """Number of axes that the items name, those of bool arrays not counted."""
    return sum(item not in ("n", "...", "m") for item in template)


def _hidden(shape: Shape, template: Template, masks: Sequence[Shape]) -> int:
    """Number of axes that the index does not name (an ellipsis stands for them)."""
    named = _named(template)
    if masks:
        named += sum(map(len, masks))
    if named > len(shape):
        raise IndexOutOfBounds(f"{named} indices for an array of shape {shape}")
    return len(shape) - named


def _bounded(value: int, length: int, axis: int) -> None:
    if not -length <= value < length:
        raise IndexOutOfBounds(f"index {value} is out of bounds for axis {axis} of length {length}")


def _sliced(item: str, ints: Sequence[int], at: int, length: int) -> tuple[int, int]:
    """Length of a sliced axis, and the position behind the integers that it took."""
    if item == "s110":
        start, stop = ints[at], ints[at + 1]
        start = max(start + length, 0) if start < 0 else start
        stop = stop + length if stop < 0 else min(stop, length)
        return max(stop - start, 0), at + 2
    parts: list[int | None] = []
    for flag in item[1:]:
        if flag == "1":
            parts.append(ints[at])
            at += 1
        else:
            parts.append(None)
    try:
        return len(range(*slice(*parts).indices(length))), at
    except ValueError as error:
        raise ShapeError(str(error)) from error


def basic_shape(shape: Shape, template: Template, ints: Sequence[int]) -> Shape:
    """Shape of what a basic index gives.

    Raises
    ------
    IndexOutOfBounds
        An integer outside its axis, or more items than axes.
    ShapeError
        A slice whose step is zero.
    """
    if template == ("i",) and shape:
        _bounded(ints[0], shape[0], 0)
        return shape[1:]
    out: list[int] = []
    axis = at = 0
    hidden = _hidden(shape, template, ())
    for item in template:
        if item == "i":
            _bounded(ints[at], shape[axis], axis)
            at += 1
        elif item == ":":
            out.append(shape[axis])
        elif item == "n":
            out.append(1)
            continue
        elif item == "...":
            out.extend(shape[axis : axis + hidden])
            axis += hidden
            continue
        else:
            length, at = _sliced(item, ints, at, shape[axis])
            out.append(length)
        axis += 1
    out.extend(shape[axis:])
    return tuple(out)


def advanced_shape(
    shape: Shape, template: Template, ints: Sequence[int], array_shapes: Sequence[Shape]
) -> Shape:
    """Shape of what an index with arrays gives; also takes basic ones.

    A bool array counts as if all of it were true, so with ``"m"`` the shape is an upper bound.

    Raises
    ------
    IndexOutOfBounds
        An integer outside its axis, more items than axes, or a bool array of another shape than
        the axes that it stands for. (What is in integer arrays is checked where the op runs.)
    ShapeError
        Index arrays that don't broadcast, or a slice whose step is zero.
    """
    return _advanced(shape, template, ints, array_shapes)


def largest_shape(shape: Shape, template: Template, array_shapes: Sequence[Shape]) -> Shape:
    """As :func:`advanced_shape` for any integers: the longest that each axis may be."""
    return _advanced(shape, template, None, array_shapes)


def setitem_shape(
    shape: Shape, template: Template, ints: Sequence[int], array_shapes: Sequence[Shape]
) -> Shape:
    """Shape of what an assignment through the index writes."""
    if array_shapes:
        return _advanced(shape, template, ints, array_shapes)
    return basic_shape(shape, template, ints)


def _advanced(
    shape: Shape, template: Template, ints: Sequence[int] | None, array_shapes: Sequence[Shape]
) -> Shape:
    arrays = iter(array_shapes)
    masks = [
        found
        for item, found in zip((i for i in template if i in ("a", "m")), array_shapes, strict=True)
        if item == "m"
    ]
    hidden = _hidden(shape, template, masks)
    out: list[int] = []
    picked: list[Shape] = []  # Shapes of the index arrays.
    masked: list[int] = []  # Most elements that each bool array picks.
    groups = place = axis = at = 0
    in_group = False
    for item in template:
        is_array = item in ("a", "m") or (item == "i" and bool(array_shapes))
        if is_array and not in_group:
            groups += 1
            place = len(out) if groups == 1 else 0
        in_group = is_array
        if item == "a":
            picked.append(next(arrays))
        elif item == "m":
            mask = next(arrays)
            lengths = shape[axis : axis + len(mask)]
            # As NumPy and the array API standard: an axis of a bool array may also have length 0.
            if lengths != mask and (
                len(lengths) < len(mask)
                or any(n not in (0, m) for n, m in zip(mask, lengths, strict=True))
            ):
                raise IndexOutOfBounds(
                    f"a bool array of shape {mask} as an index from axis {axis} of shape {shape}"
                )
            masked.append(size_of(mask))
            axis += len(mask)
            continue
        elif item == "i":
            if ints is not None:
                _bounded(ints[at], shape[axis], axis)
                at += 1
        elif item == ":":
            out.append(shape[axis])
        elif item == "n":
            out.append(1)
            continue
        elif item == "...":
            out.extend(shape[axis : axis + hidden])
            axis += hidden
            continue
        elif ints is None:
            out.append(shape[axis])
        else:
            length, at = _sliced(item, ints, at, shape[axis])
            out.append(length)
        axis += 1
    out.extend(shape[axis:])
    if not array_shapes:
        return tuple(out)
    joint = broadcast(*picked) if picked else ()
    if masked:
        joint = (*joint[:-1], max((*joint[-1:], *masked)))
    return (*out[:place], *joint, *out[place:])


def check_value_shape(target: Shape, value: Shape) -> None:
    """Raise ShapeError where a value of that shape can't be assigned to the target."""
    extra = len(value) - len(target)
    if extra > 0 and all(n == 1 for n in value[:extra]):
        value = value[extra:]
    if len(value) > len(target) or any(
        n not in (1, m) for n, m in zip(reversed(value), reversed(target), strict=False)
    ):
        raise ShapeError(f"a value of shape {value} can't be assigned to a part of shape {target}")


def rebuild(template: Template, ints: Sequence[int], arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The index again. It ends in an ellipsis, so that indexing never gives a bare scalar."""
    found: list[Any] = []
    next_int = iter(ints).__next__
    next_array = iter(arrays).__next__
    ellipsis = False
    for item in template:
        if item == "i":
            found.append(next_int())
        elif item == ":":
            found.append(slice(None))
        elif item == "n":
            found.append(None)
        elif item == "...":
            found.append(Ellipsis)
            ellipsis = True
        elif item in ("a", "m"):
            found.append(next_array())
        else:
            found.append(slice(*(next_int() if flag == "1" else None for flag in item[1:])))
    if not ellipsis:
        found.append(Ellipsis)
    return tuple(found)
