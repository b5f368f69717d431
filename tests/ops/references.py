"""Each op of the catalogue in plain NumPy, written without the code under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuremote.ops.meta import Meta
from tests.ops.case import Array, Case
from tests.ops.cases import BINARY, UNARY, names


def _clip(x: Any, *limits: Any, bounds: str = "both") -> Any:
    low, high = {"both": limits, "min": (*limits, None), "max": (None, *limits)}[bounds]
    return np.clip(x, low, high)


def _spread(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, correction=0, **kwargs: function(x, ddof=correction, **kwargs)


def _running(plain: Callable[..., Any], initial: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Array, axis: Any = None, include_initial: bool = False, **kwargs: Any) -> Any:
        if not include_initial:
            return plain(x, axis, **kwargs)
        x, axis = (x.ravel(), 0) if axis is None else (x, axis)
        return initial(x, axis=axis, include_initial=True, **kwargs)

    return run


def _sort(x: Array, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    return np.flip(np.sort(x, axis), axis) if descending else np.sort(x, axis)


def _argsort(x: Array, axis: int = -1, descending: bool = False, stable: bool = True) -> Any:
    return np.argsort(-x if descending else x, axis, kind="stable")


def _joined(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays, axis=0: function(arrays, axis)


def _arange(*args: Any, length: int, dtype: Any = None) -> Any:
    return np.arange(*args, dtype=dtype)


def _random(seed: int, shape: Any, dtype: str = "f8") -> Any:
    return np.zeros(shape, dtype)  # Only shape and dtype are compared.


def _draw(seed: int, *parameters: Any, method: str, shape: Any, dtype: str | None = None) -> Any:
    """Other numbers than the ones drawn: only shape and dtype are compared."""
    more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if method == "integers":
        more["endpoint"] = True
    return getattr(np.random.default_rng(0), method)(*parameters, size=shape, **more)


def _complex(function: Callable[..., Any]) -> Callable[..., Any]:
    """What NumPy gives in real numbers where it can."""

    def run(x: Array) -> Any:
        found = function(x)
        parts = found if isinstance(found, tuple) else (found,)
        return tuple(part.astype(np.result_type(part, np.complex64)) for part in parts)

    return run


def _read_as(x: Array, dtype: str) -> Any:
    return x.view(dtype)


def _inplace(ufunc: np.ufunc) -> Callable[..., Any]:
    return lambda x, y: ufunc(x, y, out=x)


REFERENCE: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in (*UNARY, *BINARY)},
    **{
        name: getattr(np, name)
        for name in names(
            """
            where round real imag copy sum prod mean any all max min argmax argmin
            count_nonzero matmul vecdot outer tensordot reshape broadcast_to squeeze
            expand_dims flip diagonal roll repeat tril triu take take_along_axis
            empty zeros ones linspace nonzero
            """
        )
    },
    **{
        name: getattr(np.linalg, name)
        for name in names(
            """
            svd svdvals qr cholesky inv det slogdet pinv solve matrix_norm
            """
        )
    },
    **{f"{name}_": _inplace(getattr(np, name)) for name in BINARY},
    "clip": _clip,
    "astype": lambda x, dtype: x.astype(dtype),
    "view": _read_as,
    "var": _spread(np.var),
    "std": _spread(np.std),
    "cumulative_sum": _running(np.cumsum, np.cumulative_sum),
    "cumulative_prod": _running(np.cumprod, np.cumulative_prod),
    "eigh": lambda x, uplo="L": np.linalg.eigh(x, uplo),
    "eigvalsh": lambda x, uplo="L": np.linalg.eigvalsh(x, uplo),
    "qr_r": lambda x: np.linalg.qr(x, "r"),
    "norm": lambda x, **kwargs: np.linalg.vector_norm(x, **kwargs),
    "permute_dims": np.transpose,
    "tile": lambda x, reps: np.tile(x, reps),
    "sort": _sort,
    "argsort": _argsort,
    "concat": _joined(np.concatenate),
    "stack": _joined(np.stack),
    "full": lambda value, shape, dtype=None: np.full(shape, value, dtype),
    "arange": _arange,
    "eye": lambda n_rows, n_cols=None, k=0, dtype="f8": np.eye(n_rows, n_cols, k, dtype),
    "random_uniform": _random,
    "random_normal": _random,
    "random_draw": _draw,
    "eig": _complex(np.linalg.eig),
    "eigvals": _complex(np.linalg.eigvals),
    "fill_": lambda x, value: x.fill(value),
    "unique_values": np.unique,
}
"""Each op in plain NumPy; indexing is in :func:`reference`."""


def reference(name: str, case: Case) -> Any:
    """What plain NumPy makes of a case: results, or operand 0 afterwards for an op in place."""
    operands = case.operands
    if name.startswith("getitem"):
        return operands[0][case.index]
    if name == "setitem":
        target = operands[0].copy()
        target[case.index] = operands[1]
        return target
    if name.endswith("_"):
        target = operands[0].copy()
        REFERENCE[name](target, *operands[1:])
        return target
    return REFERENCE[name](*operands, **case.params)


def results(found: Any) -> list[Array]:
    """What a reference gave, as a list of arrays."""
    return [np.asarray(x) for x in (found if isinstance(found, tuple) else (found,))]


def same_meta(meta: Meta, array: Array) -> bool:
    return meta.shape == array.shape and meta.dtype == array.dtype
