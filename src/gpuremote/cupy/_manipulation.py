"""Functions that move elements around: shapes, order of axes, joining, splitting."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.cupy._array import axis_of, integers, ndarray, several, single, store
from gpuremote.cupy._creation import array_of, asarray, operand
from gpuremote.errors import IndexOutOfBounds, ShapeError, UnsupportedOp

__all__ = [
    "append",
    "array_split",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "broadcast_arrays",
    "broadcast_to",
    "column_stack",
    "concat",
    "concatenate",
    "copyto",
    "delete",
    "dsplit",
    "dstack",
    "expand_dims",
    "flip",
    "fliplr",
    "flipud",
    "hsplit",
    "hstack",
    "insert",
    "matrix_transpose",
    "moveaxis",
    "packbits",
    "pad",
    "permute_dims",
    "ravel",
    "repeat",
    "reshape",
    "resize",
    "roll",
    "rollaxis",
    "rot90",
    "split",
    "squeeze",
    "stack",
    "swapaxes",
    "tile",
    "transpose",
    "trim_zeros",
    "unpackbits",
    "unstack",
    "vsplit",
    "vstack",
]


# -- one array ----------------------------------------------------------------------------------


def reshape(a: Any, shape: Any, order: str = "C", *, copy: bool | None = None) -> Any:
    """Another shape over the same values; a view where the layout allows it."""
    return array_of(a).reshape(shape, order=order, copy=copy)


def ravel(a: Any, order: str = "C") -> Any:
    return array_of(a).ravel(order)


def transpose(a: Any, axes: Any = None) -> Any:
    return array_of(a).transpose(*(() if axes is None else (axes,)))


def permute_dims(a: Any, axes: Any = None) -> Any:
    return transpose(a, axes)


def matrix_transpose(x: Any, /) -> ndarray:
    return array_of(x).mT


def swapaxes(a: Any, axis1: int, axis2: int) -> Any:
    return array_of(a).swapaxes(axis1, axis2)


def moveaxis(a: Any, source: Any, destination: Any) -> Any:
    x = array_of(a)
    origins, places = (
        [axis_of(i, x.ndim) for i in (axes if isinstance(axes, tuple | list) else (axes,))]
        for axes in (source, destination)
    )
    if len(origins) != len(places) or len(set(origins)) != len(origins):
        raise ValueError(f"axes {source} can't be moved to {destination}")
    if len(set(places)) != len(places):
        raise ValueError(f"destination {destination} names an axis twice")
    order = [i for i in range(x.ndim) if i not in origins]
    for place, origin in sorted(zip(places, origins, strict=True)):
        order.insert(place, origin)
    return x.transpose(order)


def rollaxis(a: Any, axis: int, start: int = 0) -> Any:
    x = array_of(a)
    axis = axis_of(axis, x.ndim)
    start = axis_of(start, x.ndim) if start != x.ndim else start
    return moveaxis(x, axis, start - (axis < start))


def expand_dims(a: Any, axis: Any = 0) -> ndarray:
    return single("expand_dims", array_of(a), axis=integers(axis))


def squeeze(a: Any, axis: Any = None) -> Any:
    return array_of(a).squeeze(axis)


def atleast_1d(*arys: Any) -> Any:
    found = [x if x.ndim else x.reshape(1) for x in map(array_of, arys)]
    return found[0] if len(found) == 1 else tuple(found)


def atleast_2d(*arys: Any) -> Any:
    found = [x if x.ndim > 1 else x.reshape(1, -1) for x in map(array_of, arys)]
    return found[0] if len(found) == 1 else tuple(found)


def atleast_3d(*arys: Any) -> Any:
    found = []
    for x in map(array_of, arys):
        if x.ndim < 2:
            x = x.reshape(1, -1, 1)
        elif x.ndim == 2:
            x = single("expand_dims", x, axis=2)
        found.append(x)
    return found[0] if len(found) == 1 else tuple(found)


def broadcast_to(array: Any, shape: Any, subok: bool = False) -> ndarray:
    lengths = shape if isinstance(shape, tuple | list) else (shape,)
    return single("broadcast_to", array_of(array), shape=integers(lengths))


def broadcast_arrays(*args: Any) -> list[ndarray]:
    arrays = [array_of(x) for x in args]
    if not arrays:
        return []
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    return [x if x.shape == shape else broadcast_to(x, shape) for x in arrays]


def flip(a: Any, axis: Any = None) -> ndarray:
    return single("flip", array_of(a), axis=integers(axis))


def flipud(a: Any) -> ndarray:
    x = array_of(a)
    if not x.ndim:
        raise ShapeError("an array without axes has no up and down", op="flipud")
    return flip(x, 0)


def fliplr(a: Any) -> Any:
    x = array_of(a)
    if x.ndim < 2:
        raise ShapeError(f"shape {x.shape}: two axes are needed", op="fliplr")
    return flip(x, 1)


def rot90(a: Any, k: int = 1, axes: Sequence[int] = (0, 1)) -> Any:
    x = array_of(a)
    if len(axes) != 2:
        raise ValueError("two axes are needed")
    first, second = (axis_of(axis, x.ndim) for axis in axes)
    if first == second:
        raise ValueError(f"axes {tuple(axes)} are the same")
    match k % 4:
        case 1:
            return flip(x, second).swapaxes(first, second)
        case 2:
            return flip(x, (first, second))
        case 3:
            return flip(x.swapaxes(first, second), second)
    return x[...]


def roll(a: Any, shift: Any, axis: Any = None) -> ndarray:
    return single("roll", array_of(a), shift=integers(shift), axis=integers(axis))


def repeat(a: Any, repeats: Any, axis: int | None = None) -> ndarray:
    """Each element as often as ``repeats`` says; an array of numbers on the device is waited
    for, as the shape of the result depends on it."""
    x = array_of(a)
    if not isinstance(repeats, int | np.integer):
        counts = repeats.get() if isinstance(repeats, ndarray) else np.asarray(repeats)
        if counts.size == 1:
            repeats = int(counts.reshape(-1)[0])
        else:
            flat = x if axis is not None else x.ravel()
            at = 0 if axis is None else axis_of(axis, x.ndim)
            # The standard takes any integers, np.repeat none of uint64.
            counts = counts.astype(np.int64) if counts.dtype.kind == "u" else counts
            places = np.repeat(np.arange(flat.shape[at]), counts)
            return single("take", flat, asarray(places, device=x.device), axis=at)
    return single("repeat", x, repeats=operator.index(repeats), axis=integers(axis))


def tile(A: Any, reps: Any) -> ndarray:
    lengths = reps if isinstance(reps, tuple | list) else (reps,)
    return single("tile", array_of(A), reps=integers(lengths))


def resize(a: Any, new_shape: Any) -> ndarray:
    lengths = new_shape if isinstance(new_shape, tuple | list) else (new_shape,)
    return single("resize", array_of(a), new_shape=integers(lengths))


def pad(array: Any, pad_width: Any, mode: Any = "constant", **kwargs: Any) -> ndarray:
    x = array_of(array)
    if callable(mode):
        raise UnsupportedOp("padding with a function of the program", op="pad")
    if isinstance(pad_width, dict):
        widths = np.zeros((x.ndim, 2), int)
        for axis, pair in pad_width.items():
            widths[axis] = pair
    else:
        widths = np.broadcast_to(np.asarray(pad_width), (x.ndim, 2))
    if widths.dtype.kind not in "iu":
        raise TypeError("pad_width has to be integers")
    params = {key: _plain(value) for key, value in kwargs.items()}
    pairs = tuple(tuple(map(int, pair)) for pair in widths)
    return several("pad", (x,), pad_width=pairs, mode=mode, **params)[0]


def _plain(value: Any) -> Any:
    if isinstance(value, ndarray):
        value = value.get()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value


def packbits(a: Any, axis: int | None = None, bitorder: str = "big") -> ndarray:
    return single("packbits", array_of(a), axis=integers(axis), bitorder=bitorder)


def unpackbits(a: Any, axis: int | None = None, bitorder: str = "big") -> ndarray:
    return single("unpackbits", array_of(a), axis=integers(axis), bitorder=bitorder)


def trim_zeros(filt: Any, trim: str = "fb") -> ndarray:
    """Without the zeros at the ends; waits for how many are left."""
    x = array_of(filt)
    return x._settle(single("trim_zeros", x, trim=trim))


# -- several arrays -----------------------------------------------------------------------------


def _arrays(tup: Any) -> list[ndarray]:
    if isinstance(tup, ndarray):
        return list(tup)
    return [array_of(x) for x in tup]


def concatenate(
    tup: Any,
    axis: int | None = 0,
    out: Any = None,
    *,
    dtype: npt.DTypeLike | None = None,
    casting: str = "same_kind",
) -> ndarray:
    arrays = _arrays(tup)
    if not arrays:
        raise ValueError("nothing to concatenate")
    if axis is None:
        arrays = [x.ravel() for x in arrays]
    elif dtype is not None:
        arrays = [x.astype(dtype, copy=False) for x in arrays]
    found = several("concat", arrays, axis=0 if axis is None else operator.index(axis))[0]
    if dtype is not None:
        found = found.astype(dtype, copy=False)
    return found if out is None else store(found, out, casting)


def concat(arrays: Any, /, *, axis: int | None = 0, **kwargs: Any) -> ndarray:
    return concatenate(arrays, axis, **kwargs)


def stack(
    tup: Any,
    axis: int = 0,
    out: Any = None,
    *,
    dtype: npt.DTypeLike | None = None,
    casting: str = "same_kind",
) -> ndarray:
    arrays = _arrays(tup)
    if not arrays:
        raise ValueError("nothing to stack")
    if dtype is not None:
        arrays = [x.astype(dtype, copy=False) for x in arrays]
    found = several("stack", arrays, axis=operator.index(axis))[0]
    return found if out is None else store(found, out, casting)


def vstack(tup: Any, *, dtype: npt.DTypeLike | None = None, casting: str = "same_kind") -> ndarray:
    return concatenate([atleast_2d(x) for x in _arrays(tup)], 0, dtype=dtype, casting=casting)


def hstack(tup: Any, *, dtype: npt.DTypeLike | None = None, casting: str = "same_kind") -> ndarray:
    arrays = [atleast_1d(x) for x in _arrays(tup)]
    axis = 0 if arrays and arrays[0].ndim == 1 else 1
    return concatenate(arrays, axis, dtype=dtype, casting=casting)


def dstack(tup: Any) -> ndarray:
    return concatenate([atleast_3d(x) for x in _arrays(tup)], 2)


def column_stack(tup: Any) -> ndarray:
    columns = [x.reshape(-1, 1) if x.ndim < 2 else x for x in _arrays(tup)]
    return concatenate(columns, 1)


def append(arr: Any, values: Any, axis: int | None = None) -> ndarray:
    x, more = array_of(arr), array_of(values)
    if axis is None:
        return concatenate([x.ravel(), more.ravel()])
    return concatenate([x, more], axis)


def unstack(x: Any, /, *, axis: int = 0) -> tuple[ndarray, ...]:
    """The slices along an axis; views."""
    array = array_of(x)
    if not array.ndim:
        raise ValueError("an array without axes has no slices")
    return tuple(moveaxis(array, axis, 0))


def array_split(ary: Any, indices_or_sections: Any, axis: int = 0) -> list[ndarray]:
    """Parts along an axis, not necessarily of one length; views."""
    x = array_of(ary)
    at = axis_of(axis, x.ndim)
    length = x.shape[at]
    if isinstance(indices_or_sections, int | np.integer):
        sections = int(indices_or_sections)
        if sections <= 0:
            raise ValueError("number of sections has to be larger than 0")
        each, extra = divmod(length, sections)
        sizes = extra * [each + 1] + (sections - extra) * [each]
        bounds = [0, *np.cumsum(sizes).tolist()]
        pairs = list(itertools.pairwise(bounds))
    else:
        places = _plain(indices_or_sections)
        pairs = list(zip([0, *places], [*places, length], strict=True))
    before = (slice(None),) * at
    return [x[(*before, slice(start, stop))] for start, stop in pairs]


def split(ary: Any, indices_or_sections: Any, axis: int = 0) -> list[ndarray]:
    x = array_of(ary)
    if isinstance(indices_or_sections, int | np.integer):
        length = x.shape[axis_of(axis, x.ndim)]
        if indices_or_sections <= 0 or length % indices_or_sections:
            raise ValueError(f"{length} elements make no {indices_or_sections} equal parts")
    return array_split(x, indices_or_sections, axis)


def vsplit(ary: Any, indices_or_sections: Any) -> list[ndarray]:
    x = array_of(ary)
    if x.ndim < 2:
        raise ValueError("vsplit only works on arrays of 2 or more dimensions")
    return split(x, indices_or_sections, 0)


def hsplit(ary: Any, indices_or_sections: Any) -> list[ndarray]:
    x = array_of(ary)
    if not x.ndim:
        raise ValueError("hsplit only works on arrays of 1 or more dimensions")
    return split(x, indices_or_sections, 1 if x.ndim > 1 else 0)


def dsplit(ary: Any, indices_or_sections: Any) -> list[ndarray]:
    x = array_of(ary)
    if x.ndim < 3:
        raise ValueError("dsplit only works on arrays of 3 or more dimensions")
    return split(x, indices_or_sections, 2)


def _host_index(index: Any, length: int) -> Any:
    """Positions along an axis as host numbers, none of them negative."""
    if isinstance(index, slice):
        return np.arange(length)[index]
    found = np.asarray(index.get() if isinstance(index, ndarray) else index)
    if found.dtype.kind == "b":
        if found.shape != (length,):
            raise IndexOutOfBounds(f"a bool array of shape {found.shape} for {length} elements")
        return np.flatnonzero(found)
    return found if found.size else found.astype(int)


def delete(arr: Any, indices: Any, axis: int | None = None) -> ndarray:
    """Without the elements at some places. Places on the device are waited for, as the shape of
    the result depends on them."""
    x = array_of(arr)
    if axis is None:
        x, axis = x.ravel(), 0
    at = axis_of(axis, x.ndim)
    length = x.shape[at]
    places = _host_index(indices, length)
    if np.any((places < -length) | (places >= length)):
        raise IndexOutOfBounds(f"index {indices} is out of bounds for {length} elements")
    left = np.delete(np.arange(length), places)
    return single("take", x, asarray(left, device=x.device), axis=at)


def insert(arr: Any, obj: Any, values: Any, axis: int | None = None) -> ndarray:
    """With values put in before some places."""
    x, more = array_of(arr), operand(values)
    if axis is None:
        x, axis = x.ravel(), 0
    at = axis_of(axis, x.ndim)
    length = x.shape[at]
    places = _host_index(obj, length)
    alone = not places.ndim
    new = array_of(more).astype(x.dtype)
    count = places.size
    if alone and new.ndim and (x.ndim == 1 or new.ndim >= x.ndim):
        new = moveaxis(new, 0, at) if x.ndim > 1 and new.ndim == x.ndim and at == 0 else new
        count = new.shape[at] if new.ndim == x.ndim else new.size
    flat = np.repeat(places.reshape(-1), count) if alone else places.reshape(-1)
    if np.any((flat < -length) | (flat > length)):
        raise IndexOutOfBounds(f"index {obj} is out of bounds for {length} elements")
    order = np.insert(np.arange(length), flat, length + np.arange(flat.size))
    shape = (*x.shape[:at], flat.size, *x.shape[at + 1 :])
    if new.ndim and new.ndim < x.ndim and alone:
        new = single("expand_dims", new, axis=at) if new.ndim == x.ndim - 1 else new
    joined = several("concat", (x, broadcast_to(new, shape)), axis=at)[0]
    return single("take", joined, asarray(order, device=x.device), axis=at)


def copyto(dst: ndarray, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    """Write values to an array, where a mask is true."""
    source = operand(src)
    kind = getattr(source, "dtype", None)
    if kind is not None and not np.can_cast(kind, dst.dtype, casting):  # type: ignore[arg-type]
        raise TypeError(f"{kind} is not cast to {dst.dtype} by the rule {casting}")
    if where is None or where is True:
        dst[...] = source
    else:
        dst[...] = single("where", array_of(where), source, dst).astype(dst.dtype)
