"""Kernels in CUDA C++ that the program brings along: what is known of them beforehand.

They have the semantics of CuPy's ``RawKernel``, ``ElementwiseKernel`` and ``ReductionKernel``
(`docs.cupy.dev <https://docs.cupy.dev/en/stable/user_guide/kernel.html>`_). What such a kernel does
is the compiler's business on the server; here is which dtypes and shapes come out, and what it
writes to. Servers run them only if their operator allows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from gpuremote._types import Shape
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.meta import DTYPES, Meta
from gpuremote.ops.operands import DType, Operand, kind_of
from gpuremote.ops.shapes import bool_param, broadcast, int_param, is_int, normal_axes, reduced
from gpuremote.ops.spec import VARIES, Inferred, OpSpec, Params

__all__ = ["CODE", "SPECS", "Parameter", "parse_parameters"]

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

_OPTION: Final = re.compile(
    r"-D\w+(=[\w.+-]*)?|-U\w+|--?std=c\+\+\d\d|--?(use_fast_math|lineinfo|restrict|w)"
    r"|--?(fmad|ftz|prec-div|prec-sqrt|maxrregcount|extra-device-vectorization)=\w+"
)
"""Options of the compiler that name no file and run no program."""

_NAME: Final = re.compile(r"[A-Za-z_]\w*")


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
    return tuple(_parameter(part) for part in text.split(",") if part.strip())


def _parameter(text: str) -> Parameter:
    words = text.split()
    raw = words[0] == "raw"
    words = words[raw:]
    if len(words) != 2 or not _NAME.fullmatch(words[1]):
        raise ShapeError(f"parameter {text.strip()!r} of a kernel is not [raw] TYPE NAME")
    kind, name = words
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


def _check_options(params: Params) -> None:
    options = params.get("options", ())
    if not isinstance(options, tuple) or not all(isinstance(o, str) for o in options):
        raise ShapeError("parameter options has to be a tuple of strings")
    for option in options:
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
    ins, outs = (parse_parameters(_text(params, name)) for name in ("in_params", "out_params"))
    _check_options(params)
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
    ins, outs = (parse_parameters(_text(params, name)) for name in ("in_params", "out_params"))
    _check_options(params)
    if len(outs) != 1:
        raise ShapeError(f"a reduction has one result, not {len(outs)}")
    if len(operands) != len(ins):
        raise ShapeError(f"the kernel takes {len(ins)} arguments, not {len(operands)}")
    (dtype,) = _resolved(ins, outs, operands)
    shape = _common_shape(ins, operands, None)
    axes = normal_axes(params.get("axis"), len(shape))
    return ((reduced(shape, axes, bool_param(params, "keepdims", False)), dtype),)


def _raw(_operands: Sequence[Operand], params: Params) -> Inferred:
    _check_options(params)
    if not _text(params, "code") or not _text(params, "name"):
        raise ShapeError("a kernel takes code and the name of its function")
    for name, most in (("grid", (1 << 31) - 1), ("block", 1024)):
        lengths = params.get(name)
        if (
            not isinstance(lengths, tuple)
            or not 1 <= len(lengths) <= 3
            or not all(is_int(n) and 1 <= n <= most for n in lengths)
        ):
            raise ShapeError(f"{name} has to be one to three integers from 1 to {most}")
    if not 0 <= int_param(params, "shared_mem", 0) < 1 << 31:
        raise ShapeError("shared_mem is negative, or more than there can be")
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
        params=frozenset({"code", "name", "options", "grid", "block", "shared_mem"}),
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
