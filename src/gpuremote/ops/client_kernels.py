"""Kernels in CUDA C++ that the program brings along: what is known of them beforehand.

They have the semantics of CuPy's ``RawKernel``, ``ElementwiseKernel`` and ``ReductionKernel``
(`docs.cupy.dev <https://docs.cupy.dev/en/stable/user_guide/kernel.html>`_). What such a kernel does
is the compiler's business on the server; here is which dtypes and shapes come out, and what it
writes to. Servers run them only if their operator allows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.meta import DTYPES, Meta
from gpuremote.ops.operands import DType, Operand, kind_of
from gpuremote.ops.shapes import bool_param, broadcast, int_param, normal_axes, reduced
from gpuremote.ops.spec import VARIES, Inferred, OpSpec, Params

__all__ = [
    "CODE",
    "LAUNCH",
    "MAX_CODE",
    "SPECS",
    "CodeBook",
    "Parameter",
    "check_launch",
    "parse_parameters",
]

CODE: Final = frozenset(
    {
        "code",
        "in_params",
        "out_params",
        "operation",
        "preamble",
        "loop_prep",
        "after_loop",
        "map_expr",
        "reduce_expr",
        "post_map_expr",
    }
)
"""Parameters that are text of a program, and may be as long as one."""

MAX_CODE: Final = 256 << 10
"""Characters of these together."""

MAX_CODE_IN_ALL: Final = 64 << 20
"""Characters of different ones that a session may have brought."""

MAX_TEXT: Final = 64
"""Characters of a name or an option."""

LAUNCH: Final = 7
"""Integers at the end of a raw kernel's operands: a grid and a block of three each, and bytes of
shared memory."""

_OPTION: Final = re.compile(
    r"-D\w+(=[\w.+-]*)?|-U\w+|--?std=c\+\+\d\d|--?(use_fast_math|lineinfo|restrict|w)"
    r"|--?(fmad|ftz|prec-div|prec-sqrt|maxrregcount|extra-device-vectorization)=\w+"
)
"""Options of the compiler that name no file and run no program."""

_NAME: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_RESERVED: Final = re.compile(r"i|_\w*")
"""Names that the loop of a kernel has already."""


class CodeBook:
    """What a session has brought of program text, each once: plans of one kernel for several shapes
    share it."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._left = MAX_CODE_IN_ALL

    def enter(self, params: dict[str, Any]) -> None:
        """Note the texts among the parameters of a plan, which are those of the book afterwards.

        Raises
        ------
        ShapeError
            It would be more than a session may bring.
        """
        for name in CODE & params.keys():
            text = params[name]
            if not isinstance(text, str):
                continue  # which is told when the plan is made
            if text not in self._texts:
                if len(text) > self._left:
                    raise ShapeError(
                        f"this session has brought {MAX_CODE_IN_ALL} characters of kernels, the "
                        "most there may be"
                    )
                self._left -= len(text)
                self._texts[text] = text
            params[name] = self._texts[text]


class Parameter(NamedTuple):
    """One parameter of an elementwise or reduction kernel.

    Attributes
    ----------
    raw : bool
        The kernel indexes it by itself: it is not broadcast.
    dtype : numpy.dtype or None
        None: whatever ``placeholder`` stands for.
    placeholder : str
        One letter, the same dtype wherever it stands; or empty.
    name : str
    """

    raw: bool
    dtype: DType | None
    placeholder: str
    name: str


def parse_parameters(text: str) -> tuple[Parameter, ...]:
    """Read ``"float32 x, raw T y"``.

    Raises
    ------
    DTypeError
        A type that is no dtype of a device's and no single letter.
    ShapeError
        Not a list of parameters.
    """
    return tuple(map(_parameter, text.split(","))) if text.strip() else ()


def _parameter(text: str) -> Parameter:
    words = text.split()
    raw = words[:1] == ["raw"]
    words = words[raw:]
    if len(words) != 2 or not _NAME.fullmatch(words[1]):
        raise ShapeError(f"parameter {text.strip()!r} of a kernel is not [raw] TYPE NAME")
    kind, name = words
    if _RESERVED.fullmatch(name):
        raise ShapeError(f"a kernel's parameter can't be named {name}, which is its loop's own")
    if len(kind) == 1 and kind.isalpha():
        return Parameter(raw, None, kind, name)
    try:
        dtype = np.dtype(kind)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in DTYPES.values():
        raise DTypeError(f"type {kind!r} of a kernel's parameter {name} is no dtype of a device's")
    return Parameter(raw, dtype, "", name)


def _text(params: Params, name: str) -> str:
    value = params.get(name, "")
    if not isinstance(value, str):
        raise ShapeError(f"parameter {name} has to be a string, not {value!r}")
    return value


def _check_text(params: Params, *needed: str) -> None:
    """Whether what is compiled is there, and no longer than may travel."""
    for name in needed:
        if name not in params:
            raise ShapeError(f"a kernel takes {name}")
    name = _text(params, "name")
    if not _NAME.fullmatch(name) or len(name) > MAX_TEXT:
        raise ShapeError(f"a kernel can't be named {name[:MAX_TEXT]!r}")
    for short in ("identity", "reduce_type"):
        if len(_text(params, short)) > MAX_TEXT:
            raise ShapeError(f"{short} of a kernel has more than {MAX_TEXT} characters")
    nchars = sum(len(_text(params, part)) for part in CODE & params.keys())
    if nchars > MAX_CODE:
        raise ShapeError(f"a kernel of {nchars} characters; at most {MAX_CODE}")
    options = params.get("options", ())
    if not isinstance(options, tuple) or not all(isinstance(o, str) for o in options):
        raise ShapeError("parameter options has to be a tuple of strings")
    for option in options:
        if len(option) > MAX_TEXT:
            raise ShapeError(f"an option of {len(option)} characters; at most {MAX_TEXT}")
        if not _OPTION.fullmatch(option):
            raise ShapeError(
                f"option {option!r} is not one that a kernel of a program may be compiled with: "
                "those that define names, choose the language's standard or tune arithmetic"
            )


def _resolved(
    ins: Sequence[Parameter], outs: Sequence[Parameter], given: Sequence[Operand]
) -> list[DType]:
    """The dtypes of ``outs``; ``given`` are the operands of ``ins``, then maybe those of ``outs``.

    As CuPy decides: arrays have to be what the parameter says, a placeholder is what the first
    array says, those of the results before all others, and Python's numbers become it.
    """
    bound: dict[str, DType] = {}
    results = list(zip(outs, given[len(ins) :], strict=False))
    for parameter, operand in [*results, *zip(ins, given, strict=False)]:
        kind = kind_of(operand)
        if isinstance(kind, str):
            continue  # a number is cast to what the kernel takes
        wanted = parameter.dtype or bound.setdefault(parameter.placeholder, kind)
        if kind != wanted:
            raise DTypeError(
                f"the kernel's parameter {parameter.name} is {wanted}, and the array {kind}"
            )
    for parameter in (*ins, *outs):
        if parameter.dtype is None and parameter.placeholder not in bound:
            raise DTypeError(
                f"nothing says what type {parameter.placeholder} of the kernel's parameter "
                f"{parameter.name} is: no array has it"
            )
    return [parameter.dtype or bound[parameter.placeholder] for parameter in outs]


def _common_shape(
    parameters: Sequence[Parameter], operands: Sequence[Operand], size: int | None
) -> Shape:
    """The shape that a kernel loops over."""
    shapes = []
    for parameter, operand in zip(parameters, operands, strict=False):
        if isinstance(operand, Meta):
            if not parameter.raw:
                shapes.append(operand.shape)
        elif parameter.raw:
            raise ShapeError(f"the kernel's raw parameter {parameter.name} has to be an array")
    if size is not None:
        if shapes:
            raise ShapeError("a kernel takes size= only if all of its arrays are raw")
        return (size,)
    if not shapes:
        raise ShapeError("the loop of the kernel has no length: give size=")
    return broadcast(*shapes)


def _size(params: Params) -> int | None:
    size = int_param(params, "size", -1)
    if "size" in params and size < 0:
        raise ShapeError(f"size {size} is negative")
    return size if "size" in params else None


def _elementwise(operands: Sequence[Operand], params: Params) -> Inferred:
    _check_text(params, "operation")
    ins, outs = (parse_parameters(_text(params, name)) for name in ("in_params", "out_params"))
    dtypes = _resolved(ins, outs, operands)
    shape = _common_shape((*ins, *outs), operands, _size(params))
    if len(operands) == len(ins):
        if any(out.raw for out in outs) and "size" not in params:
            raise ShapeError("a raw result of a kernel has no length: give it, or size=")
        return tuple((shape, dtype) for dtype in dtypes)
    if len(operands) != len(ins) + len(outs):
        raise ShapeError(
            f"the kernel takes {len(ins)} arguments, or {len(ins) + len(outs)} with its results, "
            f"not {len(operands)}"
        )
    for out, operand in zip(outs, operands[len(ins) :], strict=True):
        if not isinstance(operand, Meta):
            raise DTypeError(f"the kernel's result {out.name} has to be an array")
        if not out.raw and operand.shape != shape:
            raise ShapeError(f"the kernel's result {out.name} is {operand.shape}, not {shape}")
    return ()


def _reduction(operands: Sequence[Operand], params: Params) -> Inferred:
    _check_text(params, "map_expr", "reduce_expr", "post_map_expr", "identity")
    ins, outs = (parse_parameters(_text(params, name)) for name in ("in_params", "out_params"))
    if len(outs) != 1:
        raise ShapeError(f"a reduction has one result, not {len(outs)}")
    if len(operands) != len(ins):
        raise ShapeError(f"the kernel takes {len(ins)} arguments, not {len(operands)}")
    (dtype,) = _resolved(ins, outs, operands)
    shape = _common_shape(ins, operands, None)
    axes = normal_axes(params.get("axis"), len(shape))
    return ((reduced(shape, axes, bool_param(params, "keepdims", False)), dtype),)


def check_launch(launch: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The grid, the block and the bytes of shared memory of a raw kernel's last operands.

    Raises
    ------
    ShapeError
        No device can do that.
    """
    grid, block, shared = tuple(launch[:3]), tuple(launch[3:6]), launch[6]
    for name, lengths, most in (("grid", grid, (1 << 31) - 1), ("block", block, 1024)):
        if not all(1 <= length <= most for length in lengths):
            raise ShapeError(f"{name} has to be one to three integers from 1 to {most}")
    if not 0 <= shared < 1 << 31:
        raise ShapeError(f"shared_mem of {shared} bytes")
    return grid, block, shared


def _raw(operands: Sequence[Operand], params: Params) -> Inferred:
    _check_text(params, "code")
    if list(operands[-LAUNCH:]) != ["i"] * LAUNCH:
        raise ShapeError(f"the last {LAUNCH} operands of a raw kernel say how it is launched")
    return ()


def _all_arrays(operands: Sequence[Operand], _params: Params) -> tuple[int, ...]:
    return tuple(k for k, operand in enumerate(operands) if isinstance(operand, Meta))


def _results(operands: Sequence[Operand], params: Params) -> tuple[int, ...]:
    first = len(parse_parameters(_text(params, "in_params")))
    return tuple(range(first, len(operands)))


_SHARED: Final = frozenset({"in_params", "out_params", "name", "preamble", "options"})

SPECS: Final = (
    OpSpec(
        "raw_kernel",
        _raw,
        n_out=0,
        params=frozenset({"code", "name", "options"}),
        inplace=True,
        writes=_all_arrays,
    ),
    *(
        OpSpec(
            "elementwise_kernel" + "_" * inplace,
            _elementwise,
            n_out=0 if inplace else VARIES,
            params=_SHARED | {"operation", "loop_prep", "after_loop", "size"},
            inplace=inplace,
            writes=_results if inplace else None,
        )
        for inplace in (False, True)
    ),
    OpSpec(
        "reduction_kernel",
        _reduction,
        params=_SHARED
        | {"map_expr", "reduce_expr", "post_map_expr", "identity", "reduce_type"}
        | {"axis", "keepdims"},
    ),
)
