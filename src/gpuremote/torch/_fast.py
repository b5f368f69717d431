"""The common call of an op, spelled out: a function made for each pattern of arguments.

What a kernel does with arguments of any kind takes twice as long as what most calls need: tensors,
numbers, and values that belong to the plan, each at its place. So for each pattern of these there
is a function without a loop, made from the text below; whatever does not fit goes the general way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

import torch

from gpuremote.torch._homes import on_new_plans
from gpuremote.torch._kernels import FIXED, NUMBER, TENSOR, Kernel
from gpuremote.torch._storages import HELD, ODD, SHIFT, make_tensor

__all__ = ["fast"]

MOST: Final = 8
"""Arguments of a pattern."""
MOST_PLANS: Final = 4096
"""Plans that a kernel finds the short way."""
_makers: dict[tuple[int, ...], Callable[..., Any]] = {}

_TEXT: Final = """
def make(run, plans, HELD, ODD, make_tensor, getframe, default):
    def kernel({names}, *rest, **keywords):
        if rest or keywords or ODD:
            return run(({names}, *rest), keywords)[1]
        try:
{look}
        except (AttributeError, KeyError):
            return run(({names},), keywords)[1]
        key = (default(), {key},)
        plan = plans.get(key)
        if plan is None or plan.place is not h0.home:
            plan, made = run(({names},), keywords)
            if plan.only is not None or plan.back >= 0:
                if len(plans) >= {most}:
                    plans.clear()
                plans[key] = plan
            return made
        # By no name: a frame that names itself keeps its tensors until the garbage is collected.
        number = plan.issue(plan, plan.pack(plan.id, {values}), getframe().f_back or getframe())
        if plan.only is not None:
            return make_tensor(plan.place, number, plan.only)
        return ({names},)[plan.back]
    return kernel
"""


def fast(kernel: Kernel) -> Callable[..., Any]:
    """The kernel with a short way for its common call, if it has one."""
    kinds = tuple(kernel.required)
    if (
        not 0 < len(kinds) <= MOST
        or kinds[0] != TENSOR
        or not set(kinds) <= {TENSOR, NUMBER, FIXED}
    ):
        return kernel
    maker = _makers.get(kinds)
    if maker is None:
        maker = _makers[kinds] = _maker(kinds)
    plans: dict[Any, Any] = {}
    on_new_plans.append(plans.clear)
    made: Callable[..., Any] = maker(
        kernel.run, plans, HELD, ODD, make_tensor, sys._getframe, torch.get_default_dtype
    )
    return made


def _maker(kinds: tuple[int, ...]) -> Callable[..., Any]:
    look: list[str] = []
    key: list[str] = []
    values: list[str] = []
    for k, kind in enumerate(kinds):
        if kind == TENSOR:
            look += [f"p{k} = a{k}.data_ptr()", f"h{k} = HELD[p{k} >> {SHIFT}]"]
            offset = f"p{k} & {(1 << SHIFT) - 1}"
            key += [f"a{k}.shape", f"a{k}.stride()", offset, f"a{k}.dtype"]
            values.append(f"h{k}.number")
        elif kind == NUMBER:
            look.append(f"if a{k}.__class__ is complex or a{k} is None: raise KeyError")
            key.append(f"a{k}.__class__")
            values.append(f"a{k}")
        else:
            key.append(f"tuple(a{k}) if a{k}.__class__ is list else a{k}")
    text = _TEXT.format(
        names=", ".join(f"a{k}" for k in range(len(kinds))),
        look="\n".join(" " * 12 + line for line in look),
        key=", ".join(key),
        values=", ".join(values),
        most=MOST_PLANS,
    )
    space: dict[str, Any] = {}
    # The text is this module's own, with nothing in it but positions.
    # Its place is this file, so that it does not count as a line of the program's.
    exec(compile(text, __file__, "exec"), space)
    maker: Callable[..., Any] = space["make"]
    return maker
