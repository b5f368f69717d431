"""Operators of remote arrays: the shortest way from ``x + y`` to a record.

Each method looks its plan up by (op, meta, meta or scalar code). Metas are interned, so the
key hashes and compares by identity. Everything else (a plan not seen before, an operand that
has to be looked at more closely) takes the general way, ``issue.apply``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuremote.client import issue
from gpuremote.ops.catalogue import find

__all__ = ["binary", "inplace", "reflected", "unary"]

_frame = sys._getframe
_INT64 = 1 << 63
_SCALARS = (bool, int, float, complex, np.generic, np.ndarray)
_NOT_OURS: Any = NotImplemented
"""Lets Python try the other operand's method."""


def binary(name: str) -> Callable[[Any, Any], Any]:
    """``x OP other``."""
    spec = find(name)

    def method(self: Any, other: Any) -> Any:
        kind = other.__class__
        core = self._core
        if kind is self.__class__:
            plan = core.plans.get((spec, self._meta, other._meta))
            if plan is not None and other._core is core:
                record = plan.pack(plan.id, self._id, other._id)
                return kind(core, core.issue(plan, record, _frame(1)), plan.result)
        elif kind is float or (kind is int and -_INT64 <= other < _INT64):
            plan = core.plans.get((spec, self._meta, "f" if kind is float else "i"))
            if plan is not None:
                record = plan.pack(plan.id, self._id, other)
                return self.__class__(core, core.issue(plan, record, _frame(1)), plan.result)
        elif not (isinstance(other, _SCALARS) or hasattr(other, "_meta")):
            return _NOT_OURS
        return issue.apply(spec, (self, other))[0]

    return _named(method, name)


def reflected(name: str) -> Callable[[Any, Any], Any]:
    """``other OP x``."""
    spec = find(name)

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, _SCALARS):
            return _NOT_OURS
        return issue.apply(spec, (other, self))[0]

    return _named(method, f"r{name}")


def inplace(name: str) -> Callable[[Any, Any], Any]:
    """``x OP= other``."""
    spec = find(name + "_")

    def method(self: Any, other: Any) -> Any:
        kind = other.__class__
        core = self._core
        if kind is self.__class__:
            plan = core.plans.get((spec, self._meta, other._meta))
            if plan is not None and other._core is core:
                core.issue(plan, plan.pack(plan.id, self._id, other._id), _frame(1))
                return self
        elif kind is float or (kind is int and -_INT64 <= other < _INT64):
            plan = core.plans.get((spec, self._meta, "f" if kind is float else "i"))
            if plan is not None:
                core.issue(plan, plan.pack(plan.id, self._id, other), _frame(1))
                return self
        elif not (isinstance(other, _SCALARS) or hasattr(other, "_meta")):
            return _NOT_OURS
        issue.apply(spec, (self, other))
        return self

    return _named(method, f"i{name}")


def unary(name: str) -> Callable[[Any], Any]:
    """``OP x``."""
    spec = find(name)

    def method(self: Any) -> Any:
        core = self._core
        plan = core.plans.get((spec, self._meta))
        if plan is None:
            return issue.apply(spec, (self,))[0]
        number = core.issue(plan, plan.pack(plan.id, self._id), _frame(1))
        return self.__class__(core, number, plan.result)

    return _named(method, name)


def _named(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    method.__name__ = method.__qualname__ = f"__{name}__"
    return method
