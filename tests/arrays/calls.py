"""For every function of the namespace that NumPy has too: calls to compare the two by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from tests.arrays.drawing import Call, Draw

__all__ = ["CALLS"]

Maker: TypeAlias = Callable[[Draw], Call]


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


# -- elementwise --------------------------------------------------------------------------------


def unary(kinds: str, low: int = -9, high: int = 9, *, nan: bool = True) -> Maker:
    return lambda d: call(d.array(kinds, nan=nan, low=low, high=high))


def binary(left: str, right: str = "", **kwargs: Any) -> Maker:
    def make(d: Draw) -> Call:
        x = d.array(left, nan=True, **kwargs)
        pair = (x, d.beside(x, right or left, **kwargs))
        return call(*(pair if d.flag() or right else pair[::-1]))

    return make


def each(names: str, make: Maker) -> dict[str, Maker]:
    return dict.fromkeys(names.split(), make)


ELEMENTWISE: dict[str, Maker] = {
    **each("absolute conjugate isfinite isinf isnan square logical_not angle", unary("biufc")),
    **each("positive reciprocal sign sqrt log log10 log2 exp", unary("iufc")),
    **each("sin cos tan sinh cosh tanh arcsinh arctan log1p expm1", unary("iuf")),
    **each("arcsin arccos arctanh", unary("f", -1, 1)),
    "arccosh": unary("f", 1),
    **each("ceil floor trunc rint fix signbit", unary("biuf")),
    **each("exp2 cbrt deg2rad rad2deg fabs spacing i0 sinc isneginf isposinf", unary("f")),
    **each("invert", unary("biu")),
    "negative": unary("iufc"),
    "bitwise_count": unary("iu"),
    "real": unary("biufc"),
    "imag": unary("biufc"),
    **each("iscomplex isreal iscomplexobj isrealobj isscalar ndim shape size", unary("bifc")),
    "modf": unary("f"),
    "frexp": unary("f"),
    "nan_to_num": lambda d: call(
        d.array("bifc", nan=True), **d.some(nan=lambda: 1.5, posinf=lambda: 3.0)
    ),
    "real_if_close": unary("fc"),
    "sort_complex": unary("ifc", nan=False),
    **each("add multiply equal not_equal logical_and logical_or logical_xor", binary("biufc")),
    **each("subtract", binary("iufc")),
    **each("divide", binary("iufc")),
    **each("maximum minimum fmax fmin less less_equal greater greater_equal", binary("biuf")),
    **each("floor_divide remainder fmod divmod", binary("f")),
    **each("arctan2 hypot logaddexp logaddexp2 copysign nextafter heaviside", binary("f")),
    **each("float_power", binary("f", low=0, high=4)),
    **each("power", binary("f", low=0, high=4)),
    "ldexp": binary("f", "i"),
    **each("gcd lcm", binary("iu")),
    **each("bitwise_and bitwise_or bitwise_xor", binary("biu")),
    **each("left_shift right_shift", binary("i", "i", low=0, high=5)),
    "isclose": lambda d: call(
        x := d.array("if", nan=True), d.beside(x, "if"), **d.some(rtol=lambda: 0.1)
    ),
    "round": lambda d: call(d.array("ifc"), d.number(-1, 2)),
    "clip": lambda d: call(d.array("iuf"), *d.choice([(1, 3), (None, 2), (1, None), (2.0, 3.0)])),
    "where": lambda d: call(x := d.array("b"), d.beside(x), d.beside(x)),
    "allclose": lambda d: call(x := d.array("f"), d.choice([x, x + 1])),
    "array_equal": lambda d: call(
        x := d.array("fi", nan=True), d.choice([x, x + 1, x.reshape(-1)]), equal_nan=d.flag()
    ),
    "array_equiv": lambda d: call(x := d.array("fi"), d.choice([x, x + 1])),
    "astype": lambda d: call(d.array("biuf"), d.dtype("iufc")),
    "select": lambda d: call(
        [(x := d.array("if", 1, 1)) > 3, x < -2], [x * 2, d.scalar("if")], d.scalar("i")
    ),
    "piecewise": lambda d: call(
        x := d.array("f", 1, 2), [x < 0, x >= 2], [lambda v: v * 2, lambda v: v + 1]
    ),
    "choose": lambda d: call(
        d.array("i", 1, 1, low=0, high=2, shape=(4,)),
        [d.array("if", shape=(4,)) for _ in range(3)],
    ),
    "interp": lambda d: call(
        d.array("f"),
        np.array([0.0, 1, 4]),
        d.array("f", shape=(3,)),
        **d.some(left=lambda: -1.0, right=lambda: 7.0),
    ),
    "unwrap": lambda d: call(x := d.array("f", 1, empty=False), axis=d.axis(x.ndim, none=False)),
}


# -- reductions ---------------------------------------------------------------------------------


def reduction(kinds: str, *, empty: bool = True, nan: bool = True, **more: Any) -> Maker:
    def make(d: Draw) -> Call:
        x = d.array(kinds, empty=empty, nan=nan)
        options = {name: (lambda v=values: d.choice(v)) for name, values in more.items()}
        return call(x, **d.some(axis=lambda: d.axes(x.ndim), keepdims=d.flag, **options))

    return make


def position(kinds: str, nan: bool = True) -> Maker:
    def make(d: Draw) -> Call:
        x = d.array(kinds, empty=False, nan=nan)
        return call(x, **d.some(axis=lambda: d.axis(x.ndim), keepdims=d.flag))

    return make


def running(kinds: str) -> Maker:
    def make(d: Draw) -> Call:
        x = d.array(kinds, nan=True)
        return call(x, **d.some(axis=lambda: d.axis(x.ndim), dtype=lambda: "complex128"))

    return make


def standard_running(d: Draw) -> Call:
    x = d.array("iuf", 1, 3)
    axis = d.axis(x.ndim, none=x.ndim == 1)
    return call(x, axis=axis, **d.some(include_initial=d.flag, dtype=lambda: np.float64))


def quantile(scale: float) -> Maker:
    def make(d: Draw) -> Call:
        x = d.array("if", 1, 3, empty=False)
        q = d.choice([0.5 * scale, np.array([0.25, 0.75]) * scale])
        methods = ["linear", "lower", "higher", "nearest", "midpoint"]
        return call(
            x,
            q,
            **d.some(
                axis=lambda: d.axes(x.ndim), keepdims=d.flag, method=lambda: d.choice(methods)
            ),
        )

    return make


def average(d: Draw) -> Call:
    x = d.array("iuf", 1, 2, empty=False)
    axis = d.axis(x.ndim)
    options = d.some(keepdims=d.flag)
    if d.flag():
        shape = x.shape if axis is None or d.flag() else (x.shape[axis],)
        options["weights"] = d.array("f", shape=shape, low=1)
    return call(x, axis=axis, **options)


def covariance(d: Draw) -> Call:
    x = d.array("if", 1, 2, empty=False)
    if x.shape[-1] < 2 or x.shape[0] < 2:
        x = d.array("if", shape=(2, 4))
    options = d.some(rowvar=d.flag)
    if d.flag():
        options["y"] = d.array("f", shape=x.shape)
    return call(x, **options)


REDUCTIONS: dict[str, Maker] = {
    **each("sum prod", reduction("biufc", dtype=["complex128"])),
    **each("mean", reduction("biufc", empty=False)),
    **each("var std", reduction("biufc", empty=False, ddof=[0, 0.5])),
    **each("max min", reduction("biuf", empty=False)),
    **each("amax amin ptp", reduction("iuf", empty=False)),
    **each("all any count_nonzero", reduction("biufc")),
    **each("argmax argmin", position("biuf", nan=False)),
    **each("cumsum cumprod nancumsum nancumprod", running("iufc")),
    **each("cumulative_sum cumulative_prod", standard_running),
    **each("nansum nanprod", reduction("biufc", dtype=["complex128"])),
    **each("nanmean", reduction("iufc", empty=False)),
    **each("nanvar nanstd", reduction("iuf", empty=False, ddof=[0, 1])),
    **each("nanmax nanmin", reduction("iuf", empty=False)),
    **each("nanargmax nanargmin", position("if", nan=False)),
    **each("median nanmedian", reduction("iuf", empty=False)),
    "quantile": quantile(1.0),
    "percentile": quantile(100.0),
    "average": average,
    "cov": covariance,
    "corrcoef": covariance,
    "diff": lambda d: call(x := d.array("biufc", 1, 3), d.number(0, 2), d.axis(x.ndim, none=False)),
    "ediff1d": lambda d: call(d.array("if"), **d.some(to_end=lambda: 5, to_begin=lambda: 7)),
    "gradient": lambda d: call(
        x := d.array("f", 1, 2, shape=d.choice([(4,), (3, 4)])),
        *d.choice([(), (2.0,)]),
        axis=d.axis(x.ndim),
        edge_order=d.number(1, 2),
    ),
    "trapezoid": lambda d: call(x := d.array("f", 1, 2, empty=False), axis=x.ndim - 1, dx=0.5),
    "bincount": lambda d: call(
        x := d.array("iu", 1, 1, low=0),
        *d.choice([(), (d.array("f", shape=x.shape),)]),
        minlength=d.number(0, 6),
    ),
    "histogram": lambda d: call(
        d.array("if", empty=False),
        d.choice([4, np.array([-3.0, 0.0, 1.0, 7.0])]),
        **d.some(density=d.flag, range=lambda: (-2, 5)),
    ),
    "histogram2d": lambda d: call(
        x := d.array("f", 1, 1, empty=False), d.array("f", shape=x.shape), d.choice([3, (2, 4)])
    ),
    "histogramdd": lambda d: call(d.array("f", shape=(5, 2)), d.choice([3, (2, 4)])),
    "digitize": lambda d: call(
        d.array("if"), d.choice([np.array([-2.0, 0, 3]), np.array([3.0, 0, -2])]), right=d.flag()
    ),
    "convolve": lambda d: call(
        d.array("ifc", 1, 1, empty=False),
        d.array("ifc", 1, 1, empty=False),
        d.choice(["full", "same", "valid"]),
    ),
    "correlate": lambda d: call(
        d.array("ifc", 1, 1, empty=False),
        d.array("ifc", 1, 1, empty=False),
        d.choice(["full", "same", "valid"]),
    ),
}


CALLS: dict[str, Maker] = {**ELEMENTWISE, **REDUCTIONS}
