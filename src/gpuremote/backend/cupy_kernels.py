"""Kernels that programs bring along, on a server with CuPy."""

from __future__ import annotations

from typing import Any, Final

from gpuremote.backend.kernels import Kernel
from gpuremote.ops.client_kernels import LAUNCH, check_launch
from gpuremote.ops.plan import Plan

__all__ = ["CLIENT_KERNELS"]


def _raw(xp: Any, plan: Plan) -> Kernel:
    params = plan.params
    kernel = xp.RawKernel(params["code"], params["name"], params.get("options", ()))

    def run(*arguments: Any) -> None:
        grid, block, shared = check_launch(arguments[-LAUNCH:])
        kernel(grid, block, arguments[:-LAUNCH], shared_mem=shared)

    return run


_COMMON: Final = ("preamble", "options")


def _given(plan: Plan, *names: str) -> dict[str, Any]:
    return {name: plan.params[name] for name in names if name in plan.params}


def _elementwise(xp: Any, plan: Plan) -> Kernel:
    params = plan.params
    kernel = xp.ElementwiseKernel(
        params["in_params"],
        params["out_params"],
        params["operation"],
        params["name"],
        **_given(plan, "loop_prep", "after_loop", *_COMMON),
    )
    size = _given(plan, "size")
    single = plan.n_out == 1

    def run(*arguments: Any) -> Any:
        made = kernel(*arguments, **size)
        if plan.inplace:
            return None  # what it gives is what it was given
        return (made,) if single else made

    return run


def _reduction(xp: Any, plan: Plan) -> Kernel:
    params = plan.params
    kernel = xp.ReductionKernel(
        params["in_params"],
        params["out_params"],
        params["map_expr"],
        params["reduce_expr"],
        params["post_map_expr"],
        params["identity"],
        params["name"],
        **_given(plan, "reduce_type", *_COMMON),
    )
    where = _given(plan, "axis", "keepdims")
    return lambda *arguments: kernel(*arguments, **where)


CLIENT_KERNELS: Final = {
    "raw_kernel": _raw,
    "elementwise_kernel": _elementwise,
    "elementwise_kernel_": _elementwise,
    "reduction_kernel": _reduction,
}
