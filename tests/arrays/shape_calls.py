"""As ``calls``: functions that make arrays, move, pick or write elements, and products."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.arrays.calls import Maker, call, each
from tests.arrays.drawing import Call, Draw

__all__ = ["CREATION", "INPLACE", "PRODUCTS", "SELECTION", "SHAPES"]

CREATION: dict[str, Maker] = {
    **each("zeros ones", lambda d: call(d.shape(), d.dtype("biufch"))),
    **each(
        "zeros_like ones_like", lambda d: call(d.array("biufc"), **d.some(dtype=lambda: np.int32))
    ),
    "full": lambda d: call(d.shape(), d.scalar("bif"), **d.some(dtype=lambda: np.float32)),
    "full_like": lambda d: call(d.array("f"), d.scalar("bif")),
    "eye": lambda d: call(
        d.number(0, 4), d.choice([None, 2, 3]), k=d.number(-2, 2), dtype=d.dtype("bifc")
    ),
    "identity": lambda d: call(d.number(0, 4), d.dtype("bifc")),
    "arange": lambda d: call(
        *d.choice([(5,), (1, 7), (0, 3, 0.5), (5, 0, -2)]), **d.some(dtype=lambda: np.float32)
    ),
    "linspace": lambda d: call(
        d.choice([0, -1.5]), d.choice([3, 2.5, 1j]), d.number(0, 6), endpoint=d.flag()
    ),
    "logspace": lambda d: call(0, 2, d.number(1, 5), **d.some(base=lambda: 2.0, endpoint=d.flag)),
    "geomspace": lambda d: call(1, 100, d.number(1, 5)),
    "tri": lambda d: call(d.number(0, 4), d.choice([None, 3]), d.number(-2, 2), d.dtype("bif")),
    **each("tril triu", lambda d: call(d.array("bifc", 1, 3), d.number(-2, 2))),
    "diag": lambda d: call(d.array("if", 1, 2), d.number(-2, 2)),
    "diagflat": lambda d: call(d.array("if"), d.number(-2, 2)),
    "vander": lambda d: call(
        d.array("if", 1, 1), **d.some(N=lambda: d.number(0, 4), increasing=d.flag)
    ),
    "meshgrid": lambda d: call(
        *(d.array("if", 0, 1) for _ in range(d.number(1, 3))),
        sparse=d.flag(),
        indexing=d.choice(["xy", "ij"]),
    ),
    "indices": lambda d: call(d.shape(1, 3)),
    "fromfunction": lambda d: call(lambda i, j: i * 2 + j, (d.number(1, 3), d.number(1, 3))),
    **each(
        "array asarray asanyarray ascontiguousarray asfortranarray copy require",
        lambda d: call(d.array("biufch")),
    ),
    **each("asarray_chkfinite", lambda d: call(d.array("bif"))),
    "frombuffer": lambda d: call(bytes(range(16)), d.choice(["u1", "i4", "f4"])),
    "fromiter": lambda d: call([1, 2, 3], d.dtype("if")),
    **each("bartlett blackman hamming hanning", lambda d: call(d.number(0, 7))),
    "kaiser": lambda d: call(d.number(1, 7), d.choice([0.0, 5.0, 14.0])),
}


def with_axis(least: int, kinds: str = "biufc", none: bool = False) -> Maker:
    def make(d: Draw) -> Call:
        x = d.array(kinds, least, 3)
        return call(x, d.axis(x.ndim, none=none))

    return make


def only(least: int, most: int = 3, kinds: str = "biufc") -> Maker:
    return lambda d: call(d.array(kinds, least, most))


def like(d: Draw, axis: int | None = None) -> list[Any]:
    """Arrays that differ in the length of one axis only, and in dtype."""
    first = d.array("biufc", 1, 3)
    found = [first]
    for _ in range(d.number(0, 2)):
        lengths = list(first.shape)
        if axis is not None:
            lengths[axis] = d.number(0, 3)
        found.append(d.array("biufc", shape=tuple(lengths)))
    return found


def reshape(d: Draw) -> Call:
    x = d.array("bifc")
    options: list[Any] = [-1, x.shape[::-1], (1, *x.shape), (x.size, 1)]
    return call(x, d.choice(options), **d.some(order=lambda: d.choice(["C", "F"])))


def moves(d: Draw) -> Call:
    x = d.array("if", 1, 3)
    source = d.axis(x.ndim, none=False)
    pairs: list[Any] = [(source, d.axis(x.ndim, none=False))]
    if x.ndim > 1:
        pairs.append(((0, 1), (-1, 0)))
    return call(x, *d.choice(pairs))


def padded(d: Draw) -> Call:
    x = d.array("if", 1, 2, empty=False)
    widths: Any = d.choice([1, (1, 2), tuple((d.number(0, 2), 1) for _ in range(x.ndim))])
    mode = d.choice(["constant", "edge", "reflect", "symmetric", "wrap", "maximum", "mean"])
    if mode == "constant":
        return call(x, widths, mode, **d.some(constant_values=lambda: 7))
    return call(x, widths, mode)


def splits(d: Draw) -> Call:
    x = d.array("if", 3, 3)
    return call(x, d.choice([1, [1], [0, 2, 3]]))


def repeats(d: Draw) -> Call:
    x = d.array("if")
    axis = d.axis(x.ndim)
    length = x.size if axis is None else x.shape[axis]
    return call(x, d.choice([2, 0, [k % 3 for k in range(length)] if length > 1 else 1]), axis)


def deleted(d: Draw) -> Call:
    x = d.array("if", 1, 2, empty=False)
    axis = d.axis(x.ndim)
    return call(x, d.choice([0, -1, [0, 0], slice(0, 2)]), axis)


SHAPES: dict[str, Maker] = {
    "reshape": reshape,
    "ravel": lambda d: call(d.array("bifc"), **d.some(order=lambda: d.choice(["C", "F"]))),
    "transpose": lambda d: call(x := d.array("if"), d.choice([None, tuple(range(x.ndim))])),
    "permute_dims": lambda d: call(x := d.array("if"), tuple(reversed(range(x.ndim)))),
    "matrix_transpose": only(2),
    "swapaxes": lambda d: call(
        x := d.array("if", 1), d.axis(x.ndim, none=False), d.axis(x.ndim, none=False)
    ),
    "moveaxis": moves,
    "rollaxis": lambda d: call(
        x := d.array("if", 1), d.axis(x.ndim, none=False), d.number(0, x.ndim)
    ),
    "expand_dims": lambda d: call(d.array("if", 0, 2), d.choice([0, -1, (0, 1)])),
    "squeeze": lambda d: call(
        d.array("if", shape=(1, d.number(0, 3), 1)), d.choice([None, 0, (0, 2)])
    ),
    "atleast_1d": only(0),
    "atleast_2d": only(0),
    "atleast_3d": only(0),
    "broadcast_to": lambda d: call(x := d.array("if", 0, 2), (2, *x.shape)),
    "broadcast_arrays": lambda d: call(x := d.array("if"), np.asarray(d.beside(x, array=True))),
    "flip": lambda d: call(x := d.array("if"), d.axes(x.ndim)),
    "flipud": only(1),
    "fliplr": only(2),
    "rot90": lambda d: call(d.array("if", 2), d.number(-1, 5)),
    "roll": lambda d: call(x := d.array("if"), d.number(-5, 5), d.axis(x.ndim)),
    "repeat": repeats,
    "tile": lambda d: call(d.array("if"), d.choice([2, (2, 3), (1, 0)])),
    "resize": lambda d: call(d.array("if"), d.choice([(3,), (2, 5), (0,)])),
    "pad": padded,
    "packbits": lambda d: call(
        x := d.array("bu", 1, dtype=d.choice(["bool", "uint8"])), d.axis(x.ndim)
    ),
    "unpackbits": lambda d: call(x := d.array("u", 1, dtype="uint8"), d.axis(x.ndim)),
    "trim_zeros": lambda d: call(d.array("if", 1, 1, low=0, high=1), d.choice(["fb", "f", "b"])),
    **each("concatenate concat", lambda d: call(like(d, 0), axis=d.choice([0, 0, None]))),
    "stack": lambda d: call(like(d), d.choice([0, -1])),
    "vstack": lambda d: call([d.array("if", shape=(3,)) for _ in range(2)]),
    "hstack": lambda d: call(like(d, 0)) if d.flag() else call([d.array("if", 2, 2)] * 2),
    "dstack": lambda d: call(like(d)),
    "column_stack": lambda d: call([d.array("if", shape=(3,)), d.array("if", shape=(3, 2))]),
    "append": lambda d: call(x := d.array("if", 1), d.choice([x, x.reshape(-1)])),
    "unstack": lambda d: call(x := d.array("if", 1), axis=d.axis(x.ndim, none=False)),
    "array_split": lambda d: call(d.array("if", 1), d.choice([2, 3, [1, 2]])),
    "split": splits,
    "vsplit": splits,
    "hsplit": splits,
    "dsplit": splits,
    "delete": deleted,
    "insert": lambda d: call(d.array("if", 1, 1), d.number(0, 0), d.choice([7, [1, 2]])),
    "apply_along_axis": lambda d: call(
        lambda row: row.sum() * 2, d.number(0, 1), d.array("if", 2, 2, empty=False)
    ),
    "apply_over_axes": lambda d: call(
        lambda x, axis: x.sum(axis), d.array("if", 2, 3, empty=False), [0, 1]
    ),
}


def taken(d: Draw) -> Call:
    x = d.array("ifc", 1, 3, empty=False)
    axis = d.axis(x.ndim)
    length = x.size if axis is None else x.shape[axis]
    return call(x, d.array("i", 0, 2, low=-length, high=length - 1), axis)


def along(d: Draw) -> Call:
    x = d.array("if", 1, 3, empty=False)
    axis = d.axis(x.ndim, none=False)
    return call(x, d.array("i", shape=x.shape, low=0, high=x.shape[axis] - 1, dtype="int64"), axis)


def compressed(d: Draw) -> Call:
    x = d.array("if", 1, 2)
    axis = d.axis(x.ndim)
    length = x.size if axis is None else x.shape[axis]
    return call(d.array("b", shape=(length,)), x, axis)


def ordered(kinds: str = "biuf") -> Maker:
    return lambda d: call(x := d.array(kinds, 1), d.axis(x.ndim))


def uniques(d: Draw) -> Call:
    flags = {f"return_{name}": d.flag() for name in ("index", "inverse", "counts")}
    x = d.array("bif", 0, 2)
    return call(x, **flags, **(d.some(axis=lambda: 0) if x.ndim and x.size else {}))


def grid(d: Draw) -> tuple[Any, tuple[int, ...]]:
    dims = d.choice([(3, 4), (5,), (2, 3, 4)])
    return tuple(d.array("i", shape=(4,), low=0, high=n - 1, dtype="int64") for n in dims), dims


SELECTION: dict[str, Maker] = {
    "take": taken,
    "take_along_axis": along,
    "compress": compressed,
    "extract": lambda d: call(d.array("b", shape=(s := d.shape())), d.array("if", shape=s)),
    "diagonal": lambda d: call(d.array("if", 2), d.number(-2, 2)),
    "trace": lambda d: call(
        d.array("bifc", 2), d.number(-2, 2), **d.some(dtype=lambda: "complex128")
    ),
    "sort": ordered("biufc"),
    "argsort": lambda d: call(np.arange(6.0)[:: d.choice([1, -1])].reshape(2, 3), d.axis(2)),
    "msort": only(1, 2, "if"),
    "lexsort": lambda d: call(d.array("i", shape=(2, 5), low=0, high=3)),
    "partition": lambda d: call(x := d.array("if", 1, 1, empty=False), d.number(0, x.size - 1)),
    "argpartition": lambda d: call(np.arange(7.0)[::-1].copy(), 6),
    "searchsorted": lambda d: call(
        np.array([-3.0, 0, 2, 5]), d.choice([d.array("if"), 1.5]), d.choice(["left", "right"])
    ),
    **each("nonzero", only(1)),
    **each("flatnonzero argwhere", only(0)),
    **each("isin", lambda d: call(d.array("if"), d.array("if"), invert=d.flag())),
    "unique": uniques,
    **each("unique_all unique_counts unique_inverse unique_values", lambda d: call(d.array("bif"))),
    **each(
        "union1d intersect1d setdiff1d setxor1d",
        lambda d: call(d.array("if", 1, 2), d.array("if", 1, 2)),
    ),
    "ix_": lambda d: call(d.array("i", 1, 1, dtype="int64"), d.array("b", 1, 1)),
    "diag_indices": lambda d: call(d.number(0, 4)),
    "diag_indices_from": lambda d: call(d.array("f", shape=(3, 3))),
    "mask_indices": lambda d: call(3, lambda m, k: m * (k + 1)),
    **each("tril_indices triu_indices", lambda d: call(d.number(0, 4), d.number(-1, 1))),
    **each("tril_indices_from triu_indices_from", lambda d: call(d.array("f", shape=(3, 2)))),
    "unravel_index": lambda d: call(
        d.array("i", low=0, high=11, dtype="int64"), (3, 4), **d.some(order=lambda: "F")
    ),
    "ravel_multi_index": lambda d: call(*grid(d), **d.some(mode=lambda: "wrap")),
}


def matrices(d: Draw) -> Call:
    n = d.number(0, 3)
    left: list[Any] = [(n,), (2, n), (3, 2, n)]
    right: list[Any] = [(n,), (n, 2), (3, n, 2)]
    return call(d.array("iufc", shape=d.choice(left)), d.array("iufc", shape=d.choice(right)))


def dots(d: Draw) -> Call:
    n = d.number(0, 3)
    left: list[Any] = [(), (n,), (2, n), (3, 2, n)]
    right: list[Any] = [(), (n,), (n, 2), (3, n, 2)]
    return call(d.array("ifc", shape=d.choice(left)), d.array("ifc", shape=d.choice(right)))


def pair(kinds: str = "ifc") -> Maker:
    return lambda d: call(d.array(kinds), d.array(kinds))


def same_shape(kinds: str = "ifc") -> Maker:
    return lambda d: call(x := d.array(kinds, 1), d.array(kinds, shape=x.shape))


def crossed(d: Draw) -> Call:
    shapes: list[Any] = [((3,), (3,)), ((2, 3), (3,)), ((2, 3), (2, 3))]
    a, b = d.choice(shapes)
    return call(d.array("if", shape=a), d.array("if", shape=b))


SUBSCRIPTS = [
    "ij,jk",
    "ij,jk->ik",
    "ij,kj->ik",
    "ii",
    "ii->i",
    "ij->ji",
    "...j,j",
    "ij,ij->",
    "i,j",
]


def sums(d: Draw) -> Call:
    text = d.choice(SUBSCRIPTS)
    lengths = {letter: d.number(1, 3) for letter in "ijk"}
    shapes = [
        tuple(lengths[letter] for letter in term.replace("...", "i"))
        for term in text.partition("->")[0].split(",")
    ]
    return call(text, *(d.array("ifc", shape=shape) for shape in shapes))


PRODUCTS: dict[str, Maker] = {
    "matmul": matrices,
    "dot": dots,
    "inner": lambda d: call(d.array("ifc", shape=(2, 3)), d.array("ifc", shape=(4, 3))),
    "outer": pair(),
    "vdot": same_shape(),
    "vecdot": same_shape(),
    "tensordot": lambda d: (
        call(
            d.array("ifc", shape=(2, 3, 4)),
            d.array("ifc", shape=(3, 4, 2)),
            d.choice([2, 0, ((1,), (0,)), ((1, 2), (0, 1)), (0, 2)]),
        )
        if d.flag()
        else call(d.array("f", shape=(2, 3)), d.array("f", shape=(3, 2)), 1)
    ),
    "kron": pair("if"),
    "cross": crossed,
    "einsum": sums,
    "polyval": lambda d: call(d.array("if", 1, 1, empty=False), d.array("if")),
    **each("polyadd polysub", lambda d: call(d.array("if", 1, 1), d.array("if", 1, 1))),
    "polymul": lambda d: call(
        d.array("if", 1, 1, empty=False, low=1), d.array("if", 1, 1, empty=False, low=1)
    ),
    "polyfit": lambda d: call(
        np.array([0.0, 1, 2, 3, 5]), d.array("f", shape=d.choice([(5,), (5, 2)])), d.number(0, 2)
    ),
    "poly": lambda d: call(d.array("f", 1, 1)),
    "roots": lambda d: call(d.choice([[1.0, -6, 11, -6], [2.0, -4], [0.0, 1, -1, 0]])),
}


def written(index: Maker, *options: dict[str, Any]) -> Maker:
    def make(d: Draw) -> Call:
        made = index(d)
        return Call(made.args, {**made.kwargs, **(d.choice(options) if options else {})})

    return make


INPLACE: dict[str, Maker] = {
    "put": written(
        lambda d: call(d.array("if", shape=(2, 4)), [0, 3, 5], d.choice([7, [1, 2, 3]])),
        {"mode": "wrap"},
        {"mode": "clip"},
    ),
    "place": lambda d: call(x := d.array("if", shape=(2, 4)), x > 0, np.array([5, 6], x.dtype)),
    "putmask": lambda d: call(x := d.array("if", shape=(2, 4)), x > 0, x * 2),
    "put_along_axis": lambda d: call(
        d.array("if", shape=(2, 4)), np.array([[0, 2], [1, 3]]), 9, d.choice([1, -1])
    ),
    "fill_diagonal": lambda d: call(d.array("if", shape=(3, 3)), d.choice([7, 2]), wrap=d.flag()),
    "copyto": lambda d: call(
        x := d.array("f", shape=(2, 3), dtype="float64"),
        d.choice([2.5, x * 2]),
        **d.some(where=lambda: x > 0),
    ),
}
"""These write to their first argument."""
