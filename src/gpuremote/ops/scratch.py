"""Memory that ops take while they run, beside their operands and results.

Up to ``FREE`` times what operands and results take together is nobody's concern: these are counted,
so that it stays in proportion to what a session may hold. Here is what may be beyond that, so that
a worker counts it before the op runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final, NamedTuple, TypeAlias

from gpuremote._types import Shape
from gpuremote.ops.meta import Meta
from gpuremote.ops.plan import Plan, upper_bound_nbytes
from gpuremote.ops.spec import Params
from gpuremote.ops.ufuncs import BINARY, UNARY

__all__ = ["FREE", "SCRATCH", "Scratch", "scratch_of"]

FREE: Final = 4
_WORD: Final = 8
"""What functions widen elements to: positions, and floats that are computed with."""


class Scratch(NamedTuple):
    """What calls of a plan take.

    Attributes
    ----------
    nbytes : int
        Whatever the operands are.
    spread : tuple of (int, Meta)
        Operands that may be written out, by their positions; each of them takes ``written`` bytes
        more where it names more bytes than there are (``broadcast_to``).
    free : int
        How much of that need not be counted.
    """

    nbytes: int
    spread: tuple[tuple[int, Meta], ...]
    free: int

    @property
    def any(self) -> bool:
        return bool(self.nbytes or self.spread)


def written(meta: Meta) -> int:
    """Bytes of an array that is written out, at the width at which it may be computed with."""
    return meta.size * max(meta.dtype.itemsize, _WORD)


def scratch_of(plan: Plan) -> Scratch:
    """What calls of ``plan`` take beyond what is free, at most."""
    spec = plan.spec
    if spec.view:
        return Scratch(0, (), 0)
    arrays = [(k, o) for k, o in enumerate(plan.operands) if isinstance(o, Meta)]
    results = upper_bound_nbytes(plan)
    nbytes = 0
    rule = SCRATCH.get(spec.name)
    if rule is not None:
        held = results + sum(meta.nbytes for _, meta in arrays)
        metas = [meta for _, meta in arrays]
        nbytes = max(0, rule(metas, plan.bounds, plan.params) - FREE * held)
    free = FREE * results
    spread: tuple[tuple[int, Meta], ...] = ()
    if spec.name not in _STRIDED and sum(written(meta) for _, meta in arrays) > free:
        spread = tuple(arrays)
    return Scratch(nbytes, spread, free)


_STRIDED: Final = frozenset(
    {
        *UNARY,
        *BINARY,
        *(f"{name}_" for name in BINARY),
        *("where", "clip", "round", "real", "imag", "astype", "copy", "fill_", "setitem"),
        *("sum", "prod", "mean", "max", "min", "any", "all", "getitem_advanced", "getitem_mask"),
    }
)
"""Ops that read their operands in place, however these lie."""

Rule: TypeAlias = Callable[[Sequence[Meta], Sequence[Meta], Params], int]


def _each(nbytes: int) -> Rule:
    """So many bytes for each element of the operands, or of the first result if these are more."""

    def rule(arrays: Sequence[Meta], bounds: Sequence[Meta], _params: Params) -> int:
        made = bounds[0].size if bounds else 0
        return nbytes * max(made, sum(meta.size for meta in arrays))

    return rule


def _histogramdd(arrays: Sequence[Meta], _bounds: Sequence[Meta], params: Params) -> int:
    # Counted as integers, with a bin at each end of each axis, and then made floats.
    bins: int = prod(n + 2 for n in params["bins"])
    return 3 * _WORD * bins + 2 * _WORD * sum(meta.size for meta in arrays)


def _places(arrays: Sequence[Meta], _bounds: Sequence[Meta], params: Params) -> int:
    """An index: masks as positions along each of their axes, numbers as wide ones."""
    kinds = [item for item in params["index"] if item in ("a", "m")]
    items = zip(kinds, arrays[len(arrays) - len(kinds) :], strict=True)
    return sum(_WORD * x.size * (x.ndim if kind == "m" else 1) for kind, x in items)


def _fftn(arrays: Sequence[Meta], _bounds: Sequence[Meta], params: Params) -> int:
    """One axis after the other: in between, some have their new length and some their old one."""
    s, axes = params["s"], params["axes"]
    lengths = list(zip((axes,) if isinstance(axes, int) else axes, _tuple(s), strict=True))
    return max(_steps(arrays[0].shape, lengths), _steps(arrays[0].shape, lengths[::-1]))


def _steps(shape: Shape, lengths: Sequence[tuple[int, int]]) -> int:
    now = list(shape)
    most = 0
    for axis, length in lengths:
        before = prod(now)
        now[axis] = length
        most = max(most, before + prod(now))
    return 2 * _WORD * most


def _tuple(value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _solve(arrays: Sequence[Meta], bounds: Sequence[Meta], _params: Params) -> int:
    """One matrix for a stack of right sides is a stack of matrices."""
    a, (out,) = arrays[0], bounds
    stack = prod(out.shape[:-2]) if arrays[1].ndim > 1 else prod(out.shape[:-1])
    wide = max(2 * _WORD if out.dtype.kind == "c" else _WORD, out.dtype.itemsize)
    return wide * (stack * prod(a.shape[-2:]) + 2 * out.size)


SCRATCH: dict[str, Rule] = {
    **dict.fromkeys(("var", "std", "nanvar", "nanstd"), _each(16)),
    "nanmedian": _each(20),
    "isclose": _each(24),
    "isin": _each(32),
    "interp": _each(16),
    "i0": _each(80),
    "lexsort": _each(8),
    "choose": _each(8),
    "pad": _each(12),
    "bincount": _each(16),
    "histogram": _each(16),
    "histogramdd": _histogramdd,
    **dict.fromkeys(("extract", "compress", "trim_zeros"), _each(16)),
    **dict.fromkeys(("take", "take_along_axis", "put_", "put_along_axis_"), _each(8)),
    **dict.fromkeys(("getitem_advanced", "getitem_mask", "setitem"), _places),
    **dict.fromkeys(("norm", "matrix_norm", "linalg.cond", "pinv"), _each(24)),
    **dict.fromkeys(("svdvals", "eigvalsh", "eigvals", "det", "slogdet", "qr_r"), _each(16)),
    "solve": _solve,
    **{f"fft.{name}": _each(24) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft.{name}": _fftn for name in ("fftn", "ifftn", "rfftn", "irfftn")},
}
"""By name; bytes that may be in use beside operands and results, all in all."""
