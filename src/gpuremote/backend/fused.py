"""Chains of elementwise ops, run block by block: what passes from op to op stays in the cache.

Each op of a chain runs on a block of some 128 KiB, then the next op on the same block, and so on
to the end; then comes the next block. Results that nobody can name any more exist as one block
only.

Bit for bit this gives what the ops give one after the other, though NumPy's loops do not treat all
elements alike: the last few of a call may take another path than those before them (and round
differently), one element alone is no vector, and what has to be cast goes through a buffer of 8192
elements. So every block but the last is a multiple of 8192 elements, and the last is never shorter:
each element then lies in its call as it would in a call for the whole array.

Where all of a chain is one dtype, NumPy's loops are called in C (``native/loops.c``), without what
a ufunc does around its loop, and blocks are as small as they may be. If every op is rounded the
same way by any loop they may be of any size, and stay in the first level of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gpuremote._speed import native
from gpuremote.backend.blocks import aligned
from gpuremote.backend.kernels import MAKERS
from gpuremote.ops.meta import Meta
from gpuremote.ops.operands import WEAK
from gpuremote.ops.plan import Plan
from gpuremote.ops.ufuncs import BINARY, UNARY

__all__ = ["SMALLEST", "Blocked", "Chain", "Fused", "Piece", "Scratch", "can_fail"]

SMALLEST: Final = 256 << 10
"""Bytes of a result below which looking at the chain takes as long as it saves."""
BLOCK: Final = 128 << 10
"""Bytes of a block, of the widest dtype in the chain: a few of them fit into the caches of a core
(half a MiB is common), and a call of NumPy's takes a small part of the time that it computes."""
NEAREST: Final = 32 << 10
"""Bytes of the blocks that a chain in C works on, taken together: the first level of the cache."""
LEAST: Final = 512
"""Elements of such a block: a call of a loop costs some ten of them."""
GRAIN: Final = 8192
"""Elements: NumPy's own buffer, and a multiple of every vector."""
assert 16 * GRAIN <= BLOCK, "a block of complex128"
REGISTERS: Final = 16
"""Blocks that a chain may need at a time."""

Fused: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], None]
"""Runs a chain: takes its inputs and the arrays for its results, of which each is C-contiguous."""

_Array: TypeAlias = npt.NDArray[Any]
_Frame: TypeAlias = list[Any]
_DType: TypeAlias = np.dtype[Any]


class Chain(NamedTuple):
    """Elementwise ops on arrays of one shape, and what of them is wanted.

    Attributes
    ----------
    steps : sequence of (piece, operands)
        For each op what the backend made of its plan, and what it takes: from 0 on the result of
        that step, else -1, -2, ... the first, second, ... input. Inputs are numbered as they first
        occur.
    kept : list of int
        Steps whose results are wanted, in order.
    """

    steps: Sequence[tuple[Any, tuple[int, ...]]]
    kept: list[int]


_UFUNCS: Final[dict[str, np.ufunc]] = {
    **UNARY,
    **BINARY,
    **{f"{name}_": ufunc for name, ufunc in BINARY.items()},
}
_EXACT: Final = frozenset(
    {"add", "subtract", "multiply", "divide", "maximum", "minimum"}
    | {"negative", "abs", "square", "sqrt"}
)
"""Rounded the same way by every loop there is, so it does not matter which one NumPy takes."""
_CASTS: Final = frozenset(("astype", "copy"))
_OTHERS: Final = frozenset(("where", "clip", "round"))
"""No ufuncs in NumPy: a block comes as an array of its own."""


def can_fail(plan: Plan) -> bool:
    """Whether values decide if it raises: an integer to a negative power, an int that is too big
    for what it is cast to."""
    name = plan.spec.name.rstrip("_")
    dtypes = [o.dtype for o in (*plan.operands, *plan.bounds) if isinstance(o, Meta)]
    inexact = any(dtype.kind in "fc" for dtype in dtypes)
    if name == "power":
        return not inexact
    return ("i" in plan.operands or "I" in plan.operands) and (name == "ldexp" or not inexact)


class Piece:
    """A plan as part of a chain: all that does not depend on where in the chain.

    Attributes
    ----------
    ufunc : numpy.ufunc or None
    kernel : callable or None
        In place of a ufunc: gives a block as an array of its own. None for a cast.
    unary : bool
        It has one operand.
    inplace : bool
        It writes to its first operand.
    dtype : numpy.dtype
        Of what it writes.
    itemsize : int
        Of the widest of its dtypes.
    uniform : bool
        A ufunc, and its dtypes are one.
    exact : bool
        Also, any of NumPy's loops rounds it the same way. So the result may take the place of an
        operand, and less goes through the cache.
    values : tuple
        For each operand that is no array of the chain's shape, what to make of the value before
        the first block: a dtype or None; ARRAY for all others.
    """

    ARRAY: Final = object()

    __slots__ = (
        "dtype",
        "exact",
        "inplace",
        "itemsize",
        "kernel",
        "ufunc",
        "unary",
        "uniform",
        "values",
    )

    def __init__(self, plan: Plan, result: Meta) -> None:
        name = plan.spec.name.rstrip("_")
        dtypes = [result.dtype, *(o.dtype for o in plan.operands if isinstance(o, Meta))]
        self.ufunc = _UFUNCS.get(name)
        self.kernel = MAKERS[name](np, plan) if name in _OTHERS else None
        self.unary = len(plan.operands) == 1
        self.inplace = plan.spec.inplace
        self.dtype = result.dtype
        self.itemsize = max(dtype.itemsize for dtype in dtypes)
        self.uniform = self.ufunc is not None and all(dtype == self.dtype for dtype in dtypes)
        self.exact = self.uniform and name in _EXACT and self.dtype.kind in "fiu"
        self.values = tuple(
            Piece.ARRAY if isinstance(o, Meta) and o.ndim else _loop_dtype(plan, position)
            for position, o in enumerate(plan.operands)
        )

    @staticmethod
    def of(plan: Plan) -> Piece | None:
        """The piece of a plan; None if a call of it can't be part of a chain: it has to work
        element by element on whole arrays (and scalars), and on enough of them."""
        name = plan.spec.name
        if name not in _UFUNCS and name not in _CASTS and name not in _OTHERS:
            return None
        result = plan.operands[0] if plan.spec.inplace else plan.result
        if (
            not isinstance(result, Meta)
            or (name == "expm1" and result.dtype.kind == "c")  # which is more than the ufunc
            or result.nbytes < SMALLEST
            or result.size < GRAIN
            or any(
                isinstance(operand, Meta) and operand.ndim and operand.shape != result.shape
                for operand in plan.operands
            )
        ):
            return None
        return Piece(plan, result)

    def by_frame(self, places: list[int], out: int) -> Callable[[_Frame], None]:
        """What to do for each block, for one without a ufunc: a function of the frame."""
        kernel = self.kernel
        if kernel is None:
            (source,) = places

            def cast(frame: _Frame) -> None:
                np.copyto(frame[out], frame[source], "unsafe")

            return cast

        def other(frame: _Frame) -> None:
            frame[out][...] = kernel(*[frame[place] for place in places])

        return other


_FRAME: Final = 1 << 30
"""In place of an operand: the function takes the frame."""


def _loop_dtype(plan: Plan, position: int) -> _DType | None:
    """What a ufunc casts a Python number to; done once, not for each block.

    An array without axes stays what it is. None: what the ufunc does with it depends on its value.
    """
    ufunc = _UFUNCS.get(plan.spec.name)
    code = plan.operands[position]
    if isinstance(code, Meta):
        return code.dtype
    if ufunc is None or code not in ("i", "f") or ufunc.nin != 2:
        return None
    other = plan.operands[1 - position]
    exact = plan.spec.name.rstrip("_") in _EXACT
    if not isinstance(other, Meta) or other.dtype.kind not in ("fciu" if exact else "fc"):
        return None
    kinds: list[Any] = [other.dtype, other.dtype, None]
    kinds[position] = type(WEAK[code])
    if plan.spec.inplace:
        kinds[2] = other.dtype
    dtype: _DType = ufunc.resolve_dtypes(tuple(kinds))[position]
    return dtype if dtype == other.dtype else None


class Scratch:
    """Memory for blocks, used again; for any number of threads."""

    def __init__(self) -> None:
        self._spare: list[npt.NDArray[np.uint8]] = []

    def take(self) -> npt.NDArray[np.uint8]:
        """Room for the last block too, which is shorter than two."""
        try:
            return self._spare.pop()
        except IndexError:
            return aligned(2 * BLOCK)

    def give(self, memory: list[npt.NDArray[np.uint8]]) -> None:
        self._spare += memory[: max(0, REGISTERS - len(self._spare))]


class Blocked:
    """A chain as NumPy runs it.

    Its values lie in a frame: whatever steps write to from the beginning on, the inputs from the
    end on. A step takes its operands from there by place, so what changes from block to block is
    what the frame holds.

    Parameters
    ----------
    chain : Chain
    scratch : Scratch

    Raises
    ------
    LookupError
        It needs more blocks at a time than there may be.
    """

    def __init__(self, chain: Chain, scratch: Scratch) -> None:
        self._scratch = scratch
        self._views: dict[tuple[int, _DType], int] = {}
        """Places that lie in scratch, by the number of the memory and the dtype."""
        self._arrays: list[int] = []
        """Places that are blocks of inputs."""
        self._values: list[tuple[int, _DType | None]] = []
        """Places that are the same for each block, and what to make of the input."""
        self._results: list[int] = []
        self._steps: list[tuple[Any, int, int | None, int]] = []
        """A ufunc, the places of its operands, and where it writes to. Or a function of the frame,
        and _FRAME."""
        self._loops: Any = None
        """A ``native.Loops`` that does the same, if there is one."""
        self._kinds = b""
        """What each place of the frame is to it."""
        self._near = 0
        """Elements of its blocks."""
        self._registers = 0
        self._places = 0
        self._inputs = 0
        self._read(chain)

    def _read(self, chain: Chain) -> None:
        steps, kept = chain.steps, set(chain.kept)
        made, views = self._steps, self._views
        last: dict[int, int] = {}
        for number, (_, operands) in enumerate(steps):
            for operand in operands:
                last[operand] = number
        places: list[int] = []
        held: dict[int, int] = {}
        """Registers of results that are still to be read."""
        free: list[int] = []
        itemsize, uniform, exact = 1, native is not None, True
        dtype = steps[0][0].dtype
        for number, (piece, operands) in enumerate(steps):
            if piece.itemsize > itemsize:
                itemsize = piece.itemsize
            uniform = uniform and piece.uniform and piece.dtype == dtype
            exact = exact and piece.exact
            at = []
            ending = []
            for position, operand in enumerate(operands):
                if operand >= 0:
                    at.append(places[operand])
                    if last[operand] == number and operand in held:
                        ending.append(held.pop(operand))
                    continue
                at.append(operand)
                if -operand > self._inputs:
                    self._enter(operand, piece.values[position])
            if piece.inplace:
                out = at[0]
            elif number in kept:
                out = self._place()
                self._results.append(out)
            else:
                if ending and piece.exact:
                    register = ending.pop()
                else:
                    # Not one that it reads from: where they meet, NumPy may leave its vectors.
                    register = free.pop() if free else self._register()
                view = (register, piece.dtype)
                found = views.get(view)
                out = views[view] = self._place() if found is None else found
                if number in last:
                    held[number] = register
                else:
                    ending.append(register)
            places.append(out)
            if piece.ufunc is None:
                made.append((piece.by_frame(at, out), _FRAME, None, out))
            else:
                made.append((piece.ufunc, at[0], None if piece.unary else at[1], out))
            if ending:
                free += ending
        self._block = GRAIN * max(1, BLOCK // GRAIN // itemsize)
        if uniform:
            self._in_c(dtype, exact)

    def _in_c(self, dtype: _DType, exact: bool) -> None:
        """Prepare to run it in C; all arrays are of this dtype."""
        if any(kind is None or kind != dtype for _, kind in self._values):
            return
        total = self._places + self._inputs
        kinds = bytearray(total)
        for places, kind in (
            (self._views.values(), b"r"),
            (self._results + self._arrays, b"m"),
            ([place for place, _ in self._values], b"v"),
        ):
            for place in places:
                kinds[place] = kind[0]
        steps = [
            (ufunc, x % total, None if y is None else y % total, out % total)
            for ufunc, x, y, out in self._steps
        ]
        try:
            self._loops = native.Loops(steps, total, dtype.num, dtype.itemsize)
        except LookupError:
            return
        self._kinds = bytes(kinds)
        shared = NEAREST // dtype.itemsize // (self._registers + 1)
        self._near = max(LEAST, 1 << shared.bit_length() - 1) if exact else GRAIN

    def _enter(self, operand: int, value: Any) -> None:
        self._inputs += 1
        if value is Piece.ARRAY:
            self._arrays.append(operand)
        else:
            self._values.append((operand, value))

    def _place(self) -> int:
        self._places += 1
        return self._places - 1

    def _register(self) -> int:
        if self._registers == REGISTERS:
            raise LookupError("too many blocks")
        self._registers += 1
        return self._registers - 1

    def __call__(self, inputs: Sequence[Any], results: Sequence[_Array]) -> None:
        frame: _Frame = [None] * (self._places + self._inputs)
        for place, dtype in self._values:
            value = inputs[-1 - place]
            frame[place] = value if dtype is None else np.asarray(value, dtype)
        moving = [(place, inputs[-1 - place].reshape(-1)) for place in self._arrays]
        moving += [
            (place, result.reshape(-1))
            for place, result in zip(self._results, results, strict=True)
        ]
        size = moving[0][1].size
        memory = [self._scratch.take() for _ in range(self._registers)]
        if self._loops is None or not self._run_in_c(frame, moving, memory, size):
            self._run(frame, moving, memory, size)
        self._scratch.give(memory)

    def _run_in_c(
        self,
        frame: _Frame,
        moving: list[tuple[int, _Array]],
        memory: list[npt.NDArray[np.uint8]],
        size: int,
    ) -> bool:
        for place, flat in moving:
            frame[place] = flat
        for (register, _), place in self._views.items():
            frame[place] = memory[register]
        return self._loops.run(frame, self._kinds, size, self._near)  # type: ignore[no-any-return]

    def _run(
        self,
        frame: _Frame,
        moving: list[tuple[int, _Array]],
        memory: list[npt.NDArray[np.uint8]],
        size: int,
    ) -> None:
        block, steps = self._block, self._steps
        count = max(1, size // block)
        most = size - (count - 1) * block
        views = [
            (place, memory[register][: most * dtype.itemsize].view(dtype))
            for (register, dtype), place in self._views.items()
        ]
        for place, view in views:
            frame[place] = view[:block]
        for start in range(0, count * block, block):
            end = start + block
            if end == count * block:
                # The last one, with what is left over.
                end = size
                for place, view in views:
                    frame[place] = view
            for place, flat in moving:
                frame[place] = flat[start:end]
            for function, x, y, out in steps:
                if y is not None:
                    function(frame[x], frame[y], out=frame[out])
                elif x != _FRAME:
                    function(frame[x], out=frame[out])
                else:
                    function(frame)
