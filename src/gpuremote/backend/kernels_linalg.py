"""How the linear algebra ops are done with the NumPy interface (see ``kernels``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gpuremote._types import Shape
from gpuremote.ops.linalg import tensordot_axes
from gpuremote.ops.operands import shape_of
from gpuremote.ops.plan import Plan
from gpuremote.ops.shapes import normal_axes, size_of

__all__ = ["MAKERS"]

Kernel = Callable[..., Any]
Maker = Callable[[Any, Plan], Kernel]


def _function(name: str) -> Maker:
    def make(xp: Any, _plan: Plan) -> Kernel:
        function: Kernel = getattr(xp, name)
        return function

    return make


def _linalg(name: str) -> Maker:
    def make(xp: Any, _plan: Plan) -> Kernel:
        function: Kernel = getattr(xp.linalg, name)
        return function

    return make


def _vecdot(xp: Any, plan: Plan) -> Kernel:
    axis = plan.params.get("axis", -1)
    function = getattr(xp, "vecdot", None)
    if function is not None:
        return partial(function, axis=axis)
    dtype = plan.bounds[0].dtype

    def run(x: Any, y: Any) -> Any:
        product = xp.moveaxis(x, axis, -1).conj() * xp.moveaxis(y, axis, -1)
        return xp.sum(product, axis=-1, dtype=dtype)

    return run


def _tensordot(xp: Any, plan: Plan) -> Kernel:
    a, b = (len(shape_of(operand)) for operand in plan.operands)
    axes = tensordot_axes(plan.params.get("axes", 2), a, b)
    return partial(xp.tensordot, axes=axes)


def _svd(xp: Any, plan: Plan) -> Kernel:
    return partial(xp.linalg.svd, full_matrices=plan.params.get("full_matrices", True))


def _svdvals(xp: Any, _plan: Plan) -> Kernel:
    return partial(xp.linalg.svd, compute_uv=False)


def _symmetric(name: str) -> Maker:
    def make(xp: Any, plan: Plan) -> Kernel:
        return partial(getattr(xp.linalg, name), UPLO=plan.params.get("uplo", "L"))

    return make


def _complex(name: str) -> Maker:
    """What NumPy gives as real numbers where the values allow it, as the plan says."""

    def make(xp: Any, plan: Plan) -> Kernel:
        function = getattr(xp.linalg, name)
        dtype = plan.bounds[0].dtype
        if len(plan.bounds) == 1:
            return lambda x: function(x).astype(dtype, copy=False)
        return lambda x: tuple(part.astype(dtype, copy=False) for part in function(x))

    return make


def _qr(xp: Any, plan: Plan) -> Kernel:
    return partial(xp.linalg.qr, mode=plan.params.get("mode", "reduced"))


def _qr_r(xp: Any, _plan: Plan) -> Kernel:
    return partial(xp.linalg.qr, mode="r")


def _cholesky(xp: Any, plan: Plan) -> Kernel:
    function: Kernel = xp.linalg.cholesky
    if not plan.params.get("upper"):
        return function
    # CuPy's has no upper.
    return lambda x: function(x.swapaxes(-1, -2).conj()).swapaxes(-1, -2).conj()


def _pinv(xp: Any, plan: Plan) -> Kernel:
    function: Kernel = xp.linalg.pinv
    rtol, (out,) = plan.params.get("rtol"), plan.bounds
    if not out.size:  # NumPy's are of the operand's dtype, be it of integers.
        return lambda _x: xp.empty(out.shape, out.dtype)
    return function if rtol is None else lambda x: function(x, rtol)


def _solve(xp: Any, plan: Plan) -> Kernel:
    solve: Kernel = xp.linalg.solve
    a, b = map(shape_of, plan.operands)
    if len(a) == 2 and len(b) <= 2:
        return solve
    # CuPy broadcasts no stacks.
    vector = len(b) == 1
    out = plan.bounds[0].shape
    stack: Shape = out[:-1] if vector else out[:-2]
    columns = 1 if vector else b[-1]

    def run(a: Any, b: Any) -> Any:
        a = xp.broadcast_to(a, (*stack, *a.shape[-2:]))
        b = xp.broadcast_to(b[:, None] if vector else b, (*stack, a.shape[-1], columns))
        return solve(a, b).reshape(out)

    return run


def _norm(xp: Any, plan: Plan) -> Kernel:
    shape, out = shape_of(plan.operands[0]), plan.bounds[0].shape
    axes = normal_axes(plan.params.get("axis"), len(shape))
    rest = tuple(i for i in range(len(shape)) if i not in axes)
    flat = (*(shape[i] for i in rest), size_of(tuple(shape[i] for i in axes)))
    norm = partial(xp.linalg.norm, ord=plan.params.get("ord", 2), axis=-1)
    if len(axes) == 1:
        keepdims = len(out) == len(shape)
        return partial(norm, axis=axes[0], keepdims=keepdims)
    return lambda x: xp.asarray(norm(xp.transpose(x, rest + axes).reshape(flat))).reshape(out)


def _matrix_norm(xp: Any, plan: Plan) -> Kernel:
    return partial(
        xp.linalg.norm,
        ord=plan.params.get("ord", "fro"),
        axis=(-2, -1),
        keepdims=plan.params.get("keepdims", False),
    )


MAKERS: dict[str, Maker] = {
    "matmul": _function("matmul"),
    "outer": _function("outer"),
    "vecdot": _vecdot,
    "tensordot": _tensordot,
    "svd": _svd,
    "svdvals": _svdvals,
    "eigh": _symmetric("eigh"),
    "eigvalsh": _symmetric("eigvalsh"),
    "eig": _complex("eig"),
    "eigvals": _complex("eigvals"),
    "qr": _qr,
    "qr_r": _qr_r,
    "cholesky": _cholesky,
    "inv": _linalg("inv"),
    "pinv": _pinv,
    "det": _linalg("det"),
    "slogdet": _linalg("slogdet"),
    "solve": _solve,
    "norm": _norm,
    "matrix_norm": _matrix_norm,
}
"""How to make the function of each op."""
