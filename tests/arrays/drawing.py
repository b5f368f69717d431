"""What calls of the functions are made of: arrays, axes, numbers, drawn by Hypothesis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

__all__ = ["Call", "Draw"]

T = TypeVar("T")

DTYPES = {
    "b": ["bool"],
    "i": ["int8", "int16", "int32", "int64"],
    "u": ["uint8", "uint16", "uint32", "uint64"],
    "f": ["float32", "float64"],
    "h": ["float16"],
    "c": ["complex64", "complex128"],
}


class Call(NamedTuple):
    """Arguments of one call; NumPy arrays among them become remote ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Draw:
    """Draws the parts of a call."""

    def __init__(self, data: st.DataObject) -> None:
        self._draw = data.draw

    def choice(self, options: Sequence[T]) -> T:
        return self._draw(st.sampled_from(options))

    def flag(self) -> bool:
        return self._draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def shape(self, least: int = 0, most: int = 3, *, empty: bool = True) -> tuple[int, ...]:
        ndim = self.number(least, most)
        return tuple(self.number(0 if empty else 1, 4) for _ in range(ndim))

    def dtype(self, kinds: str = "biufc") -> np.dtype[Any]:
        return np.dtype(self.choice([name for kind in kinds for name in DTYPES[kind]]))

    def array(
        self,
        kinds: str = "biufc",
        least: int = 0,
        most: int = 3,
        *,
        shape: tuple[int, ...] | None = None,
        empty: bool = True,
        nan: bool = False,
        low: int = -9,
        high: int = 9,
        dtype: npt.DTypeLike | None = None,
    ) -> npt.NDArray[Any]:
        """An array of small numbers, some of them with fractions."""
        lengths = self.shape(least, most, empty=empty) if shape is None else shape
        kind = self.dtype(kinds) if dtype is None else np.dtype(dtype)
        chance = np.random.default_rng(self.number(0, 1 << 16))
        if kind.kind == "b":
            return np.asarray(chance.integers(0, 2, lengths), bool)
        found: Any = chance.integers(max(low, 0) if kind.kind == "u" else low, high + 1, lengths)
        if kind.kind in "fc":
            found = found + chance.integers(0, 4, lengths) / 4
            found = np.clip(found, low, high)
        if kind.kind == "c":
            found = found + 1j * chance.integers(low, high + 1, lengths)
        made: npt.NDArray[Any] = np.asarray(found).astype(kind)
        if nan and kind.kind in "fc" and made.size and self.flag():
            flat = made.reshape(-1)
            flat[chance.integers(0, made.size)] = self.choice([np.nan, np.inf, -np.inf])
        return made

    def beside(self, other: npt.NDArray[Any], kinds: str = "biufc", **kwargs: Any) -> Any:
        """An array that broadcasts with another one, or a scalar."""
        what = self.number(0, 4)
        if what == 0 and not kwargs.pop("array", False):
            return self.scalar(kinds)
        kwargs.pop("array", None)
        lengths = tuple(self.choice([n, n, 1]) for n in other.shape[self.number(0, other.ndim) :])
        return self.array(kinds, shape=lengths, **kwargs)

    def scalar(self, kinds: str = "biufc") -> Any:
        options: list[Any] = []
        if "b" in kinds:
            options.append(True)
        if "i" in kinds or "u" in kinds:
            options += [1, 3]
        if "f" in kinds:
            options += [0.5, 2.0]
        if "c" in kinds:
            options.append(1 + 2j)
        return self.choice(options)

    def axis(self, ndim: int, *, none: bool = True) -> Any:
        """One axis, or None."""
        options: list[Any] = [None] if none else []
        options += list(range(-ndim, ndim))
        return self.choice(options or [None])

    def axes(self, ndim: int) -> Any:
        """None, an axis, or several."""
        options: list[Any] = [None, *range(-ndim, ndim)]
        if ndim > 1:
            options += [(0, 1), (-1, 0)]
        return self.choice(options)

    def some(self, **options: Callable[[], Any]) -> dict[str, Any]:
        """Each of the keywords, or not."""
        return {name: make() for name, make in options.items() if self.flag()}
