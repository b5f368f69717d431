"""Functions that pick, look for, sort or write elements."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.cupy._array import axis_of, integers, ndarray, several, single, store
from gpuremote.cupy._creation import arange, array_of, asarray, operand, tri, zeros_like
from gpuremote.cupy._elementwise import scatter
from gpuremote.errors import IndexOutOfBounds, ShapeError, UnsupportedOp
from gpuremote.ops.catalogue import find

__all__ = [
    "argpartition",
    "argsort",
    "argwhere",
    "choose",
    "clip",
    "compress",
    "diag_indices",
    "diag_indices_from",
    "diagonal",
    "extract",
    "fill_diagonal",
    "flatnonzero",
    "ix_",
    "lexsort",
    "mask_indices",
    "msort",
    "nonzero",
    "partition",
    "piecewise",
    "place",
    "put",
    "put_along_axis",
    "putmask",
    "ravel_multi_index",
    "scatter_add",
    "scatter_max",
    "scatter_min",
    "searchsorted",
    "select",
    "settled",
    "sort",
    "sort_complex",
    "take",
    "take_along_axis",
    "trace",
    "tril_indices",
    "tril_indices_from",
    "triu_indices",
    "triu_indices_from",
    "unravel_index",
    "where",
]


def settled(x: ndarray, name: str, *operands: Any, **params: Any) -> ndarray:
    """The result of an op whose shape depends on values: waits for that."""
    return x._settle(single(name, *operands, **params))


# -- picking ------------------------------------------------------------------------------------


def take(
    a: Any, indices: Any, axis: int | None = None, out: Any = None, mode: str | None = None
) -> ndarray:
    """Elements at places along an axis. Those out of bounds are an error with NumPy behind it;
    CuPy wraps them around."""
    x = array_of(a)
    places = asarray(indices, device=x.device) if not isinstance(indices, RemoteArray) else indices
    if mode in ("wrap", "clip"):
        length = x.size if axis is None else x.shape[axis]
        places = places.astype(np.intp, copy=False)
        places = places % length if mode == "wrap" else single("clip", places, 0, length - 1)
    elif mode not in (None, "raise"):
        raise ValueError(f"no mode {mode!r}")
    return single("take", x, places, axis=integers(axis), out=out)


def take_along_axis(a: Any, indices: Any, axis: int | None = -1) -> ndarray:
    x = array_of(a)
    if axis is None:
        x, axis = x.ravel(), 0
    return single("take_along_axis", x, array_of(indices), axis=operator.index(axis))


def choose(a: Any, choices: Any, out: Any = None, mode: str = "raise") -> ndarray:
    options = list(choices) if isinstance(choices, ndarray) else [operand(c) for c in choices]
    found = several("choose", (array_of(a), *options), mode=mode)[0]
    return found if out is None else store(found, out)


def compress(condition: Any, a: Any, axis: int | None = None, out: Any = None) -> ndarray:
    """The slices along an axis where the condition is true; waits for their number."""
    x = array_of(a)
    found = settled(x, "compress", array_of(condition), x, axis=integers(axis))
    return found if out is None else store(found, out)


def extract(condition: Any, a: Any) -> ndarray:
    """The elements where the condition is true; waits for their number."""
    x = array_of(a)
    return settled(x, "extract", array_of(condition), x)


def diagonal(a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> ndarray:
    return array_of(a).diagonal(offset, axis1, axis2)


def trace(
    a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, out: Any = None
) -> ndarray:
    return single(
        "trace",
        array_of(a),
        offset=operator.index(offset),
        axis1=operator.index(axis1),
        axis2=operator.index(axis2),
        dtype=None if dtype is None else np.dtype(dtype).str[1:],
        out=out,
    )


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    """Elements of ``x`` where the condition is true, else of ``y``; without these, as
    :func:`nonzero`."""
    if (x is None) != (y is None):
        raise ValueError("either both or neither of x and y should be given")
    mask = array_of(condition)
    if x is None:
        return nonzero(mask)
    return single("where", mask, operand(x), operand(y))


def select(condlist: Sequence[Any], choicelist: Sequence[Any], default: Any = 0) -> Any:
    if len(condlist) != len(choicelist) or not len(condlist):
        raise ValueError("as many conditions as choices are needed, and one at least")
    found: Any = operand(default)
    choices = [operand(c) for c in choicelist]
    kind = np.result_type(*(getattr(c, "dtype", c) for c in (*choices, found)))
    for condition, choice in zip(reversed(condlist), reversed(choices), strict=True):
        mask = array_of(condition)
        if mask.dtype.kind != "b":
            raise TypeError(f"conditions have to be bools, not {mask.dtype}")
        found = single("where", mask, choice, found)
    return found if found.dtype == kind else found.astype(kind)


def piecewise(x: Any, condlist: Any, funclist: Sequence[Any], *args: Any, **kw: Any) -> ndarray:
    """Every function is called with the whole array; what it gives counts where its condition is
    true."""
    points = array_of(x)
    conditions = (
        [array_of(c) for c in condlist]
        if isinstance(condlist, list | tuple)
        else [array_of(condlist)]
    )
    if len(funclist) == len(conditions) + 1:
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen | condition
        conditions.append(~seen)
    elif len(funclist) != len(conditions):
        raise ValueError(f"{len(conditions)} conditions and {len(funclist)} functions")
    found = zeros_like(points)
    for condition, function in zip(conditions, funclist, strict=True):
        value = function(points, *args, **kw) if callable(function) else operand(function)
        found = single("where", condition, value, found).astype(points.dtype)
    return found


def clip(
    a: Any,
    min: Any = None,
    max: Any = None,
    out: Any = None,
    *,
    a_min: Any = None,
    a_max: Any = None,
) -> ndarray:
    x = array_of(a)
    low = operand(a_min if min is None else min)
    high = operand(a_max if max is None else max)
    if low is None and high is None:
        found = x.copy()
        return found if out is None else store(found, out)
    if low is None or high is None:
        bound, side = (high, "max") if low is None else (low, "min")
        return single("clip", x, bound, bounds=side, out=out)
    return single("clip", x, low, high, out=out)


# -- order --------------------------------------------------------------------------------------


def sort(
    a: Any,
    axis: int | None = -1,
    kind: Any = None,
    *,
    descending: bool = False,
    stable: bool | None = None,
) -> ndarray:
    x = array_of(a)
    if axis is None:
        x, axis = x.ravel(), -1
    axis_of(axis, x.ndim)
    return single("sort", x, axis=operator.index(axis), descending=bool(descending) or None)


def argsort(
    a: Any,
    axis: int | None = -1,
    kind: Any = None,
    *,
    descending: bool = False,
    stable: bool | None = None,
) -> ndarray:
    x = array_of(a)
    if axis is None:
        x, axis = x.ravel(), -1
    if not x.ndim:
        x = x.reshape(1)
    return single("argsort", x, axis=operator.index(axis), descending=bool(descending) or None)


def msort(a: Any) -> ndarray:
    return sort(a, 0)


def sort_complex(a: Any) -> Any:
    found = sort(a)
    if found.dtype.kind == "c":
        return found
    return found.astype("F" if found.dtype.char in "bhBH" else "D")


def lexsort(keys: Any, axis: int = -1) -> Any:
    """The order by the last key, then by those before it."""
    joined = keys if isinstance(keys, ndarray) else several("stack", [*map(array_of, keys)])[0]
    if joined.ndim == 1:
        return argsort(zeros_like(joined[:1])) if joined.size else joined
    last = joined.ndim - 1
    at = axis_of(axis, last)
    if at != last - 1:  # CuPy sorts along the last axis only
        order = [i for i in range(joined.ndim) if i != at + 1]
        sorted_ = single("lexsort", joined.transpose([*order, at + 1]))
        back = list(range(last - 1))
        back.insert(at, last - 1)
        return sorted_.transpose(back)
    return single("lexsort", joined)


def partition(a: Any, kth: Any, axis: int | None = -1) -> ndarray:
    x = array_of(a)
    if axis is None:
        x, axis = x.ravel(), -1
    return single("partition", x, kth=integers(kth), axis=operator.index(axis))


def argpartition(a: Any, kth: Any, axis: int | None = -1) -> ndarray:
    x = array_of(a)
    if axis is None:
        x, axis = x.ravel(), -1
    return single("argpartition", x, kth=integers(kth), axis=operator.index(axis))


def searchsorted(a: Any, v: Any, side: str = "left", sorter: Any = None) -> ndarray:
    x = array_of(a)
    if sorter is not None:
        x = single("take", x, array_of(sorter), axis=0)
    return single("searchsorted", x, operand(v), side=side)


# -- where something is -------------------------------------------------------------------------


def nonzero(a: Any) -> tuple[ndarray, ...]:
    """The indices of what is not zero, an array for each axis; waits for their number."""
    x = array_of(a)
    found = several("nonzero", (x,))
    first = x._settle(found[0])
    for other in found[1:]:  # they are as many
        other._meta = first._meta
    return (first, *found[1:])


def flatnonzero(a: Any) -> ndarray:
    x = array_of(a)
    return settled(x, "flatnonzero", x)


def argwhere(a: Any) -> ndarray:
    x = array_of(a)
    return settled(x, "argwhere", x)


# -- indices ------------------------------------------------------------------------------------


def ix_(*args: Any) -> tuple[ndarray, ...]:
    """Index arrays of an open grid; bools are waited for."""
    found = []
    for k, arg in enumerate(args):
        x = array_of(arg)
        if x.ndim != 1:
            raise ValueError("every sequence has to be of one axis")
        if x.dtype.kind == "b":
            (x,) = nonzero(x)
        elif not x.size:
            x = x.astype(np.intp)
        found.append(x.reshape((1,) * k + (-1,) + (1,) * (len(args) - k - 1)))
    return tuple(found)


def diag_indices(n: int, ndim: int = 2) -> tuple[ndarray, ...]:
    return (arange(n),) * ndim


def diag_indices_from(arr: Any) -> tuple[ndarray, ...]:
    x = array_of(arr)
    if x.ndim < 2 or len(set(x.shape)) > 1:
        raise ValueError("an array of at least two axes of one length is needed")
    return diag_indices(x.shape[0], x.ndim)


def mask_indices(n: int, mask_func: Callable[..., Any], k: int = 0) -> tuple[ndarray, ...]:
    return nonzero(mask_func(tri(n, n, n), k) != 0)


def tril_indices(n: int, k: int = 0, m: int | None = None) -> tuple[ndarray, ...]:
    return nonzero(tri(n, m, k, bool))


def triu_indices(n: int, k: int = 0, m: int | None = None) -> tuple[ndarray, ...]:
    return nonzero(~tri(n, m, k - 1, bool))


def tril_indices_from(arr: Any, k: int = 0) -> tuple[ndarray, ...]:
    rows, columns = array_of(arr).shape
    return tril_indices(rows, k, columns)


def triu_indices_from(arr: Any, k: int = 0) -> tuple[ndarray, ...]:
    rows, columns = array_of(arr).shape
    return triu_indices(rows, k, columns)


def unravel_index(indices: Any, dims: Any, order: str = "C") -> tuple[ndarray, ...]:
    places = array_of(indices)
    if places.dtype.kind not in "iu":
        raise TypeError(f"indices have to be integers, not {places.dtype}")
    lengths = integers(dims if isinstance(dims, tuple | list) else (dims,))
    places = places.astype(np.intp, copy=False)
    found: list[ndarray] = []
    for length in reversed(lengths) if order == "C" else lengths:
        found.append(places % length)
        places = places // length
    return tuple(reversed(found)) if order == "C" else tuple(found)


def ravel_multi_index(
    multi_index: Any, dims: Any, mode: Any = "raise", order: str = "C"
) -> ndarray:
    """Places in the flattened array. With ``mode="raise"`` it waits, to see that all are within
    bounds."""
    places = [array_of(place).astype(np.intp, copy=False) for place in multi_index]
    lengths = integers(dims if isinstance(dims, tuple | list) else (dims,))
    modes = mode if isinstance(mode, tuple | list) else (mode,) * len(lengths)
    checked = []
    for place, length, how in zip(places, lengths, modes, strict=True):
        if how == "wrap":
            place = place % length
        elif how == "clip":
            place = single("clip", place, 0, length - 1)
        elif place.size and bool(((place < 0) | (place >= length)).any()):
            raise IndexOutOfBounds(f"an index is out of bounds for {length} elements")
        checked.append(place)
    pairs = list(zip(checked, lengths, strict=True))
    found: Any = 0
    for place, length in pairs if order == "C" else reversed(pairs):
        found = found * length + place
    return array_of(found)


# -- writing ------------------------------------------------------------------------------------


def _target(a: Any) -> ndarray:
    if not isinstance(a, ndarray):
        raise TypeError(f"a {type(a).__name__} can't be written to")
    return a


def _values(v: Any, like: ndarray) -> Any:
    return v if isinstance(v, RemoteArray) else asarray(v, like.dtype, device=like.device)


def put(a: Any, ind: Any, v: Any, mode: str = "wrap") -> None:
    x = _target(a)
    places = asarray(ind, device=x.device)
    issue.apply(find("put_"), (x, places, _values(v, x)), {"mode": mode})


def place(arr: Any, mask: Any, vals: Any) -> None:
    x = _target(arr)
    issue.apply(find("place_"), (x, array_of(mask), _values(vals, x)))


def putmask(a: Any, mask: Any, values: Any) -> None:
    x = _target(a)
    issue.apply(find("putmask_"), (x, array_of(mask), _values(values, x)))


def put_along_axis(arr: Any, indices: Any, values: Any, axis: int | None) -> None:
    x = _target(arr)
    if axis is None:
        raise UnsupportedOp("an axis has to be named: flatten the array first")
    operands = (x, array_of(indices), _values(values, x))
    issue.apply(find("put_along_axis_"), operands, {"axis": operator.index(axis)})


def fill_diagonal(a: Any, val: Any, wrap: bool = False) -> None:
    x = _target(a)
    issue.apply(find("fill_diagonal_"), (x, _values(val, x)), {"wrap": bool(wrap)})


def scatter_add(a: Any, slices: Any, value: Any) -> None:
    """``a[slices] += value``, where an index that comes twice counts twice."""
    scatter("add", _target(a), slices, value)


def scatter_max(a: Any, slices: Any, value: Any) -> None:
    scatter("maximum", _target(a), slices, value)


def scatter_min(a: Any, slices: Any, value: Any) -> None:
    scatter("minimum", _target(a), slices, value)


def apply_along_axis(func1d: Callable[..., Any], axis: int, arr: Any, *args: Any, **kw: Any) -> Any:
    """What a function gives for each slice along an axis; as many ops as there are slices."""
    x = array_of(arr)
    at = axis_of(axis, x.ndim)
    moved = x.transpose([*(i for i in range(x.ndim) if i != at), at])
    lead = moved.shape[:-1]
    rows = moved.reshape(-1, moved.shape[-1])
    if not rows.shape[0]:
        raise ValueError("there is no slice to apply the function to")
    results = [asarray(func1d(row, *args, **kw)) for row in rows]
    found = several("stack", results, axis=0)[0]
    found = found.reshape(lead + results[0].shape)
    order = list(range(len(lead)))
    order[at:at] = range(len(lead), found.ndim)
    return found.transpose(order)


def apply_over_axes(func: Callable[..., Any], a: Any, axes: Any) -> Any:
    x = array_of(a)
    for axis in axes if isinstance(axes, tuple | list) else (axes,):
        found = func(x, axis)
        x = found if found.ndim == x.ndim else single("expand_dims", found, axis=axis)
        if x.ndim != array_of(a).ndim:
            raise ShapeError("the function does not give an array of the right shape")
    return x


__all__ += ["apply_along_axis", "apply_over_axes"]
