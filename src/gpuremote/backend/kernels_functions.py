"""How ops are done that a namespace has a function for, by its path (see ``ops.functions``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

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
    dtype = plan.bounds[0].dtype

    def run(index: Any, *choices: Any, **keywords: Any) -> Any:
        # CuPy wants one array of all that there is to choose from.
        arrays = xp.broadcast_arrays(*(xp.asarray(choice, dtype) for choice in choices))
        return function(index, xp.stack(arrays), **keywords)

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
    **{
        f"{name}.at": _scatter
        for name in (
            "add",
            "subtract",
            "maximum",
            "minimum",
            "bitwise_and",
            "bitwise_or",
            "bitwise_xor",
        )
    },
    "choose": _choose,
    "einsum": _einsum,
    "gradient": _gradient,
    "histogramdd": _histogramdd,
    "unique": _several,
    "linalg.multi_dot": _joined,
}
"""Functions that are called in another way, or give their results in one."""
