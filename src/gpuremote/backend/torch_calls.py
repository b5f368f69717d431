"""Calls of torch ops on the server: which may run, and the functions that run them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch

from gpuremote.backend.torch_attention import choose_attention
from gpuremote.backend.torch_files import Weights
from gpuremote.backend.torch_random import OWN, generator
from gpuremote.errors import (
    ConfigError,
    GpuRemoteError,
    InternalError,
    OpFailed,
    OutOfDeviceMemory,
    ShapeError,
    UnsupportedOp,
)
from gpuremote.ops.torch_call import CONJ, NEG, Call, Result, View

__all__ = [
    "Arguments",
    "Block",
    "Permits",
    "compile_call",
    "dtype_of",
    "find_op",
    "tensors_in",
    "translate",
    "written_by",
]

NAMESPACES: Final = frozenset(("aten", "prims"))
"""Whose ops may run wherever torch does."""
REFUSED: Final = frozenset(
    (
        "aten::from_file",
        "aten::_pin_memory",
        "aten::pin_memory",
        "aten::is_pinned",
        "aten::record_stream",
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::resize_",
        "aten::resize_as_",
        "aten::resize_as_sparse_",
        "aten::resize",
        "aten::_resize_output_",
        "aten::_resize_output",
        "aten::set_",
        "aten::set",
        "aten::set_data",
        "aten::_nested_from_padded_tensor",
    )
)
"""Ops that touch files or the server's own memory management, make it wait, or change the memory of
a storage, which is counted."""
TYPES: Final = frozenset(
    (
        "Tensor",
        "number",
        "int",
        "SymInt",
        "float",
        "bool",
        "str",
        "complex",
        "ScalarType",
        "Layout",
        "MemoryFormat",
        "Device",
        "Generator",
    )
)
"""What an op's arguments may be; others (files, streams, classes of its own) are not for a wire."""
MOST_VIEWS: Final = 16
"""Views of one storage that are kept."""
_DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of the name that travels."""
    return _DTYPES[name]


class Block:
    """A storage as torch calls name it, and the views of it that they used.

    Attributes
    ----------
    tensor : torch.Tensor
        Keeps the storage.
    nbytes : int
        Bytes that the session knows of.
    views : dict of View to torch.Tensor
        Those that were used.
    """

    __slots__ = ("_array", "nbytes", "tensor", "views")

    def __init__(
        self, tensor: torch.Tensor, nbytes: int, view: View | None = None, array: Any = None
    ) -> None:
        self.tensor = tensor
        self.nbytes = nbytes
        self._array = array
        self.views: dict[View, torch.Tensor] = {} if view is None else {view: tensor}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that the storage was made for."""
        return tuple(self.tensor.shape)

    def view(self, view: View) -> torch.Tensor:
        """The tensor that ``view`` says.

        Raises
        ------
        ShapeError
            It reaches beyond the storage.
        """
        found = self.views.get(view)
        if found is None:
            if view.end > self.nbytes:
                raise ShapeError(f"{view} needs {view.end} bytes of a storage of {self.nbytes}")
            found = self._at(_DTYPES[view.dtype], view.offset, view.shape, view.stride)
            if view.flags & CONJ:
                found = found.conj()
            if view.flags & NEG:
                found = torch._neg_view(found)
            if len(self.views) >= MOST_VIEWS:
                self.views.clear()
            self.views[view] = found
        return found

    def flat(self) -> torch.Tensor:
        """All bytes."""
        return self._at(torch.uint8, 0, (self.nbytes,), (1,))

    def _at(
        self, dtype: torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        empty = torch.empty(0, dtype=dtype, device=self.tensor.device)
        storage = self.tensor.untyped_storage()
        return empty.set_(storage, offset, shape, stride)

    def as_array(self) -> Any:
        """The NumPy array that it was made from, or one of all its bytes."""
        return self.flat().numpy() if self._array is None else self._array


def find_op(name: str, namespaces: frozenset[str]) -> Any:
    """The op of a schema's name, such as ``aten::add.Tensor``.

    Raises
    ------
    UnsupportedOp
        There is none, or it may not run here.
    """
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if space not in NAMESPACES | namespaces:
        raise UnsupportedOp(
            f"this server does not run ops of namespace {space!r}; its operator can allow them",
            op=name,
        )
    if f"{space}::{base}" in REFUSED:
        raise UnsupportedOp("this op does not run on a server", op=name)
    try:
        # What the dispatcher knows: there are more that TorchScript has, some of which use files.
        torch._C._dispatch_find_schema_or_throw(f"{space}::{base}", _overload(overload))
        op = getattr(getattr(getattr(torch.ops, space), base), overload or "default")
    except (AttributeError, RuntimeError):
        raise UnsupportedOp(
            f"torch {torch.__version__} of this server has no such op", op=name
        ) from None
    for argument in op._schema.arguments:
        if not _plain(argument.type):
            raise UnsupportedOp(f"it takes a {argument.type}, which can't travel", op=name)
    return op


def _overload(name: str) -> str:
    return "" if name == "default" else name


def _plain(kind: Any) -> bool:
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return str(kind) in TYPES or kind.kind() in (
        "SymIntType",
        "ScalarTypeType",
        "GeneratorType",
        "DeviceObjType",
        "LayoutType",
        "MemoryFormatType",
    )


class Permits:
    """What the operator of a server allows.

    Parameters
    ----------
    namespaces : mapping
        Namespaces of ops beside torch's own; of each the module that makes them, which is imported.
    weights : str
        A folder with files of weights; "": none.

    Raises
    ------
    ConfigError
        A module can't be imported.
    """

    def __init__(
        self, namespaces: Mapping[str, str] = MappingProxyType({}), weights: str = ""
    ) -> None:
        for space, module in namespaces.items():
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ConfigError(f"ops of {space!r}: {error}") from error
        self.namespaces = frozenset(namespaces)
        files = Weights(weights)
        self.own: dict[str, Callable[..., Any]] = {
            **OWN,
            "gpuremote::choose_attention": choose_attention,
            "gpuremote::weights_header": files.header,
            "gpuremote::weights_read": files.read,
        }


def compile_call(
    call: Call, device: torch.device, permits: Permits
) -> tuple[Callable[[Sequence[Any]], list[Block]], tuple[int, ...]]:
    """A function that runs the call (it takes blocks and numbers in operand order, and gives the
    storages that the op makes), and which operands it writes to.

    Raises
    ------
    UnsupportedOp
        The op may not run here.
    """
    own = permits.own.get(call.name)
    op = find_op(call.name, permits.namespaces) if own is None else partial(own, device)
    arguments = Arguments(call, device)
    writes = written_by(op, call)
    if None in call.sizes and own is None and all(o.__class__ is str for o in call.operands):
        raise UnsupportedOp("it makes memory out of nothing, and does not say how much")
    operands = tuple(enumerate(call.operands))
    build = arguments.build
    run_op = getattr(op, "_op", op)
    if call.default != "float32":
        run_op = _by_default(run_op, _DTYPES[call.default])

    def tensors_of(values: Sequence[Any]) -> list[Any]:
        found = list(values)
        for k, view in operands:
            if view.__class__ is not str:
                block = values[k]
                tensor = block.views.get(view)
                found[k] = block.view(view) if tensor is None else tensor
        return found

    if not call.sizes:

        def run_in_place(values: Sequence[Any]) -> list[Block]:
            tensors = tensors_of(values)
            args, keywords = build(tensors)
            run_op(*args, **keywords)
            _check_written(writes, tensors, values)
            return []

        return run_in_place, writes
    size, view = call.sizes[0], call.results[0].view
    single = len(call.results) == len(call.sizes) == 1 and view is not None
    # What an op gives depends on what is known of its operands, which a plan says. So it is looked
    # at once.
    known = False

    def run(values: Sequence[Any]) -> list[Block]:
        nonlocal known
        tensors = tensors_of(values)
        args, keywords = build(tensors)
        made = run_op(*args, **keywords)
        if writes:
            _check_written(writes, tensors, values)
        # The size each time: that of some results depends on values.
        if known and made.untyped_storage().nbytes() == size:
            return [Block(made, size, view)]  # type: ignore[arg-type]
        if single and made.__class__ is torch.Tensor and _as_said(made, view, size, tensors):
            known = True
            return [Block(made, size, view)]  # type: ignore[arg-type]
        return _blocks(call, made, tensors)

    return run, writes


def _by_default(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The function, run with another default dtype."""

    def run(*args: Any, **keywords: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return function(*args, **keywords)
        finally:
            torch.set_default_dtype(before)

    return run


def _check_written(writes: Sequence[int], tensors: Sequence[Any], values: Sequence[Any]) -> None:
    """
    Raises
    ------
    ShapeError
        The op has made a storage larger than what is counted; it is no longer.
    """
    for k in writes:
        if tensors[k].untyped_storage().nbytes() > values[k].nbytes:
            tensors[k].untyped_storage().resize_(values[k].nbytes)
            raise ShapeError("what the op writes does not fit in the storage it was given")


def written_by(op: Any, call: Call) -> tuple[int, ...]:
    """Operands that an op writes to."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return ()
    positional, keywords = call.arguments
    found: list[int] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = positional[position] if position < len(positional) else keywords.get(argument.name)
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, list):
                if item[0] == "slot":
                    found.append(item[1])
                else:
                    pending += item[1:]
    return tuple(found)


def _as_said(
    made: torch.Tensor, view: View | None, size: int | None, tensors: Sequence[Any]
) -> bool:
    """Whether a result lies as the client believes, in a storage of its own."""
    storage = made.untyped_storage()
    return (
        view is not None
        and size is not None
        and made.shape == view.shape
        and made.stride() == view.stride
        and made.storage_offset() == view.offset
        and str(made.dtype)[6:] == view.dtype
        and storage.nbytes() == size
        and not (made._is_zerotensor() or made.is_conj() or made.is_neg())
        and not (size and _shared(made, tensors))
    )


def _blocks(call: Call, made: Any, tensors: Sequence[Any]) -> list[Block]:
    """The storages of any results."""
    # Numbers among the results are known to the client by torch's rules.
    flat = tensors_in(made)
    if len(flat) != len(call.results):
        raise InternalError(
            f"{call.name} gave {len(flat)} results and {len(call.results)} were expected"
        )
    blocks: list[Block | None] = [None] * len(call.sizes)
    for tensor, result in zip(flat, call.results, strict=True):
        if result.storage < 0:
            continue
        if tensor is None:
            raise InternalError(f"{call.name} gave nothing where a tensor was expected")
        present = blocks[result.storage]
        if present is None:
            blocks[result.storage] = _block(call, tensor, result, tensors)
        elif result.view is not None:
            there = present.view(result.view)
            if there.data_ptr() != tensor.data_ptr():
                there.copy_(tensor)
    if None in blocks:
        raise InternalError(f"{call.name} did not give all the results that were expected")
    return blocks  # type: ignore[return-value]


def _block(call: Call, tensor: torch.Tensor, result: Result, tensors: Sequence[Any]) -> Block:
    view = result.view
    if view is None:
        whole = tensor.resolve_conj().resolve_neg().contiguous()
        nbytes = whole.numel() * whole.element_size()
        if whole.untyped_storage().nbytes() != nbytes or _shared(whole, tensors):
            whole = whole.clone()
        return Block(whole, nbytes)
    size = call.sizes[result.storage]
    assert size is not None
    if _as_said(tensor, view, size, tensors):
        return Block(tensor, size, view)
    if tuple(tensor.shape) != view.shape or str(tensor.dtype)[6:] != view.dtype:
        raise InternalError(
            f"{call.name} gave {tensor.dtype}{tuple(tensor.shape)} where the client expects "
            f"{view.dtype}{view.shape}"
        )
    block = Block(torch.empty(size, dtype=torch.uint8, device=tensor.device), size)
    block.view(view).copy_(tensor)
    return block


def _shared(tensor: torch.Tensor, others: Sequence[Any]) -> bool:
    where = tensor.untyped_storage().data_ptr()
    return any(
        isinstance(other, torch.Tensor) and other.untyped_storage().data_ptr() == where
        for other in others
    )


def tensors_in(made: Any) -> list[torch.Tensor | None]:
    """The tensors among what an op gave, in order; None where one is missing."""
    return [one for one in _flatten(made) if one is None or isinstance(one, torch.Tensor)]


def _flatten(made: Any) -> list[Any]:
    if made is None or isinstance(made, torch.Tensor):
        return [made]
    found: list[Any] = []
    for item in made:
        if isinstance(item, (list, tuple)):
            found += _flatten(item)
        else:
            found.append(item)
    return found


class Arguments:
    """The argument list of a call, with places for its operands."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self._device = device
        positional, keywords = call.arguments
        self._slots: list[tuple[int, int]] = []
        self._nested: list[tuple[int | str, Any]] = []
        self._args: list[Any] = []
        for position, value in enumerate(positional):
            self._args.append(self._fixed(value, position))
        self._keywords = {key: self._fixed(value, key) for key, value in keywords.items()}

    def _fixed(self, value: Any, place: int | str) -> Any:
        """What does not change; what does is noted."""
        if isinstance(value, list) and value[0] == "slot" and isinstance(place, int):
            self._slots.append((place, value[1]))
            return None
        if _has_slot(value):
            self._nested.append((place, value))
            return None
        return self._value(value, ())

    def build(self, operands: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of one call."""
        args = self._args.copy()
        for position, slot in self._slots:
            args[position] = operands[slot]
        keywords = self._keywords
        if self._nested:
            keywords = keywords.copy()
            for place, value in self._nested:
                found = self._value(value, operands)
                if isinstance(place, int):
                    args[place] = found
                else:
                    keywords[place] = found
        return args, keywords

    def _value(self, value: Any, operands: Sequence[Any]) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        match kind:
            case "slot":
                return operands[rest[0]]
            case "list":
                return [self._value(item, operands) for item in rest]
            case "dtype":
                return _DTYPES[rest[0]]
            case "layout" if rest[0] in ("strided",):
                return getattr(torch, rest[0])
            case "format" if rest[0].endswith(("format", "channels_last", "channels_last_3d")):
                return getattr(torch, rest[0])
            case "device":
                return self._device
            case "complex":
                return complex(rest[0], rest[1])
            case "number":
                # A tensor without axes that lies on the host: it counts less in type promotion.
                return torch.tensor(self._value(rest[1], operands), dtype=_DTYPES[rest[0]])
            case "generator":
                return generator(self._device, self._value(rest[0], operands))
            case "seeded":
                return torch.Generator(self._device).manual_seed(self._value(rest[0], operands))
        raise UnsupportedOp(f"an argument of kind {kind!r} with {rest} can't be")


def _has_slot(value: Any) -> bool:
    return isinstance(value, list) and (
        value[0] == "slot" or any(_has_slot(item) for item in value[1:])
    )


def translate(error: BaseException) -> GpuRemoteError | None:
    """The library's error for one of torch's; None: it is none of torch's own."""
    if isinstance(error, GpuRemoteError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OutOfDeviceMemory(f"the device is out of memory: {error}")
    if isinstance(error, NotImplementedError):
        return UnsupportedOp(str(error).split("\n", 1)[0])
    return OpFailed(str(error)) if isinstance(error, RuntimeError) else None
