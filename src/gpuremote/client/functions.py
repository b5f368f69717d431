"""Functions of several arrays, or without an operator: with NumPy's names and arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.errors import UnsupportedOp
from gpuremote.ops.catalogue import find

__all__ = [
    "argsort",
    "broadcast_to",
    "cholesky",
    "clip",
    "concatenate",
    "det",
    "eigh",
    "eigvalsh",
    "expand_dims",
    "flip",
    "inv",
    "method",
    "norm",
    "outer",
    "qr",
    "reshape",
    "roll",
    "round_",
    "solve",
    "sort",
    "stack",
    "svd",
    "svdvals",
    "take",
    "transpose",
    "tril",
    "triu",
    "where",
]


def method(name: str) -> Callable[..., Any]:
    """The function that calls a method of its first argument, keywords without a value left out."""

    def function(array: RemoteArray, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("out", None) is not None:
            raise UnsupportedOp("out= is not offered here; assign with x[...] = result", op=name)
        given = {key: value for key, value in kwargs.items() if value is not None}
        return getattr(array, name)(*args, **given)

    function.__name__ = name
    return function


def _one(name: str, operands: Sequence[Any], **params: Any) -> Any:
    given = {key: value for key, value in params.items() if value is not None}
    return issue.apply(find(name), operands, given)[0]


def concatenate(arrays: Sequence[RemoteArray], axis: int | None = 0) -> RemoteArray:
    if axis is None:
        arrays, axis = [array.ravel() for array in arrays], 0
    joined: RemoteArray = issue.apply(find("concat"), list(arrays), {"axis": axis})[0]
    return joined


def stack(arrays: Sequence[RemoteArray], axis: int = 0) -> RemoteArray:
    stacked: RemoteArray = issue.apply(find("stack"), list(arrays), {"axis": axis})[0]
    return stacked


def where(condition: Any, x: Any, y: Any) -> Any:
    return _one("where", (condition, x, y))


def clip(x: Any, a_min: Any = None, a_max: Any = None, **kwargs: Any) -> Any:
    low, high = kwargs.pop("min", a_min), kwargs.pop("max", a_max)
    if low is None and high is None:
        return x.copy()
    if low is None or high is None:
        bound, side = (high, "max") if low is None else (low, "min")
        return _one("clip", (x, bound), bounds=side)
    return _one("clip", (x, low, high))


def reshape(x: Any, shape: Any) -> Any:
    return x.reshape(shape)


def transpose(x: Any, axes: Any = None) -> Any:
    return x.transpose() if axes is None else x.transpose(axes)


def round_(x: Any, decimals: int = 0) -> Any:
    return _one("round", (x,), decimals=decimals)


def broadcast_to(x: Any, shape: Any) -> Any:
    return _one("broadcast_to", (x,), shape=tuple(shape))


def expand_dims(x: Any, axis: Any) -> Any:
    return _one("expand_dims", (x,), axis=axis)


def flip(x: Any, axis: Any = None) -> Any:
    return _one("flip", (x,), axis=tuple(range(x.ndim)) if axis is None else axis)


def roll(x: Any, shift: Any, axis: Any = None) -> Any:
    return _one("roll", (x,), shift=shift, axis=axis)


def sort(x: Any, axis: int = -1, **kwargs: Any) -> Any:
    return _one("sort", (x,), axis=axis, stable=kwargs.get("stable"))


def argsort(x: Any, axis: int = -1, **kwargs: Any) -> Any:
    return _one("argsort", (x,), axis=axis, stable=kwargs.get("stable"))


def take(x: Any, indices: Any, axis: int | None = None) -> Any:
    return _one("take", (x, x._index_array(indices)), axis=axis)


def tril(x: Any, k: int = 0) -> Any:
    return _one("tril", (x,), k=k)


def triu(x: Any, k: int = 0) -> Any:
    return _one("triu", (x,), k=k)


def outer(x: Any, y: Any) -> Any:
    return _one("outer", (x, y))


def svd(x: Any, full_matrices: bool = True) -> tuple[Any, ...]:
    """``u, s, vh`` with ``x = u @ diag(s) @ vh``."""
    return tuple(issue.apply(find("svd"), (x,), {"full_matrices": full_matrices}))


def svdvals(x: Any) -> Any:
    return _one("svdvals", (x,))


def eigh(x: Any) -> tuple[Any, ...]:
    """Eigenvalues (ascending) and eigenvectors of a Hermitian matrix."""
    return tuple(issue.apply(find("eigh"), (x,)))


def eigvalsh(x: Any) -> Any:
    return _one("eigvalsh", (x,))


def qr(x: Any, mode: str = "reduced") -> tuple[Any, ...]:
    return tuple(issue.apply(find("qr"), (x,), {"mode": mode}))


def cholesky(x: Any) -> Any:
    return _one("cholesky", (x,))


def inv(x: Any) -> Any:
    return _one("inv", (x,))


def solve(a: Any, b: Any) -> Any:
    return _one("solve", (a, b))


def det(x: Any) -> Any:
    return _one("det", (x,))


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    return _one("norm", (x,), ord=ord, axis=axis, keepdims=keepdims or None)
