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
MOST_WAYS: Final = 16
"""Ways to call a kernel, by which arguments are given, that have a function each."""
_makers: dict[tuple[int, tuple[int, ...], tuple[str, ...]], Callable[..., Any]] = {}

_TEXT: Final = """
def make(run, more, plans, HELD, ODD, make_tensor, getframe, default):
    def kernel({names}, *rest, **keywords):
        if rest or keywords or ODD:
            return more(({names}, *rest), keywords)
        try:
{look}
        except (AttributeError, KeyError):
            return run({call})[1]
        key = (default(), {key},)
        plan = plans.get(key)
        if plan is None or plan.place is not h0.home:
            plan, made = run({call})
            if not plan.unknown:
                if len(plans) >= {most}:
                    plans.clear()
                plans[key] = plan
            return made
        # By no name: a frame that names itself keeps its tensors until the garbage is collected.
        number = plan.issue(plan, plan.pack(plan.id, {values}), getframe().f_back or getframe())
        if plan.only is not None:
            return make_tensor(plan.place, number, plan.only)
        return {back}
    return kernel
"""


def fast(kernel: Kernel) -> Callable[..., Any]:
    """The kernel with a short way for its common calls, if it has one: that with the arguments that
    every call has, and others once they are seen."""
    ways: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
    run = kernel.run

    def more(args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """With other arguments than those."""
        if ODD:
            return run(args, keywords)[1]
        key = (len(args), *keywords)
        if key not in ways and len(ways) < MOST_WAYS:
            ways[key] = _way(kernel, len(args), tuple(keywords))
        way = ways.get(key)
        if way is None:
            return run(args, keywords)[1]
        return way(*args, *keywords.values())

    return _way(kernel, kernel.required, (), more) or kernel


def _way(
    kernel: Kernel,
    count: int,
    names: tuple[str, ...],
    more: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None,
) -> Callable[..., Any] | None:
    """A function for calls with so many arguments by position and others by these names, which it
    takes by position behind those; None if it would need the general way."""
    kinds = tuple(kernel.kinds_of(count, names))
    if (
        not 0 < len(kinds) <= MOST
        or kinds[0] != TENSOR
        or not set(kinds) <= {TENSOR, NUMBER, FIXED}
    ):
        return None
    run = kernel.run
    if more is None:

        def more(args: tuple[Any, ...], _: dict[str, Any]) -> Any:
            return run(args[:count], dict(zip(names, args[count:], strict=True)))[1]

    maker = _makers.get((count, kinds, names))
    if maker is None:
        maker = _makers[count, kinds, names] = _maker(count, kinds, names)
    plans: dict[Any, Any] = {}
    on_new_plans.append(plans.clear)
    made: Callable[..., Any] = maker(
        run, more, plans, HELD, ODD, make_tensor, sys._getframe, torch.get_default_dtype
    )
    return made


def _maker(count: int, kinds: tuple[int, ...], names: tuple[str, ...]) -> Callable[..., Any]:
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
    given = "".join(f"a{k}, " for k in range(count))
    by_name = ", ".join(f"{name!r}: a{count + k}" for k, name in enumerate(names))
    call = f"({given}), {{{by_name}}}"
    back = f"plan.finish(number, {call})"
    if not names:
        back = f"({given})[plan.back] if plan.back >= 0 else {back}"
    text = _TEXT.format(
        names=", ".join(f"a{k}" for k in range(len(kinds))),
        call=call,
        back=back,
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
