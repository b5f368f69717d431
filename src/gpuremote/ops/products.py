"""Sums of products named by letters: einsum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import ShapeError
from gpuremote.ops.functions import function
from gpuremote.ops.operands import Operand, array_operand
from gpuremote.ops.shapes import broadcast, dtypes_of, joined_dtype
from gpuremote.ops.spec import Inferred, OpSpec, Params

__all__ = ["SPECS", "einsum_shape"]


def einsum_shape(subscripts: str, shapes: Sequence[Shape]) -> Shape:
    """Shape of ``einsum(subscripts, ...)`` for operands of these shapes.

    Raises
    ------
    ShapeError
        The subscripts do not fit the operands.
    """
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(shapes):
        raise ShapeError(f"subscripts {subscripts!r} for {len(shapes)} operands")
    lengths: dict[str, int] = {}
    hidden: Shape = ()
    for term, shape in zip(terms, shapes, strict=True):
        before, dots, after = term.partition("...")
        _letters(before + after, subscripts)
        extra = len(shape) - len(before) - len(after)
        if extra < 0 or (extra and not dots):
            raise ShapeError(f"subscripts {term!r} for shape {shape}")
        hidden = broadcast(hidden, shape[len(before) : len(before) + extra])
        for letter, length in zip(
            before + after, shape[: len(before)] + shape[len(before) + extra :], strict=True
        ):
            known = lengths.setdefault(letter, length)
            if known == 1:
                lengths[letter] = length
            elif length not in (1, known):
                raise ShapeError(f"axis {letter!r} has {known} and {length} elements")
    if not arrow:
        letters = inputs.replace(".", "").replace(",", "")
        once = sorted(letter for letter in lengths if letters.count(letter) == 1)
        return (*hidden, *(lengths[letter] for letter in once))
    before, dots, after = output.partition("...")
    _letters(before + after, subscripts)
    if len(set(before + after)) != len(before + after) or not set(before + after) <= set(lengths):
        raise ShapeError(f"the result of {subscripts!r} names an axis twice, or an unknown one")
    if hidden and not dots:
        raise ShapeError(f"the result of {subscripts!r} leaves out the axes of '...'")
    return (*(lengths[a] for a in before), *hidden, *(lengths[a] for a in after))


def _letters(text: str, subscripts: str) -> None:
    if text and not (text.isascii() and text.isalpha()):
        raise ShapeError(f"subscripts {subscripts!r} are not letters")


def _einsum(operands: Sequence[Operand], params: Params) -> Inferred:
    subscripts = params.get("subscripts")
    if not isinstance(subscripts, str) or not operands:
        raise ShapeError("subscripts and operands are needed")
    arrays = [array_operand(operands, k) for k in range(len(operands))]
    shape = einsum_shape(subscripts, [array.shape for array in arrays])
    (dtype,) = dtypes_of(joined_dtype, *dict.fromkeys(array.dtype for array in arrays))
    dtypes_of(np.multiply, dtype, dtype)
    return ((shape, dtype),)


SPECS: list[OpSpec] = [function("einsum", _einsum, "subscripts")]
