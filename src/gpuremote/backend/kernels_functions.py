"""How ops are done that a namespace has a function for, by its path (see ``ops.functions``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from gpuremote.errors import ShapeError
from gpuremote.ops.counting import SCATTERED
from gpuremote.ops.plan import Plan
from gpuremote.ops.shapes import dtype_param

__all__ = ["by_path"]

Kernel = Callable[..., Any]


def by_path(xp: Any, plan: Plan) -> Kernel:
    """The function at the spec's path, with the plan's parameters as keywords.

    Raises
    ------
    AttributeError
        The namespace has none.
    """
    spec = plan.spec
    found: Kernel = reduce(getattr, spec.path.split("."), xp)
    adapt = _ADAPTED.get(spec.path)
    if adapt is not None:
        found = adapt(xp, found, plan)
    keywords = dict(plan.params)
    given = keywords.pop("given", ())
    if keywords.get("dtype") is not None:
        keywords["dtype"] = dtype_param(plan.params)
    if keywords:
        found = partial(found, **keywords)
    if not given:
        return found
    required = len(plan.operands) - len(given)

    def run(*operands: Any) -> Any:
        return found(*operands[:required], **dict(zip(given, operands[required:], strict=True)))

    return run


def _choose(xp: Any, function: Kernel, plan: Plan) -> Kernel:
    if xp.__name__ == "numpy":
        return lambda index, *choices, **keywords: function(index, choices, **keywords)
    # CuPy wants one array of all that there is to choose from: here it is never made.
    (out,), many = plan.bounds, len(plan.operands) - 1

    def run(index: Any, *choices: Any, mode: str = "raise") -> Any:
        if index.dtype.itemsize == 1:
            index = index.astype("i2")  # there may be more choices than it can say
        if mode == "wrap":
            index = index % many
        elif mode == "clip":
            index = index.clip(0, many - 1)
        elif index.size and not 0 <= int(index.min()) <= int(index.max()) < many:
            raise ValueError("invalid entry in choice array")
        found = xp.empty(out.shape, out.dtype)
        for place, choice in enumerate(choices):
            xp.copyto(found, xp.asarray(choice, out.dtype), where=index == place)
        return found

    return run


def _bincount(_xp: Any, function: Kernel, plan: Plan) -> Kernel:
    (length,) = plan.bounds[0].shape

    def run(x: Any, **keywords: Any) -> Any:
        # A count is made up to the largest number, however large that is.
        if x.size and int(x.max()) >= length:
            raise ShapeError(f"{int(x.max())} is among the numbers, to be counted up to {length}")
        return function(x, **keywords)

    return run


def _resize(xp: Any, _function: Kernel, plan: Plan) -> Kernel:
    (out,) = plan.bounds

    def run(x: Any, **_: Any) -> Any:
        if not x.size or not out.size:
            return xp.zeros(out.shape, out.dtype)
        # NumPy's joins as many arrays as there are repeats. This doubles what is there.
        made = xp.empty(out.size, out.dtype)
        done = min(x.size, out.size)
        made[:done] = x.ravel()[:done]
        while done < out.size:
            more = min(done, out.size - done)
            made[done : done + more] = made[:more]
            done += more
        return made.reshape(out.shape)

    return run


def _histogramdd(_xp: Any, function: Kernel, _plan: Plan) -> Kernel:
    def run(x: Any, **keywords: Any) -> Any:
        counts, edges = function(x, **keywords)
        return (counts, *edges)

    return run


def _several(_xp: Any, function: Kernel, plan: Plan) -> Kernel:
    """A single result as one of several too."""
    if len(plan.bounds) > 1:
        return function
    return lambda *operands, **keywords: (function(*operands, **keywords),)


def _einsum(_xp: Any, function: Kernel, _plan: Plan) -> Kernel:
    # A copy: NumPy gives a read-only view for a diagonal, and a view for an order of axes.
    return lambda *arrays, subscripts: function(subscripts, *arrays).copy()


def _gradient(_xp: Any, function: Kernel, plan: Plan) -> Kernel:
    if len(plan.bounds) != 1:
        return function

    def run(*operands: Any, **keywords: Any) -> Any:
        found = function(*operands, **keywords)
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    return run


def _scatter(_xp: Any, function: Kernel, _plan: Plan) -> Kernel:
    return lambda x, value, *places: function(x, places, value)


def _joined(_xp: Any, function: Kernel, _plan: Plan) -> Kernel:
    return lambda *arrays, **keywords: function(arrays, **keywords)


_ADAPTED: dict[str, Callable[[Any, Kernel, Plan], Kernel]] = {
    **{f"{name}.at": _scatter for name in SCATTERED},
    "bincount": _bincount,
    "choose": _choose,
    "einsum": _einsum,
    "gradient": _gradient,
    "histogramdd": _histogramdd,
    "resize": _resize,
    "unique": _several,
    "linalg.multi_dot": _joined,
}
"""Functions that are called in another way, or give their results in one."""
