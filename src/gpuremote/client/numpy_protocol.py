"""NumPy functions called on remote arrays: ``np.add(x, 1)``, ``np.concatenate([x, y])``, ...

What is not in the tables raises; nothing comes to the host by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpuremote.client import functions, issue
from gpuremote.client.array import RemoteArray
from gpuremote.errors import DTypeError, ImplicitTransfer, UnsupportedOp
from gpuremote.ops.catalogue import find
from gpuremote.ops.meta import check_dtype
from gpuremote.ops.ufuncs import BINARY, UNARY

__all__ = ["array_function", "array_ufunc"]

_UFUNCS: dict[np.ufunc, str] = {ufunc: name for name, ufunc in {**UNARY, **BINARY}.items()}
_UFUNCS[np.matmul] = "matmul"
_UFUNCS[np.rint] = "round"

_REDUCTIONS: dict[np.ufunc, str] = {
    np.add: "sum",
    np.multiply: "prod",
    np.maximum: "max",
    np.minimum: "min",
    np.logical_and: "all",
    np.logical_or: "any",
}


def array_ufunc(
    array: RemoteArray, ufunc: np.ufunc, method: str, inputs: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """NEP 13: a ufunc or its ``reduce`` on the device."""
    out = kwargs.pop("out", None)
    if method == "reduce" and ufunc in _REDUCTIONS:
        return _reduce(array, ufunc, inputs, out, kwargs)
    name = _UFUNCS.get(ufunc)
    if method != "__call__" or name is None or kwargs.keys() - {"dtype"}:
        extra = "".join(f", {key}=..." for key in kwargs)
        raise UnsupportedOp(
            f"numpy.{ufunc.__name__}.{method}{extra} does not run on a remote device; get() the "
            "array to use it here",
            op=ufunc.__name__,
        )
    dtype = kwargs.get("dtype")
    if dtype is not None or ufunc is np.rint:  # round keeps integers, rint makes floats of them
        inputs = _cast(inputs, ufunc, dtype)
    if out is not None:
        return _into(name, inputs, out, ufunc)
    return issue.apply(find(name), inputs)[0]


def _cast(inputs: Sequence[Any], ufunc: np.ufunc, dtype: Any) -> list[Any]:
    """The operands in the dtypes that the ufunc computes in for a result of ``dtype``."""
    weak = (int, float, complex)
    given = [type(x) if type(x) in weak else getattr(x, "dtype", np.dtype(bool)) for x in inputs]
    wanted = None if dtype is None else check_dtype(dtype)
    try:
        loop = ufunc.resolve_dtypes((*given, None), signature=(*[None] * ufunc.nin, wanted))
    except TypeError as error:
        raise DTypeError(str(error), op=ufunc.__name__) from error
    return [
        x.astype(cast, copy=False) if isinstance(x, RemoteArray) else cast.type(x)
        for x, cast in zip(inputs, loop, strict=False)
    ]


def _into(name: str, inputs: Sequence[Any], out: Any, ufunc: np.ufunc) -> Any:
    """``np.add(x, y, out=x)``: the first operand in place; other targets by assignment."""
    (target,) = out if isinstance(out, tuple) else (out,)
    if not isinstance(target, RemoteArray):
        raise ImplicitTransfer(
            "out is a host array: give a remote one, or get(out=...) the result", op=ufunc.__name__
        )
    if len(inputs) == 2 and target is inputs[0] and name in BINARY:
        return issue.inplace(find(name + "_"), target, inputs[1])
    result = issue.apply(find(name), inputs)[0]
    if not np.can_cast(result.dtype, target.dtype, "same_kind"):
        raise DTypeError(
            f"a result of {result.dtype} does not go into an array of {target.dtype}",
            op=ufunc.__name__,
        )
    target[...] = result
    return target


def _reduce(
    array: RemoteArray, ufunc: np.ufunc, inputs: Sequence[Any], out: Any, kwargs: dict[str, Any]
) -> Any:
    allowed = {"axis", "keepdims", "dtype"}
    if out is not None or kwargs.keys() - allowed or inputs[0] is not array:
        raise UnsupportedOp(
            f"numpy.{ufunc.__name__}.reduce with these arguments", op=ufunc.__name__
        )
    kwargs.setdefault("axis", 0)
    method = getattr(array, _REDUCTIONS[ufunc])
    return method(**{key: value for key, value in kwargs.items() if value is not None})


def array_function(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """NEP 18: a function of the NumPy namespace on the device."""
    found = _FUNCTIONS.get(function)
    if found is None:
        raise UnsupportedOp(
            f"numpy.{function.__name__} does not run on a remote device; get() the array to use "
            "it here",
            op=function.__name__,
        )
    return found(*args, **kwargs)


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.concatenate: functions.concatenate,
    np.stack: functions.stack,
    np.where: functions.where,
    np.clip: functions.clip,
    np.sum: functions.method("sum"),
    np.prod: functions.method("prod"),
    np.mean: functions.method("mean"),
    np.max: functions.method("max"),
    np.amax: functions.method("max"),
    np.min: functions.method("min"),
    np.amin: functions.method("min"),
    np.all: functions.method("all"),
    np.any: functions.method("any"),
    np.var: functions.method("var"),
    np.std: functions.method("std"),
    np.argmax: functions.method("argmax"),
    np.argmin: functions.method("argmin"),
    np.cumsum: functions.method("cumsum"),
    np.reshape: functions.reshape,
    np.transpose: functions.transpose,
    np.squeeze: functions.method("squeeze"),
    np.ravel: functions.method("ravel"),
    np.copy: functions.method("copy"),
    np.dot: functions.method("dot"),
    np.round: functions.round_,
    np.broadcast_to: functions.broadcast_to,
    np.expand_dims: functions.expand_dims,
    np.flip: functions.flip,
    np.roll: functions.roll,
    np.sort: functions.sort,
    np.argsort: functions.argsort,
    np.take: functions.take,
    np.tril: functions.tril,
    np.triu: functions.triu,
    np.outer: functions.outer,
    np.linalg.svd: functions.svd,
    np.linalg.svdvals: functions.svdvals,
    np.linalg.eigh: functions.eigh,
    np.linalg.eigvalsh: functions.eigvalsh,
    np.linalg.qr: functions.qr,
    np.linalg.cholesky: functions.cholesky,
    np.linalg.inv: functions.inv,
    np.linalg.solve: functions.solve,
    np.linalg.det: functions.det,
    np.linalg.norm: functions.norm,
}
