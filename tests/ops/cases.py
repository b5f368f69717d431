"""For every op of the catalogue: operands and parameters to try it with.

An op that is not in ``CASES``, or not in ``references.REFERENCE``, fails the tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.ops.case import ALL, CUBE, SHAPES, SOME, STRONG, WEAK, Case, Shape, square, values
from tests.ops.index_cases import ADVANCED, BASIC, MASKS, fills, getitems, searches, setitems

# -- elementwise -------------------------------------------------------------------------------


def unary() -> Iterator[Case]:
    for dtype, shape in itertools.product(ALL, SHAPES):
        yield Case((values(shape, dtype),))


def binary() -> Iterator[Case]:
    for left, right in itertools.product(ALL, ALL):
        yield Case((values((3,), left), values((3,), right, 1)))
    for dtype, scalar in itertools.product(ALL, WEAK + STRONG):
        yield Case((values((3,), dtype), scalar))
        yield Case((scalar, values((3,), dtype)))
    for a, b in itertools.product([*SHAPES, (1, 3), (2, 1), (4, 1, 1), (2,)], repeat=2):
        yield Case((values(a, "f4"), values(b, "f4", 1)))
    yield Case((values((3,), "u8"), (1 << 63) + 5))
    yield Case((values((3,), "f4"), (1 << 63) + 5))


def binary_inplace() -> Iterator[Case]:
    for case in binary():
        if isinstance(case.operands[0], np.ndarray):
            yield case


def where() -> Iterator[Case]:
    for cond, left, right in itertools.product(["b1", "i4", "f4"], SOME, SOME):
        yield Case((values((3,), cond), values((3,), left), values((3,), right, 1)))
    for dtype, scalar in itertools.product(ALL, WEAK + STRONG):
        yield Case((values((3,), "b1"), values((3,), dtype), scalar))
        yield Case((values((3,), "b1"), scalar, values((3,), dtype)))
    for left, right in itertools.product(WEAK, repeat=2):
        yield Case((values((2,), "b1"), left, right))
    for shapes in itertools.product([*SHAPES, (1, 3), (2, 1)], repeat=3):
        arrays = [values(s, d) for s, d in zip(shapes, ("b1", "f4", "f8"), strict=True)]
        yield Case(tuple(arrays))


def clip() -> Iterator[Case]:
    bounds: list[Any] = [1, 2.0, np.float32(2), np.int8(2), np.float64(1)]
    for dtype, low, high in itertools.product(ALL, bounds, bounds):
        yield Case((values((3,), dtype), low, high))
    for dtype, bound, side in itertools.product(ALL, bounds, ("min", "max")):
        yield Case((values((2, 3), dtype), bound), {"bounds": side})
    for dtype, other in itertools.product(SOME, SOME):
        x, low = values((2, 3), dtype), values((3,), other)
        yield Case((x, low, low))
        yield Case((x, low), {"bounds": "max"})
    yield Case((values((2, 3), "f4"), values((4,), "f4"), 1.0))


def rounding() -> Iterator[Case]:
    for dtype, decimals, shape in itertools.product(ALL, (0, 1, -1), SHAPES):
        yield Case((values(shape, dtype),), {"decimals": decimals})


def casts() -> Iterator[Case]:
    for source, target, shape in itertools.product(ALL, ALL, SHAPES):
        if source[0] != "c" or target[0] in "cb":  # What is refused: see test_inference.
            yield Case((values(shape, source),), {"dtype": target})


# -- reductions --------------------------------------------------------------------------------

AXES: list[Any] = [None, 0, 1, -1, (0, 1), (1, -1), (0, 2), (0, 0), (), 5]


def reductions(*extra: dict[str, Any], dtypes: Sequence[str] = ALL) -> Iterator[Case]:
    for dtype, shape in itertools.product(dtypes, SHAPES):
        for params in extra or ({},):
            yield Case((values(shape, dtype),), params)
    for shape in [*SHAPES, (2, 3, 4)]:
        for axis, keepdims in itertools.product(AXES, (False, True)):
            yield Case((values(shape, "f4"),), {"axis": axis, "keepdims": keepdims})


def sums() -> Iterator[Case]:
    yield from reductions({}, {"dtype": "f4"}, {"dtype": "i8"}, {"dtype": "c16"}, {"dtype": "b1"})


def means() -> Iterator[Case]:
    yield from reductions({}, {"dtype": "f4"}, {"dtype": "c16"})


def spreads() -> Iterator[Case]:
    yield from reductions({}, {"correction": 1}, {"correction": 0.5}, {"dtype": "f4"})


def positions() -> Iterator[Case]:
    yield from (c for c in reductions({}) if not isinstance(c.params.get("axis"), tuple))


def running() -> Iterator[Case]:
    for dtype, shape in itertools.product(ALL, SHAPES):
        yield Case((values(shape, dtype),))
        yield Case((values(shape, dtype),), {"dtype": "f8"})
        yield Case((values(shape, dtype),), {"axis": -1})
    for axis, initial in itertools.product((None, 0, 1, -2, 3), (False, True)):
        for shape in [(3,), (2, 3, 4), (2, 0, 3)]:
            yield Case((values(shape, "i4"),), {"axis": axis, "include_initial": initial})


# -- linear algebra ----------------------------------------------------------------------------


def products() -> Iterator[Case]:
    for left, right in itertools.product(ALL, ALL):
        yield Case((values((2, 3), left), values((3, 4), right)))
    shapes: list[Shape] = [
        (),
        (3,),
        (4,),
        (2, 3),
        (3, 4),
        (5, 2, 3),
        (5, 3, 2),
        (1, 3, 4),
        (4, 1, 2, 3),
        (0, 3),
        (3, 0),
    ]
    for a, b in itertools.product(shapes, shapes):
        yield Case((values(a, "f4"), values(b, "f4", 1)))


def vecdots() -> Iterator[Case]:
    yield from products()
    for a, b in itertools.product([(3,), (2, 3), (3, 2), (4, 1, 3), (3, 0)], repeat=2):
        for axis in (-1, 0, 1, -2):
            yield Case((values(a, "c8"), values(b, "c8", 1)), {"axis": axis})


def tensordots() -> Iterator[Case]:
    for left, right in itertools.product(ALL, ALL):
        yield Case((values((2, 3), left), values((3, 2), right)), {"axes": 1})
    axes: list[Any] = [0, 1, 2, 3, ((0,), (1,)), ((1, 0), (0, 1)), ((0, 1), (0,)), ((-1,), (0,))]
    for a, b in itertools.product([(2, 3), (3, 2), (2, 3, 4), (3, 4, 2), ()], repeat=2):
        for axis in axes:
            yield Case((values(a, "f4"), values(b, "f4", 1)), {"axes": axis})
        yield Case((values(a, "f4"), values(b, "f4", 1)))


def matrices(*extra: dict[str, Any]) -> Iterator[Case]:
    for params in extra or ({},):
        for dtype in ALL:
            yield Case((square((3, 3), dtype),), params)
        for shape in [(2, 3), (3, 2), (4, 2, 3), (0, 3), (3, 0), (0, 2, 2), (0, 0), (3,), ()]:
            yield Case((values(shape, "f4"),), params)
        yield Case((square((2, 5, 3, 3), "f8"),), params)
        yield Case((square((4, 2, 2), "c8"),), params)


def solves() -> Iterator[Case]:
    for left, right in itertools.product(ALL, ALL):
        yield Case((square((3, 3), left), values((3, 2), right)))
    for a, b in itertools.product(
        [(3, 3), (2, 3, 3), (4, 1, 3, 3), (2, 3), (3,)],
        [(3,), (3, 2), (2, 3), (2, 3, 1), (5, 1, 3, 2), (4,), (), (3, 0)],
    ):
        x = square(a, "f8") if len(a) > 1 and a[-1] == a[-2] else values(a, "f8")
        yield Case((x, values(b, "f8")))


def norms() -> Iterator[Case]:
    orders: tuple[dict[str, Any], ...] = (
        {},
        {"ord": 1},
        {"ord": 0},
        {"ord": 3},
        {"ord": 2.5},
        {"ord": math.inf},
        {"ord": -math.inf},
        {"ord": -1},
    )
    for params in orders:
        yield from (
            Case(c.operands, {**params, **c.params})
            for c in reductions(dtypes=[d for d in ALL if d != "b1"])
        )


def matrix_norms() -> Iterator[Case]:
    for order in ("fro", "nuc", 1, -1, 2, -2, math.inf, -math.inf):
        for keepdims in (False, True):
            for dtype in ("i4", "f4", "f8", "c8"):
                params = {"ord": order, "keepdims": keepdims}
                yield Case((square((2, 3, 3), dtype),), params)
                yield Case((values((2, 4), dtype),), params)
        yield Case((values((3,), "f4"),), {"ord": order})
    yield Case((values((2, 3), "f8"),))


# -- manipulation ------------------------------------------------------------------------------


def moved(*params: dict[str, Any], shapes: Sequence[Shape] = (CUBE,)) -> Iterator[Case]:
    """Every parameter set with every shape, plus all dtypes with the first of each."""
    for shape, given in itertools.product(shapes, params):
        yield Case((values(shape, "f4"),), given)
    for dtype in ALL:
        yield Case((values(shapes[0], dtype),), params[0])


def axis_params(*axes: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"axis": axis, **more} for axis in axes]


def shape_params(*shapes: Any) -> list[dict[str, Any]]:
    return [{"shape": shape} for shape in shapes]


def sorts(descending: Sequence[bool] = (False,)) -> Iterator[Case]:
    for dtype, down in itertools.product(ALL, descending):
        yield Case((values((4, 5), dtype),), {"descending": down})
    for axis, down, stable in itertools.product((0, 1, -1, 2), (False, True), (False, True)):
        # Without the promise to be stable, equal elements may come in any order: avoid them.
        x = values((4, 5), "i4")
        if not stable:
            x = np.random.default_rng(0).permutation(20).reshape(4, 5)
        yield Case((x,), {"axis": axis, "descending": down, "stable": stable})
    yield Case((values((), "f4"),))
    yield Case((values((0, 3), "f4"),), {"axis": 0, "descending": True})


def joins() -> Iterator[Case]:
    for left, right in itertools.product(ALL, ALL):
        yield Case((values((2, 3), left), values((2, 3), right)))
    groups: list[list[Shape]] = [
        [(2, 3), (4, 3)],
        [(2, 3), (2, 4)],
        [(2, 3), (2,)],
        [(3,), (0,), (2,)],
        [(), ()],
        [(2, 3)],
        [(2, 3)] * 40,
    ]
    for shapes in groups:
        for axis in (0, 1, -1, 2, -3):
            yield Case(tuple(values(s, "f4") for s in shapes), {"axis": axis})


def concats() -> Iterator[Case]:
    yield from joins()
    yield Case((values((2, 3), "f4"), values((4,), "i4"), values((), "i2")), {"axis": None})


def takes() -> Iterator[Case]:
    for dtype, index in itertools.product(ALL, ["i1", "i4", "i8", "u1", "u4", "f4", "u8"]):
        yield Case((values((4, 3), dtype), np.array([[0, 1], [2, 0]], index)), {"axis": 0})
    for axis in (None, 0, 1, -1, 2):
        for indices in (np.array(1), np.array([0, -1, 1]), np.zeros((0, 2), int)):
            yield Case((values((2, 3), "f4"), indices), {"axis": axis})
            yield Case((values((0, 3), "f4"), indices), {"axis": axis})


def takes_along() -> Iterator[Case]:
    for dtype, index in itertools.product(ALL, ["i4", "i8", "u1", "f4", "b1"]):
        yield Case((values((4, 3), dtype), np.ones((4, 2), index)), {"axis": 1})
    for axis in (0, 1, -1, 2):
        for shape in [(2, 3), (1, 3), (2, 1), (1, 1), (2,), (5, 3)]:
            yield Case((values((2, 3), "f4"), np.zeros(shape, int)), {"axis": axis})


# -- creation ----------------------------------------------------------------------------------


def filled() -> Iterator[Case]:
    yield Case((), {"shape": (2, 3)})
    for dtype, shape in itertools.product(ALL, SHAPES):
        yield Case((), {"shape": shape, "dtype": dtype})


def full() -> Iterator[Case]:
    for scalar in WEAK + STRONG + [(1 << 63) + 1, values((), "f4"), values((), "i2")]:
        yield Case((scalar,), {"shape": (2, 3)})
        for dtype in ALL:
            if np.iscomplexobj(scalar) <= (dtype[0] == "c") and not (
                isinstance(scalar, int) and scalar > 1 << 62 and dtype[0] in "iu" and dtype != "u8"
            ):
                yield Case((scalar,), {"shape": (3,), "dtype": dtype})


def aranges() -> Iterator[Case]:
    ranges: list[tuple[Any, Any, Any]] = [
        (0, 5, 1),
        (5, 0, -2),
        (0, 5, -1),
        (2, 2, 1),
        (0.0, 1.0, 0.1),
        (1, 2.5, 0.3),
        (0, 7, 3),
        (np.float32(0), np.float32(1), np.float32(0.1)),
        (np.int8(0), np.int8(9), np.int8(2)),
        (0, np.float32(1), 0.1),
        (0.0, 1e-30, 1e300),
        (-3.5, 3, 1),
        (10, 1, -2.5),
    ]
    for start, stop, step in ranges:
        length = len(np.arange(start, stop, step))
        yield Case((start, stop, step), {"length": length})
        for dtype in ("i4", "f4", "f8", "u2"):
            if dtype != "u2" or min(start, stop) >= 0:
                yield Case((start, stop, step), {"length": length, "dtype": dtype})


def linspaces() -> Iterator[Case]:
    for ends in [(0, 1), (0.5, 2.0), (np.float32(0), np.float32(1)), (0, 1j), (3, -3)]:
        for num, endpoint in itertools.product((0, 1, 2, 7), (True, False)):
            yield Case(ends, {"num": num, "endpoint": endpoint})
        yield Case(ends, {"num": 5, "dtype": "c8"})
    for dtype in ("i4", "f4", "f8"):
        yield Case((0, 10), {"num": 5, "dtype": dtype})
    yield Case((0, 1), {"num": -1})


def eyes() -> Iterator[Case]:
    yield Case((), {"n_rows": 3})
    for rows, columns, k in itertools.product((0, 2, 4), (0, 3), (-1, 0, 2, 9)):
        yield Case((), {"n_rows": rows, "n_cols": columns, "k": k, "dtype": "f4"})
    for dtype in ALL:
        yield Case((), {"n_rows": 2, "dtype": dtype})


def randoms() -> Iterator[Case]:
    for dtype, shape, seed in itertools.product(
        ("f2", "f4", "f8"), SHAPES, (0, 5, -1, (1 << 63) + 1)
    ):
        yield Case((seed,), {"shape": shape, "dtype": dtype})
    yield Case((1,), {"shape": (2,)})


def draws() -> Iterator[Case]:
    for method, parameters in _DRAWN.items():
        for shape, seed in itertools.product(((), (3,), (2, 3), (0,)), (0, 5, -1, (1 << 63) + 1)):
            yield Case((seed, *parameters), {"method": method, "shape": shape})
        arrays = [np.full((3,), value) for value in parameters]
        yield Case((1, *arrays), {"method": method, "shape": (2, 3)})
        if arrays:
            yield Case((1, arrays[0], *parameters[1:]), {"method": method, "shape": (3,)})
            yield Case((1, *arrays), {"method": method, "shape": (2,)})
            yield Case(
                (1, *(np.array(value) for value in parameters)), {"method": method, "shape": ()}
            )
    for dtype in ALL:
        yield Case((1,), {"method": "random", "shape": (2,), "dtype": dtype})
        yield Case((1, 2, 5), {"method": "integers", "shape": (2,), "dtype": dtype})
    yield Case((1, -2, 5), {"method": "integers", "shape": (2,), "dtype": "i1"})
    for low, high in ((-(1 << 63), (1 << 63) - 1), (0, (1 << 32) - 1), (-5, 1 << 40), (3, 3)):
        yield Case((1, low, high), {"method": "integers", "shape": (2, 2)})
    yield Case((1, 1j), {"method": "poisson", "shape": (2,)})
    yield Case((1,), {"method": "spawn", "shape": (2,)})


_DRAWN: dict[str, tuple[Any, ...]] = {
    "random": (),
    "standard_normal": (),
    "standard_exponential": (),
    "standard_gamma": (2.0,),
    "beta": (2.0, 3.0),
    "vonmises": (0.5, 2.0),
    "integers": (-3, 8),
    "binomial": (5, 0.5),
    "geometric": (0.5,),
    "hypergeometric": (5, 4, 3),
    "logseries": (0.5,),
    "poisson": (2.5,),
    "zipf": (2.5,),
}


def readings() -> Iterator[Case]:
    for source, target, shape in itertools.product(ALL, ALL, SHAPES):
        if target != "b1":  # not every byte is a bool
            yield Case((values(shape, source),), {"dtype": target})


# -- the tables --------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    return text.split()


UNARY = names(
    """
    negative positive abs sign sqrt square reciprocal exp exp2 expm1 log log1p log2 log10
    sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh floor ceil trunc isnan isinf
    isfinite signbit logical_not bitwise_invert conj rint cbrt deg2rad rad2deg fabs spacing
    bitwise_count
    """
)
BINARY = names(
    """
    add subtract multiply divide floor_divide remainder power maximum minimum fmax fmin
    atan2 hypot logaddexp copysign nextafter equal not_equal less less_equal greater
    greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor
    bitwise_left_shift bitwise_right_shift fmod float_power logaddexp2 ldexp heaviside gcd lcm
    """
)

CASES: dict[str, Callable[[], Iterator[Case]]] = {
    **dict.fromkeys([*UNARY, "real", "imag", "copy"], unary),
    **dict.fromkeys(BINARY, binary),
    **{f"{name}_": binary_inplace for name in BINARY},
    "where": where,
    "clip": clip,
    "round": rounding,
    "astype": casts,
    "view": readings,
    **dict.fromkeys(["sum", "prod"], sums),
    "mean": means,
    **dict.fromkeys(["var", "std"], spreads),
    **dict.fromkeys(["any", "all", "max", "min", "count_nonzero"], reductions),
    **dict.fromkeys(["argmax", "argmin"], positions),
    **dict.fromkeys(["cumulative_sum", "cumulative_prod"], running),
    "matmul": products,
    "vecdot": vecdots,
    "outer": products,
    "tensordot": tensordots,
    "svd": lambda: matrices({}, {"full_matrices": False}),
    **dict.fromkeys(["svdvals", "inv", "det", "slogdet", "qr_r"], matrices),
    **dict.fromkeys(["eigh", "eigvalsh"], lambda: matrices({}, {"uplo": "U"})),
    **dict.fromkeys(["eig", "eigvals"], matrices),
    "qr": lambda: matrices({}, {"mode": "complete"}, {"mode": "raw"}),
    "cholesky": lambda: (
        case
        for case in matrices({}, {"upper": True})
        if case.operands[0].shape[-1:] == case.operands[0].shape[-2:-1] or case.operands[0].ndim < 2
    ),
    "pinv": lambda: matrices({}, {"rtol": 1e-3}),
    "solve": solves,
    "norm": norms,
    "matrix_norm": matrix_norms,
    "reshape": lambda: moved(
        *shape_params((4, 6), (-1,), (2, -1, 2), 24, (5, 5), (-1, -1), (0, -1), (), (24, 1)),
        shapes=(CUBE, (0, 3), ()),
    ),
    "permute_dims": lambda: moved(
        {}, {"axes": (2, 0, 1)}, {"axes": (0, 1)}, {"axes": (0, 0, 1)}, {"axes": (-1, -2, -3)}
    ),
    "broadcast_to": lambda: moved(
        *shape_params((2, 3), (4, 2, 3), (3,), (2, 4), (2, 3, 1), (0, 2, 3)),
        shapes=((2, 3), (1, 3), (), (0,)),
    ),
    "squeeze": lambda: moved(
        {}, *axis_params(0, (0, 2), 1, (), -1, None), shapes=((1, 3, 1), CUBE, (1,), ())
    ),
    "expand_dims": lambda: moved(*axis_params(0, -1, 2, (0, 1), (0, -1), (0, 0), 9)),
    "flip": lambda: moved({}, *axis_params(0, (0, 2), -1, 3, ()), shapes=(CUBE, ())),
    "diagonal": lambda: moved(
        {},
        {"offset": 1},
        {"offset": -5},
        {"axis1": 2, "axis2": 0},
        {"axis1": 1, "axis2": 1},
        shapes=(CUBE, (3, 3), (3,)),
    ),
    "roll": lambda: moved(
        {"shift": 1},
        {"shift": (1, 2), "axis": (0, 1)},
        {"shift": 1, "axis": (0, 1)},
        {"shift": -7, "axis": -1},
        {"shift": 1, "axis": 3},
        {"shift": (1, 2), "axis": 0},
    ),
    "repeat": lambda: moved(
        {"repeats": 2},
        {"repeats": 0},
        {"repeats": 3, "axis": 1},
        {"repeats": 2, "axis": 4},
        {"repeats": -1},
    ),
    "tile": lambda: moved(
        {"reps": 2},
        {"reps": (2, 1)},
        {"reps": (2, 1, 1, 3)},
        {"reps": (0,)},
        {"reps": ()},
        {"reps": (1, 1)},
        {"reps": -1},
    ),
    **dict.fromkeys(
        ["tril", "triu"],
        lambda: moved({}, {"k": 1}, {"k": -9}, shapes=((3, 3), CUBE, (0, 2))),
    ),
    "sort": lambda: sorts((False, True)),
    "argsort": sorts,
    "concat": concats,
    "stack": joins,
    "take": takes,
    "take_along_axis": takes_along,
    **dict.fromkeys(["empty", "zeros", "ones"], filled),
    "full": full,
    "arange": aranges,
    "linspace": linspaces,
    "eye": eyes,
    **dict.fromkeys(["random_uniform", "random_normal"], randoms),
    "random_draw": draws,
    "getitem": lambda: getitems(BASIC),
    "getitem_advanced": lambda: getitems(ADVANCED),
    "getitem_mask": lambda: getitems(MASKS),
    "setitem": setitems,
    "fill_": fills,
    "nonzero": searches,
    "unique_values": lambda: searches({}, {"equal_nan": False}),
}
"""What to try each op with."""
