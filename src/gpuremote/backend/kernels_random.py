"""How random numbers are drawn with the NumPy interface (see ``kernels``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from gpuremote.errors import UnsupportedOp
from gpuremote.ops.plan import Plan
from gpuremote.ops.random import DRAWS

__all__ = ["MAKERS"]

Kernel = Callable[..., Any]

_WORD: Final = (1 << 64) - 1
_DTYPED: Final = frozenset({"random", "standard_normal", "standard_exponential", "standard_gamma"})


def _draw(xp: Any, plan: Plan) -> Kernel:
    method, out = plan.params["method"], plan.bounds[0]
    takes = DRAWS[method].takes
    source = _source(xp, method)
    keywords: dict[str, Any] = {"size": out.shape}
    if method in _DTYPED:
        keywords["dtype"] = out.dtype
    if method == "integers":
        return _integers(xp, plan)

    def run(seed: int, *parameters: Any) -> Any:
        given = map(_parameter, takes, parameters)
        return getattr(source(seed & _WORD), method)(*given, **keywords)

    return run


def _parameter(kind: str, value: Any) -> Any:
    """As CuPy's kernels read it: an array of 8 bytes an element, or a Python number."""
    if isinstance(value, bool | int | float | np.generic):
        return int(value) if kind == "i" else float(value)
    return value.astype("i8" if kind == "i" else "f8", copy=False)


def _source(xp: Any, method: str) -> Callable[[int], Any]:
    """Makes what the numbers are drawn from, out of a seed."""
    # Named differently, the same generator (Philox 4x32 there, 4x64 here): a seed gives the
    # same numbers on the same backend only.
    bits = getattr(xp.random, "Philox4x3210", None) or xp.random.Philox
    generator = xp.random.Generator
    if hasattr(generator, method):
        return lambda seed: generator(bits(seed))
    # What CuPy's Generator lacks, its older class has.
    state = xp.random.RandomState
    getattr(state, method)  # AttributeError: the backend lacks it
    return lambda seed: state(seed)


def _integers(xp: Any, plan: Plan) -> Kernel:
    out, source = plan.bounds[0], _source(xp, "integers")

    def plain(seed: int, low: Any, high: Any) -> Any:
        generator = source(seed & _WORD)
        return generator.integers(low, high, out.shape, out.dtype, endpoint=True)

    if hasattr(xp.random, "PCG64"):
        return plain

    # CuPy's takes numbers only, and works for up to 2**31 of them, or for more than 2**32 up to
    # 2**63: it passes their count as a signed integer of 32 or 64 bits. Taking 63 bits modulo
    # something smaller is not exactly uniform; it is off by a part in 2**63 / count. Unsigned
    # arithmetic gives the right integers whatever their sign is.
    def wide(seed: int, low: Any, count: Any) -> Any:
        drawn = source(seed & _WORD).integers(0, (1 << 63) - 1, out.shape, "i8", endpoint=True)
        return (drawn.astype("u8") % count + low).astype(out.dtype)

    def run(seed: int, low: Any, high: Any) -> Any:
        if not all(isinstance(bound, bool | int | np.generic) for bound in (low, high)):
            low, high = (xp.asarray(bound).astype("u8") for bound in (low, high))
            return wide(seed, low, high - low + xp.asarray(1, "u8"))
        last = int(high) - int(low)
        if not last or not out.size:
            return xp.full(out.shape, low, out.dtype)
        if last >= 1 << 63:
            raise UnsupportedOp(f"{last + 1} different integers: at most 2**63 here")
        if 1 << 31 <= last < 1 << 32:
            return wide(seed, *(xp.asarray(n & _WORD, "u8") for n in (int(low), last + 1)))
        return plain(seed, int(low), int(high))

    return run


MAKERS: dict[str, Callable[[Any, Plan], Kernel]] = {"random_draw": _draw}
"""How to make the function of each op."""
