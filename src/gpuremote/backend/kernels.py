"""How each op of the catalogue is done with the NumPy interface: the same for NumPy and CuPy.

A maker takes the namespace and a plan, and gives a function of the operands that returns the
result, or several, or None for an op in place. Everything that the plan fixes is worked out
here, once; the function does what is left. Exactness of shape and dtype is the caller's part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from gpuremote.backend import kernels_linalg, kernels_random
from gpuremote.errors import ShapeError
from gpuremote.ops.creation import arange_length
from gpuremote.ops.indexing import rebuild
from gpuremote.ops.operands import Operand, default_dtype, kind_of
from gpuremote.ops.plan import Plan
from gpuremote.ops.shapes import normal_axis
from gpuremote.ops.ufuncs import BINARY, UNARY

__all__ = ["MAKERS", "Kernel", "Maker"]

Kernel: TypeAlias = Callable[..., Any]
Maker: TypeAlias = Callable[[Any, Plan], Kernel]


def _ufunc(name: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        function: Kernel = getattr(xp, name)
        if name.startswith("logical") and any(_complex(operand) for operand in plan.operands):
            # CuPy's take no complex numbers.
            def truth(x: Any) -> Any:
                return xp.not_equal(x, 0) if hasattr(x, "dtype") else bool(x)

            return lambda *operands: function(*map(truth, operands))
        return function

    return make


def _expm1(xp: Any, plan: Plan) -> Kernel:
    function: Kernel = xp.expm1
    if not _complex(plan.operands[0]):
        return function

    def beyond(x: Any) -> Any:
        # At infinities NumPy's has nan where C's and the array API standard's have values.
        return xp.where(xp.isfinite(x), function(x), xp.exp(x) - 1)

    return beyond


def _complex(operand: Operand) -> bool:
    return default_dtype(kind_of(operand)).kind == "c"


def _ufunc_inplace(name: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        function = _ufunc(name)(xp, plan)
        if name.startswith("logical"):

            def store(x: Any, y: Any) -> None:
                x[...] = function(x, y)

            return store

        def run(x: Any, y: Any) -> None:
            function(x, y, out=x)

        return run

    return make


def _keywords(plan: Plan, **renamed: str) -> dict[str, Any]:
    """The plan's parameters as keyword arguments, some under another name."""
    return {renamed.get(name, name): value for name, value in plan.params.items()}


def _named(name: str, **renamed: str) -> Maker:
    """A function of the namespace that takes the op's parameters by (nearly) the same names."""

    def make(xp: Any, plan: Plan) -> Kernel:
        function: Kernel = getattr(xp, name)
        keywords = _keywords(plan, **renamed)
        if keywords.get("dtype") is not None:
            keywords["dtype"] = plan.bounds[0].dtype
        return partial(function, **keywords) if keywords else function

    return make


# -- elementwise --------------------------------------------------------------------------------


def _clip(xp: Any, plan: Plan) -> Kernel:
    clip = xp.clip
    match plan.params.get("bounds", "both"):
        case "min":
            return lambda x, low: clip(x, low, None)
        case "max":
            return lambda x, high: clip(x, None, high)
    function: Kernel = clip
    return function


def _real(_xp: Any, _plan: Plan) -> Kernel:
    return lambda x: x.real


def _imag(xp: Any, plan: Plan) -> Kernel:
    (out,) = plan.bounds
    if isinstance(plan.operands[0], str) or plan.operands[0].dtype.kind == "c":
        return lambda x: x.imag
    # NumPy's is a read-only array of zeros: this one can be written like any other.
    return lambda _x: xp.zeros(out.shape, out.dtype)


def _astype(_xp: Any, plan: Plan) -> Kernel:
    dtype = plan.bounds[0].dtype
    return lambda x: x.astype(dtype)


def _view(_xp: Any, plan: Plan) -> Kernel:
    dtype = plan.bounds[0].dtype
    return lambda x: x.view(dtype)


def _copy(_xp: Any, _plan: Plan) -> Kernel:
    return lambda x: x.copy()


# -- reductions ---------------------------------------------------------------------------------


def _count_nonzero(xp: Any, plan: Plan) -> Kernel:
    axis, (out,) = plan.params.get("axis"), plan.bounds
    # CuPy's has no keepdims, and NumPy's gives a Python int without an axis.
    return lambda x: xp.asarray(xp.count_nonzero(x, axis=axis), out.dtype).reshape(out.shape)


def _running(name: str, first: int) -> Maker:
    """A running sum or product, on request with the neutral element in front."""

    def make(xp: Any, plan: Plan) -> Kernel:
        function = getattr(xp, name)
        (out,) = plan.bounds
        axis = plan.params.get("axis")
        if not plan.params.get("include_initial"):
            return lambda x: function(x, axis, out.dtype)
        at = normal_axis(0 if axis is None else axis, out.ndim)
        head = (*out.shape[:at], 1, *out.shape[at + 1 :])
        return lambda x: xp.concatenate(
            (xp.full(head, first, out.dtype), function(x, axis, out.dtype)), at
        )

    return make


# -- manipulation -------------------------------------------------------------------------------


def _to_shape(name: str) -> Maker:
    """Reshape and broadcast_to: unknown lengths are filled in already."""

    def make(xp: Any, plan: Plan) -> Kernel:
        function, shape = getattr(xp, name), plan.bounds[0].shape
        return lambda x: function(x, shape)

    return make


def _joined(name: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        function, axis = getattr(xp, name), plan.params.get("axis", 0)
        return lambda *arrays: function(arrays, axis)

    return make


def _tril(name: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        function, k = getattr(xp, name), plan.params.get("k", 0)
        return lambda x: function(x, k)

    return make


def _sort(xp: Any, plan: Plan) -> Kernel:
    axis = plan.params.get("axis", -1)
    kind = "stable" if plan.params.get("stable", True) else None
    if not plan.params.get("descending"):
        return partial(xp.sort, axis=axis, kind=kind)
    # A copy, so that the result is an allocation of its own in C order.
    return lambda x: xp.flip(xp.sort(x, axis=axis, kind=kind), axis).copy()


def _argsort(xp: Any, plan: Plan) -> Kernel:
    axis = plan.params.get("axis", -1)
    kind = "stable" if plan.params.get("stable", True) else None
    if not plan.params.get("descending"):
        return partial(xp.argsort, axis=axis, kind=kind)

    def run(x: Any) -> Any:
        # Sorting the array backwards keeps equal elements in their order after the flip.
        order = xp.argsort(xp.flip(x, axis), axis=axis, kind=kind)
        return x.shape[axis] - 1 - xp.flip(order, axis)

    return run


def _take(xp: Any, plan: Plan) -> Kernel:
    axis = plan.params.get("axis")
    return lambda x, indices: xp.take(x, indices, axis)


def _take_along_axis(xp: Any, plan: Plan) -> Kernel:
    axis = plan.params.get("axis", -1)
    return lambda x, indices: xp.take_along_axis(x, indices, axis)


# -- creation -----------------------------------------------------------------------------------


def _filled(name: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        (out,) = plan.bounds
        return partial(getattr(xp, name), out.shape, out.dtype)

    return make


def _full(xp: Any, plan: Plan) -> Kernel:
    (out,) = plan.bounds
    return lambda value: xp.full(out.shape, value, out.dtype)


def _arange(xp: Any, plan: Plan) -> Kernel:
    (out,) = plan.bounds

    def run(start: Any, stop: Any, step: Any) -> Any:
        length = arange_length(start, stop, step)
        if length != out.size:  # Before anything is allocated.
            raise ShapeError(f"a range of {length} elements was declared to have {out.size}")
        return xp.arange(start, stop, step, dtype=out.dtype)

    return run


def _linspace(xp: Any, plan: Plan) -> Kernel:
    (out,) = plan.bounds
    endpoint = plan.params.get("endpoint", True)
    return lambda start, stop: xp.linspace(
        start, stop, out.size, endpoint=endpoint, dtype=out.dtype
    )


def _eye(xp: Any, plan: Plan) -> Kernel:
    (out,) = plan.bounds
    return partial(xp.eye, *out.shape, k=plan.params.get("k", 0), dtype=out.dtype)


def _random(method: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        (out,) = plan.bounds
        # Named differently, the same generator (Philox 4x32 there, 4x64 here): a seed gives the
        # same numbers on the same backend only.
        bits = getattr(xp.random, "Philox4x3210", None) or xp.random.Philox
        generator = xp.random.Generator
        made = out.dtype if out.dtype.itemsize > 2 else "f4"

        def run(seed: int) -> Any:
            draw = getattr(generator(bits(seed & ((1 << 64) - 1))), method)
            return draw(out.shape, dtype=made).astype(out.dtype, copy=False)

        return run

    return make


# -- selection ----------------------------------------------------------------------------------


def _index_of(plan: Plan) -> Callable[..., tuple[Any, ...]]:
    """A function of the integers and arrays of an index that puts it together."""
    template = plan.params["index"]
    ints = sum(1 if item == "i" else item.count("1") for item in template)
    if "a" in template or "m" in template:
        return lambda *rest: rebuild(template, rest[:ints], rest[ints:])
    if not ints:
        index = rebuild(template, (), ())
        return lambda: index
    # What rebuild does, with all that depends on the template alone done here: the index with
    # gaps, and for each gap the places of its integers. The last place holds None.
    numbers = iter(range(ints))
    gaps = [
        (gap, [next(numbers) if flag == "1" else -1 for flag in ("1" if item == "i" else item[1:])])
        for gap, item in enumerate(template)
        if item == "i" or item[0] == "s"
    ]
    frame = list(rebuild(template, (0,) * ints, ()))

    def index_of(*rest: Any) -> tuple[Any, ...]:
        values = (*rest, None)
        found = frame.copy()
        for gap, places in gaps:
            if len(places) == 1:
                found[gap] = values[places[0]]
            else:
                start, stop, step = places
                found[gap] = slice(values[start], values[stop], values[step])
        return tuple(found)

    return index_of


# The indices that loops are full of.
_SHORT_INDICES: dict[tuple[str, ...], Kernel] = {
    ("i",): lambda x, i: x[i, ...],
    ("s100",): lambda x, start: x[start:],
    ("s010",): lambda x, stop: x[:stop],
    ("s110",): lambda x, start, stop: x[start:stop],
}


def _getitem(_xp: Any, plan: Plan) -> Kernel:
    short = _SHORT_INDICES.get(plan.params["index"])
    if short is not None:
        return short
    index_of = _index_of(plan)
    return lambda x, *rest: x[index_of(*rest)]


def _getitem_advanced(xp: Any, plan: Plan) -> Kernel:
    get = _getitem(xp, plan)
    arrays = [o for o in plan.operands[1:] if not isinstance(o, str)]
    if any(array.ndim for array in arrays):
        return get
    # NumPy takes index arrays without axes for integers and gives a view; this op never does.
    return lambda *operands: get(*operands).copy()


def _setitem(_xp: Any, plan: Plan) -> Kernel:
    if plan.params["index"] == ("i",):

        def run_one(x: Any, value: Any, i: int) -> None:
            x[i] = value

        return run_one
    index_of = _index_of(plan)

    def run(x: Any, value: Any, *rest: Any) -> None:
        x[index_of(*rest)] = value

    return run


def _fill(_xp: Any, _plan: Plan) -> Kernel:
    def run(x: Any, value: Any) -> None:
        x[...] = value

    return run


def _nonzero(xp: Any, _plan: Plan) -> Kernel:
    function: Kernel = xp.nonzero
    return function


MAKERS: dict[str, Maker] = {
    **{name: _ufunc(ufunc.__name__) for name, ufunc in (UNARY | BINARY).items()},
    **{f"{name}_": _ufunc_inplace(ufunc.__name__) for name, ufunc in BINARY.items()},
    "expm1": _expm1,
    "where": _named("where"),
    "clip": _clip,
    "round": _named("round"),
    "real": _real,
    "imag": _imag,
    "astype": _astype,
    "copy": _copy,
    **{
        name: _named(name)
        for name in ("sum", "prod", "mean", "any", "all", "max", "min", "argmax", "argmin")
    },
    "var": _named("var", correction="ddof"),
    "std": _named("std", correction="ddof"),
    "count_nonzero": _count_nonzero,
    "cumulative_sum": _running("cumsum", 0),
    "cumulative_prod": _running("cumprod", 1),
    **kernels_linalg.MAKERS,
    **kernels_random.MAKERS,
    "reshape": _to_shape("reshape"),
    "broadcast_to": _to_shape("broadcast_to"),
    "permute_dims": _named("transpose"),
    **{
        name: _named(name)
        for name in ("squeeze", "expand_dims", "flip", "roll", "repeat", "tile", "diagonal")
    },
    "view": _view,
    "tril": _tril("tril"),
    "triu": _tril("triu"),
    "sort": _sort,
    "argsort": _argsort,
    "concat": _joined("concatenate"),
    "stack": _joined("stack"),
    "take": _take,
    "take_along_axis": _take_along_axis,
    "empty": _filled("empty"),
    "zeros": _filled("zeros"),
    "ones": _filled("ones"),
    "full": _full,
    "arange": _arange,
    "linspace": _linspace,
    "eye": _eye,
    "random_uniform": _random("random"),
    "random_normal": _random("standard_normal"),
    "getitem": _getitem,
    "getitem_advanced": _getitem_advanced,
    "getitem_mask": _getitem,
    "setitem": _setitem,
    "fill_": _fill,
    "nonzero": _nonzero,
    "unique_values": _named("unique"),
}
"""How to make the function of each op; every op of the catalogue is in here."""
