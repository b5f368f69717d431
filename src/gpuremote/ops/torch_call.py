"""Calls of torch's own ops: what a plan of one says, and how that travels.

A handle names a *storage*; the tensors that an op takes are views of storages, described in the
plan. Views are therefore made where they are used, and never travel by themselves. A plan travels
once (:func:`encode`)::

    ["torch", id, op, device, operands, arguments, sizes, results, default]

``op`` is a schema's name with its overload (``"aten::add.Tensor"``). An operand is a
:class:`View` or the code of a scalar; a call is the plan's id, the handle or the value of each,
packed by ``Call.layout``. ``arguments`` is the argument list with places for the operands, see
:class:`Slot`. ``sizes`` are the bytes of each storage that the op makes (None: known only when it
has run), ``results`` the views of these that it gives. ``default`` is the dtype that numbers get
where nothing else says (``torch.set_default_dtype``).

Nothing here imports torch: dtypes and the like travel by their names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from gpuremote.errors import LimitExceeded, ProtocolError, ShapeError
from gpuremote.ops.operands import SCALAR_FORMATS

__all__ = ["Call", "Operand", "Result", "View", "Views", "decode", "encode", "is_call"]

MARK: Final = "torch"
MAX_NDIM: Final = 64
MAX_OPERANDS: Final = 4096
MAX_VALUES: Final = 65536
MAX_DEPTH: Final = 6
MAX_TEXT: Final = 256
MAX_BYTES: Final = 1 << 62
MAX_LENGTH: Final = 1 << 48
SCALARS: Final = ("b", "i", "f", "c")
"""Codes of scalars: bool, 64-bit integer, float, complex."""

CONJ: Final = 1
NEG: Final = 2
"""Bits of ``View.flags``: the view is conjugated, or negated."""

TAGS: Final = frozenset(
    (
        "slot",
        "list",
        "dtype",
        "layout",
        "format",
        "device",
        "complex",
        "number",
        "generator",
        "seeded",
    )
)
"""First elements of a list among the arguments: an operand; a list of values; names of a dtype,
layout or memory format; the plan's device; real and imaginary part; a tensor on the host without
axes, of a dtype and a value; the session's generator of a number; a new one with a seed."""

DTYPES: Final = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
}
"""Bytes of each dtype that may travel."""


DEFAULTS: Final = ("float32", "float64", "float16", "bfloat16")
"""What ``Call.default`` may be."""


class View:
    """A tensor as a view of a storage. Interned by :class:`Views`, so compared by identity.

    Attributes
    ----------
    dtype : str
    shape, stride : tuple of int
    offset : int
        Elements of the storage before the first one.
    flags : int
        See ``CONJ`` and ``NEG``.
    end : int
        Bytes of the storage up to the last element of the view.
    """

    __slots__ = ("dtype", "end", "flags", "offset", "shape", "stride")

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int,
        flags: int,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.stride = stride
        self.offset = offset
        self.flags = flags
        last = sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        self.end = 0 if 0 in shape else (offset + last + 1) * DTYPES[dtype]

    def __repr__(self) -> str:
        return f"View({self.dtype}, {self.shape}, {self.stride}, {self.offset}, {self.flags})"


class Views:
    """Interns views. Bounded: at ``limit`` it starts anew (views in use live on)."""

    def __init__(self, limit: int = 1 << 16) -> None:
        self._table: dict[tuple[Any, ...], View] = {}
        self._limit = limit

    def get(
        self,
        dtype: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int = 0,
        flags: int = 0,
    ) -> View:
        key = (dtype, shape, stride, offset, flags)
        found = self._table.get(key)
        if found is None:
            if len(self._table) >= self._limit:
                self._table.clear()
            found = self._table[key] = View(*key)
        return found


Operand: TypeAlias = View | str


class Result(NamedTuple):
    """A tensor that an op gives.

    Attributes
    ----------
    storage : int
        Which of the call's new storages; -1: none, the op gives no tensor there.
    view : View or None
        None: only who has run the op knows. It is contiguous then.
    dtype : str
        "" where it is not known.
    """

    storage: int
    view: View | None
    dtype: str


class Call:
    """A torch op bound to everything about it that does not change from call to call.

    Attributes
    ----------
    id : int
        Number of the plan in its session.
    name : str
    device : int
        Of the session.
    operands : tuple of View or str
    arguments : list
        Positional arguments, then a dict of the others: plain values, and lists of which the
        first element is one of ``TAGS``.
    sizes : tuple of int or None
    results : tuple of Result
    default : str
        The dtype that numbers get where nothing else says.
    layout : struct.Struct
        Packs a call.
    """

    inplace = False  # as far as an array's client is concerned, which can't tell
    __slots__ = (
        "arguments",
        "default",
        "device",
        "id",
        "layout",
        "name",
        "operands",
        "results",
        "sizes",
    )

    def __init__(
        self,
        ident: int,
        name: str,
        device: int,
        operands: tuple[Operand, ...],
        arguments: list[Any],
        sizes: tuple[int | None, ...],
        results: tuple[Result, ...],
        default: str = "float32",
    ) -> None:
        self.id = ident
        self.name = name
        self.device = device
        self.operands = operands
        self.arguments = arguments
        self.sizes = sizes
        self.results = results
        self.default = default
        self.layout = struct.Struct(
            "<I" + "".join("Q" if isinstance(o, View) else SCALAR_FORMATS[o] for o in operands)
        )

    @property
    def n_out(self) -> int:
        """Storages that a call makes."""
        return len(self.sizes)

    @property
    def step(self) -> int:
        """Record numbers that a call uses."""
        return len(self.sizes) or 1


def encode(call: Call) -> list[Any]:
    """The definition as plain lists for msgpack."""
    return [
        MARK,
        call.id,
        call.name,
        call.device,
        [o if isinstance(o, str) else _encode_view(o) for o in call.operands],
        call.arguments,
        list(call.sizes),
        [
            [r.storage, r.dtype, None if r.view is None else _encode_view(r.view)]
            for r in call.results
        ],
        call.default,
    ]


def _encode_view(view: View) -> list[Any]:
    if max((*view.shape, *view.stride, view.offset), default=0) >= MAX_LENGTH:
        raise ShapeError(
            f"a tensor of shape {tuple(view.shape)} can't be on a remote device: lengths, strides "
            f"and offsets have to be below 2^{MAX_LENGTH.bit_length() - 1}"
        )
    return [view.dtype, list(view.shape), list(view.stride), view.offset, view.flags]


def is_call(obj: Any) -> bool:
    """Whether a definition from the wire is one of these."""
    return isinstance(obj, list) and bool(obj) and obj[0] == MARK


def decode(obj: Any, views: Views) -> Call:
    """Read a definition that came over the wire.

    Raises
    ------
    ProtocolError
        Not a definition (LimitExceeded: one that is over a cap).
    """
    match obj:
        case [
            str(),
            int(ident),
            str(name),
            int(device),
            list(operands),
            [list(), dict()] as arguments,
            list(sizes),
            list(results),
            str(default),
        ]:
            pass
        case _:
            raise ProtocolError("a malformed definition of a torch op")
    if default not in DEFAULTS:
        raise ProtocolError("a definition of a torch op with a default dtype that can't be")
    if not 0 <= ident < 1 << 32 or not 0 <= device < 1024 or len(name) > MAX_TEXT:
        raise ProtocolError("a definition of a torch op with numbers that can't be")
    if max(len(operands), len(sizes), len(results)) > MAX_OPERANDS:
        raise LimitExceeded(f"a torch op of more than {MAX_OPERANDS} operands or results")
    for size in sizes:
        if size is not None:
            _natural("size of a storage", size)
    _check_values(arguments, len(operands))
    return Call(
        ident,
        name,
        device,
        tuple(_decode_operand(operand, views) for operand in operands),
        arguments,
        tuple(sizes),
        tuple(_decode_result(result, sizes, views) for result in results),
        default,
    )


def _natural(what: str, value: Any, limit: int = MAX_BYTES) -> None:
    if type(value) is not int or not 0 <= value < limit:
        raise ProtocolError(f"the {what} has to be an integer from 0 to {limit - 1}")


def _decode_operand(obj: Any, views: Views) -> Operand:
    if isinstance(obj, str):
        if obj not in SCALARS:
            raise ProtocolError("an operand of a torch op has an unknown scalar code")
        return obj
    return _decode_view(obj, views)


def _decode_view(obj: Any, views: Views) -> View:
    match obj:
        case [str(dtype), list(shape), list(stride), offset, flags]:
            pass
        case _:
            raise ProtocolError("a malformed view of a storage")
    if dtype not in DTYPES or len(shape) != len(stride) or len(shape) > MAX_NDIM:
        raise ProtocolError("a view of a storage that can't be")
    for length in (*shape, *stride, offset):
        _natural("length, stride or offset of a view", length, MAX_LENGTH)
    _natural("flags of a view", flags, 4)
    extent = offset + sum(max(0, n - 1) * s for n, s in zip(shape, stride, strict=True))
    elements = 1
    for length in shape:
        elements *= max(length, 1)
    if max(extent, elements) >= 1 << 58:
        raise LimitExceeded("a view of more memory than there can be")
    return views.get(dtype, tuple(shape), tuple(stride), offset, flags)


def _decode_result(obj: Any, sizes: Sequence[int | None], views: Views) -> Result:
    match obj:
        case [int(storage), str(dtype), view] if -1 <= storage < len(sizes) and (
            dtype in DTYPES or not dtype
        ):
            pass
        case _:
            raise ProtocolError("a malformed result of a torch op")
    if view is None:
        return Result(storage, None, dtype)
    found = _decode_view(view, views)
    size = None if storage < 0 else sizes[storage]
    if size is None or found.end > size:
        raise ProtocolError("a result of a torch op that does not fit in its storage")
    return Result(storage, found, dtype)


def _check_values(arguments: Any, operands: int) -> None:
    """Refuse values of other types, too many or too deep, and places that are none."""
    left = MAX_VALUES
    pending: list[tuple[Any, int]] = [(value, 0) for value in arguments[0]]
    for key, value in arguments[1].items():
        if not isinstance(key, str) or len(key) > MAX_TEXT:
            raise ProtocolError("a keyword of a torch op is no short string")
        pending.append((value, 0))
    while pending:
        value, depth = pending.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise LimitExceeded("the arguments of a torch op are too many or too deep")
        if isinstance(value, list):
            if not value or value[0] not in TAGS:
                raise ProtocolError("an argument of a torch op is of no known kind")
            if value[0] == "slot":
                if len(value) != 2 or type(value[1]) is not int or not 0 <= value[1] < operands:
                    raise ProtocolError("an argument of a torch op names no operand")
            else:
                pending += [(item, depth + 1) for item in value[1:]]
        elif isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise LimitExceeded("an argument of a torch op is too long a string")
        elif isinstance(value, int):
            if not -(1 << 63) <= value < 1 << 64:
                raise LimitExceeded("an argument of a torch op is an integer beyond 64 bits")
        elif value is not None and not isinstance(value, float):
            raise ProtocolError(f"an argument of a torch op can't be a {type(value).__name__}")
