"""Universal functions, and other functions of one element at a time."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.client.recording import known
from gpuremote.cupy._array import ndarray, own, single, store, wire
from gpuremote.cupy._creation import array_of, empty, operand
from gpuremote.errors import DTypeError, UnsupportedOp
from gpuremote.ops.catalogue import find
from gpuremote.ops.counting import SCATTERED
from gpuremote.ops.meta import check_dtype
from gpuremote.ops.ufuncs import BINARY, UNARY

__all__ = ["UFUNCS", "scatter", "ufunc"]

_frame = sys._getframe
_REDUCTIONS = {
    "add": "sum",
    "multiply": "prod",
    "maximum": "max",
    "minimum": "min",
    "logical_and": "all",
    "logical_or": "any",
}
_RUNNING = {"add": "cumulative_sum", "multiply": "cumulative_prod"}
_WEAK = (int, float, complex)


class ufunc:
    """A function of each element: ``add``, ``sin``, ...

    Called as NumPy's, with ``out``, ``where``, ``dtype`` and ``casting``; some also have
    ``reduce``, ``accumulate``, ``outer`` and ``at``.

    Attributes
    ----------
    nin, nout, nargs : int
    """

    def __init__(self, name: str, like: np.ufunc) -> None:
        self._spec = find(name)
        self._name = name
        self._like = like
        self._inplace = (
            find(name + "_") if like.nin == 2 and like.nout == 1 and name in BINARY else None
        )
        self.__name__ = self.__qualname__ = like.__name__
        self.__doc__ = f"As ``numpy.{like.__name__}``, on the device."
        self.nin, self.nout, self.nargs = like.nin, like.nout, like.nargs
        names = ["x"] if like.nin == 1 else [f"x{i + 1}" for i in range(like.nin)]
        only, key = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature(
            [
                *(inspect.Parameter(n, only) for n in names),
                *(
                    inspect.Parameter(n, key, default=default)
                    for n, default in (
                        ("out", None),
                        ("where", True),
                        ("casting", "same_kind"),
                        ("dtype", None),
                    )
                ),
            ]
        )

    def __repr__(self) -> str:
        return f"<gpuremote.cupy ufunc {self.__name__!r}>"

    def __reduce__(self) -> Any:
        return _by_name, (self.__name__,)

    def __call__(
        self,
        *args: Any,
        out: Any = None,
        where: Any = True,
        casting: str = "same_kind",
        dtype: npt.DTypeLike | None = None,
        order: str = "K",
        subok: bool = True,
    ) -> Any:
        if (
            out is None
            and where is True
            and dtype is None
            and self.nout == 1
            and len(args) == self.nin
            and args[0].__class__ is ndarray
        ):
            found = known(self._spec, _frame(1), *args)  # the shortest way, as operators take
            if found is not None:
                return found
        if len(args) > self.nin:
            args, more = args[: self.nin], args[self.nin :]
            if out is not None or len(more) > self.nout:
                raise TypeError(f"{self.__name__}() takes {self.nin} operands")
            out = more
        elif len(args) < self.nin:
            raise TypeError(f"{self.__name__}() takes {self.nin} operands, not {len(args)}")
        place = next((x.device for x in args if isinstance(x, RemoteArray)), None)
        operands = [operand(x, place) for x in args]
        if not any(isinstance(x, RemoteArray) for x in operands):
            operands[0] = array_of(operands[0])
        if dtype is not None:
            operands = self._cast(operands, check_dtype(dtype), casting)
        if out is None and where is True:
            found = issue.apply(self._spec, operands, array_type=ndarray)
            return found[0] if self.nout == 1 else tuple(found)
        return self._into(operands, out, where, casting)

    def _cast(self, operands: Sequence[Any], dtype: np.dtype[Any], casting: str) -> list[Any]:
        """The operands in the dtypes that the loop for results of ``dtype`` takes."""
        given = [
            type(x) if type(x) in _WEAK else np.dtype(getattr(x, "dtype", bool)) for x in operands
        ]
        wanted = (*[None] * self.nin, *[dtype] * self.nout)
        try:
            loop = self._like.resolve_dtypes(
                (*given, *[None] * self.nout),
                signature=wanted,
                casting=casting,  # type: ignore[arg-type]
            )
        except TypeError as error:
            raise DTypeError(str(error), op=self.__name__) from error
        return [
            own(x).astype(kind, copy=False) if isinstance(x, RemoteArray) else kind.type(x)
            for x, kind in zip(operands, loop, strict=False)
        ]

    def _into(self, operands: list[Any], out: Any, where: Any, casting: str) -> Any:
        targets = out if isinstance(out, tuple) else (out,) * self.nout
        if (
            where is True
            and self._inplace is not None
            and isinstance(targets[0], ndarray)
            and targets[0] is operands[0]
            and casting == "same_kind"
        ):
            return issue.inplace(self._inplace, targets[0], operands[1])
        results = issue.apply(self._spec, operands, array_type=ndarray)
        stored = [
            self._store(result, target, where, casting)
            for result, target in zip(results, targets, strict=True)
        ]
        return stored[0] if self.nout == 1 else tuple(stored)

    def _store(self, result: ndarray, target: Any, where: Any, casting: str) -> ndarray:
        if where is True:
            return result if target is None else store(result, target, casting)
        mask = array_of(where)
        if mask.dtype.kind != "b":
            raise DTypeError(f"where has to be an array of bools, not of {mask.dtype}")
        if target is None:
            shape = np.broadcast_shapes(result.shape, mask.shape)
            target = empty(shape, result.dtype, device=result.device)
        return store(single("where", mask, result, target).astype(target.dtype), target, casting)

    def reduce(
        self,
        array: Any,
        axis: Any = 0,
        dtype: npt.DTypeLike | None = None,
        out: Any = None,
        keepdims: bool = False,
    ) -> Any:
        """Apply the function along an axis; of the ufuncs that have an identity."""
        name = _REDUCTIONS.get(self._name)
        if name is None:
            raise UnsupportedOp(f"{self.__name__}.reduce does not run on a device")
        x = array_of(array)
        method = getattr(x, name)
        if dtype is not None:
            if name in ("sum", "prod"):
                return method(axis, dtype, out, keepdims)
            x = x.astype(dtype)
            method = getattr(x, name)
        return method(axis=axis, out=out, keepdims=keepdims)

    def accumulate(
        self, array: Any, axis: int = 0, dtype: npt.DTypeLike | None = None, out: Any = None
    ) -> ndarray:
        """The results along an axis up to each element; of ``add`` and ``multiply``."""
        name = _RUNNING.get(self._name)
        if name is None:
            raise UnsupportedOp(f"{self.__name__}.accumulate does not run on a device")
        x = array_of(array)
        kind = None if dtype is None else wire(dtype)
        return single(name, x, axis=operator.index(axis), dtype=kind, out=out)

    def outer(self, a: Any, b: Any, **kwargs: Any) -> Any:
        """The function of every pair of elements."""
        x = array_of(a)
        y = array_of(b, x.device)
        return self(x.reshape(x.shape + (1,) * y.ndim), y, **kwargs)

    def at(self, a: ndarray, indices: Any, b: Any = None) -> None:
        """Apply in place at indices, as often as each of them comes; of ``add``, ``subtract``,
        ``maximum``, ``minimum``, ``bitwise_and``, ``bitwise_or`` and ``bitwise_xor``."""
        if self._name not in SCATTERED:
            raise UnsupportedOp(f"{self.__name__}.at does not run on a device")
        scatter(self._name, a, indices, b)


def scatter(name: str, a: ndarray, indices: Any, b: Any) -> None:
    """``a[indices] OP= b``, where an index that comes twice counts twice."""
    places = indices if isinstance(indices, tuple) else (indices,)
    arrays = [array_of(np.asarray(p) if isinstance(p, np.generic) else p, a.device) for p in places]
    issue.apply(find(f"{name}.at_"), (a, operand(b, a.device), *arrays))


def _by_name(name: str) -> ufunc:
    return UFUNCS[name]


UFUNCS: dict[str, ufunc] = {
    like.__name__: ufunc(name, like) for name, like in {**UNARY, **BINARY}.items()
}
"""By NumPy's name."""
for _name, _like in (("modf", np.modf), ("frexp", np.frexp), ("divmod", np.divmod)):
    UFUNCS[_name] = ufunc(_name, _like)
