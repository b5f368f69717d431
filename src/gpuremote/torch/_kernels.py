"""Ops on remote tensors: a kernel for each, which issues a record and makes the results' names.

On the hot path a kernel looks at its arguments once. What does not change from call to call
(shapes, dtypes, sizes) is the key of a plan; handles and numbers go into the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch

from gpuremote.ops.torch_call import Call, Operand, Result, encode
from gpuremote.torch._homes import Home, home
from gpuremote.torch._inference import (
    Unpredictable,
    fake_of,
    host_fake,
    infer,
    results_of,
    view_of,
)
from gpuremote.torch._mixed import bring_over
from gpuremote.torch._storages import HELD, ODD, SHIFT, Form, form_of, make_tensor
from gpuremote.torch._tier import native
from gpuremote.wire.batch import Op

__all__ = ["CallPlan", "Kernel"]

Tensor = torch.Tensor
Parameter = torch.nn.Parameter
TENSOR, TENSORS, NUMBER, NUMBERS, FIXED, EXACT, GENERATOR, DEVICE = range(8)
"""Kinds of arguments: tensors and lists of them; numbers that may differ from call to call, and
lists of them; what belongs to the plan, and numbers that do; a generator; a device."""

SHAPED_BY_NUMBERS: Final = frozenset(("arange", "range", "linspace", "logspace"))
"""Ops with numbers that the shape of the result depends on."""
_CODES: Final = {bool: "b", int: "i", float: "f", complex: "c"}

Returned: TypeAlias = tuple[str, int] | tuple[str, int, int]
"""What an op gives: ``("new", k)``, its result k; ``("list", first, count)``, a list of results;
``("given", k)``, its argument k; ``("number", n)``, a number that its rules tell."""


class CallPlan:
    """A plan on this side.

    Attributes
    ----------
    id, layout, step
        As for ``ops.torch_call.Call``.
    place : Home
    fresh : list
        For each result that is a new tensor: position among the storages, and its form; None where
        the op gives no tensor.
    give : callable or None
        Makes the op's return value of the new tensors and the arguments; None: the one that is new.
    only : Form or None
        Of the result, if it is one new tensor.
    back : int
        Position of the argument that the op gives back, if that is all it gives; else -1.
    returns : list of Returned
        What the op gives; empty where only the server knows.
    sizes : tuple of int or None
        Bytes of the storages that the op makes.
    operands : tuple of Operand
    """

    inplace = False  # of arrays; see ops.torch_call

    __slots__ = (
        "back",
        "fresh",
        "give",
        "id",
        "issue",
        "layout",
        "name",
        "only",
        "operands",
        "pack",
        "place",
        "returns",
        "sizes",
        "step",
        "unknown",
    )

    @property
    def n_out(self) -> int:
        return len(self.sizes)

    def __init__(
        self,
        call: Call,
        place: Home,
        fresh: list[Any],
        returns: list[Returned],
        give: Callable[..., Any] | None,
        back: int,
    ) -> None:
        self.id = call.id
        self.layout = call.layout
        self.pack = call.layout.pack
        self.step = call.step
        self.place = place
        self.issue = place.core.issue
        self.fresh = fresh
        self.returns = returns
        self.sizes = call.sizes
        self.operands = call.operands
        self.name = call.name
        self.give = give
        single = len(fresh) == 1 and fresh[0] is not None and give is None
        self.only: Form | None = fresh[0][1] if single else None
        self.back = back
        self.unknown = any(result.view is None and result.storage >= 0 for result in call.results)

    def finish(self, number: int, args: Any, keywords: dict[str, Any]) -> Any:
        """What the op gives, issued as record ``number``."""
        fresh = [
            None if one is None else make_tensor(self.place, number + one[0], one[1])
            for one in self.fresh
        ]
        return None if self.give is None else self.give(fresh, args, keywords)


class Kernel:
    """The kernel of one op.

    Parameters
    ----------
    op : OpOverload

    Attributes
    ----------
    required : int
        Arguments that every call has, by position.
    """

    def __init__(self, op: Any) -> None:
        schema = op._schema
        self.op = op
        self.name = _name_of(op)
        numbers = EXACT if schema.name.partition("::")[2] in SHAPED_BY_NUMBERS else NUMBER
        self._kinds = [_kind(argument, numbers) for argument in schema.arguments]
        self._names = {a.name: k for a, k in zip(schema.arguments, self._kinds, strict=True)}
        self._positions = {a.name: n for n, a in enumerate(schema.arguments)}
        self._in_order = [a.name for a in schema.arguments]
        self._given = [self._given_back(returned) for returned in schema.returns]
        self._writes = any(
            a.alias_info is not None and a.alias_info.is_write for a in schema.arguments
        )
        returned = self._given[0] if len(self._given) == 1 else None
        self._back = -1 if returned is None else self._positions[returned]
        self._lists = [str(r.type).startswith("List") for r in schema.returns]
        self.required = sum(
            not a.kwarg_only and not a.has_default_value() for a in schema.arguments
        )

    def _given_back(self, returned: Any) -> str | None:
        """The argument that an op gives back, as it wrote to it."""
        alias = returned.alias_info
        if alias is None or not alias.is_write:
            return None
        for argument in self.op._schema.arguments:
            known = argument.alias_info
            if known is not None and known.before_set == alias.before_set:
                return str(argument.name)
        return None

    def kinds_of(self, count: int, names: tuple[str, ...]) -> list[int]:
        """Kinds of the first ``count`` arguments and of those with these names."""
        return [*self._kinds[:count], *(self._names[name] for name in names)]

    @property
    def kinds(self) -> list[int]:
        """Kinds of all arguments."""
        return list(self._kinds)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.run(args, keywords, teaches=native is not None)[1]

    def run(
        self, args: Any, keywords: dict[str, Any], *, teaches: bool = False
    ) -> tuple[CallPlan, Any]:
        """Issue the op; the plan that was used, and what the op gives.

        ``teaches``: these are the arguments of the call that the part in C++ did not know, and it
        learns what is found out of them.
        """
        key: list[Any] = []
        values: list[Any] = []
        place: Home | None = None
        for kind, value in zip(self._kinds, args, strict=False):
            if kind == TENSOR:
                if value is None:
                    key.append(None)
                    continue
                if value.__class__ in _CODES:
                    _number(value, key, values)
                    continue
                held = HELD.get((value.data_ptr() or _address(value)) >> SHIFT)
                if held is None:
                    if not _host_number(value, key, values):
                        return self._mixed(args, keywords)
                    continue
                if place is not None and place is not held.home:
                    return self._mixed(args, keywords)
                place = held.home
                values.append(held.number)
                key += (value.shape, value.stride(), value.storage_offset(), value.dtype)
                if held.name in ODD:
                    key.append((value.is_conj(), value.is_neg()))
            elif kind == FIXED:
                key.append(tuple(value) if value.__class__ is list else value)
            elif kind == NUMBER and value.__class__ in _CODES:
                _number(value, key, values)
            else:
                found = self._rest(kind, value, key, values)
                if found is False or (found and place and found is not place):
                    return self._mixed(args, keywords)
                place = found or place
        for name, value in keywords.items():
            key.append(name)
            found = self._rest(self._names[name], value, key, values)
            if found is False or (found and place and found is not place):
                return self._mixed(args, keywords)
            place = found or place
        if place is None:
            place = home()
        complete = (self, place, torch.get_default_dtype(), *key)
        core = place.core
        plan: Any = core.plans.get(complete)
        if plan is None:
            try:
                plan = self._miss(place, complete, args, keywords)
            except _Again:
                return self.run(args, keywords)
        number = core.record_call(plan, values)
        if teaches and not plan.unknown:
            _teach(plan, complete, values)
        if plan.only is not None:
            return plan, make_tensor(place, number, plan.only)
        if plan.unknown:
            return plan, self._learn(place, plan, number)
        return plan, plan.finish(number, args, keywords)

    def _rest(self, kind: int, value: Any, key: list[Any], values: list[Any]) -> Any:
        """What is not among the most common kinds: the device it names, or False if the general way
        has to see to it."""
        if kind == FIXED:
            key.append(tuple(value) if isinstance(value, (list, tuple)) else value)
            return None
        if kind == EXACT:
            key += (value, value.__class__)
            return None
        if kind == TENSOR:
            value = [value]
        elif kind == TENSORS:
            key.append(None if value is None else len(value))
        elif kind == DEVICE:
            key.append(value)
            return home(value.index) if value is not None and value.type == "remote" else None
        elif kind == GENERATOR:
            key.append(None if value is None else str(value.device))
            if value is not None:
                values.append(_drawn_from(value))
            return None
        else:
            return self._numbers(value, key, values)
        place = None
        for tensor in value or ():
            if tensor is None:
                key.append(None)
                continue
            if tensor.__class__ in _CODES:
                _number(tensor, key, values)
                continue
            held = HELD.get((tensor.data_ptr() or _address(tensor)) >> SHIFT)
            if held is None:
                if not _host_number(tensor, key, values):
                    return False
                continue
            if place is not None and place is not held.home:
                return False
            place = held.home
            values.append(held.number)
            key += (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
            if held.name in ODD:
                key.append((tensor.is_conj(), tensor.is_neg()))
        return place

    def _numbers(self, value: Any, key: list[Any], values: list[Any]) -> Any:
        if isinstance(value, (list, tuple)):
            key.append(len(value))
            for item in value:
                self._numbers(item, key, values)
        elif value is None:
            key.append(None)
        else:
            _number(value, key, values)
        return None

    def _mixed(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[CallPlan, Any]:
        """With tensors of the host among the arguments, or a result that is wanted elsewhere."""
        target = keywords.get("device")
        if target is not None and target.type == "remote":
            plan, made = self.run(args, {k: v for k, v in keywords.items() if k != "device"})
            return plan, made.to(target)
        return self.run(*bring_over(self.name, args, keywords))

    # -- plans ----------------------------------------------------------------------------------

    def _miss(
        self, place: Home, key: Any, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> CallPlan:
        """A plan that was not seen before."""
        bases: dict[int, Tensor] = {}
        operands: list[Operand] = []
        template = _Template(place, operands, bases)
        positional = [
            template.place(kind, value) for kind, value in zip(self._kinds, args, strict=False)
        ]
        named = {name: template.place(self._names[name], value) for name, value in keywords.items()}
        fakes = [fake for _, fake in positional], {n: fake for n, (_, fake) in named.items()}
        try:
            made = infer(self.op, *fakes)
        except Unpredictable:
            sizes, results, fresh = self._unpredicted()
            returns: list[Returned] = []
            give = None
        else:
            self._adjust(args, keywords, *fakes)
            sizes, results, fresh, returns = self._predicted(made, place)
            simple = len(returns) == 1 and returns[0] == ("new", 0) and fresh[0] is not None
            give = None if simple else self._giver(returns)
        core = place.core
        with core.lock:
            call = Call(
                core.next_plan(),
                self.name,
                place.number,
                tuple(operands),
                [[item for item, _ in positional], {n: item for n, (item, _) in named.items()}],
                tuple(sizes),
                tuple(results),
                str(torch.get_default_dtype())[6:],
            )
            plan = CallPlan(call, place, fresh, returns, give, self._back if not fresh else -1)
            core.add_plan(key, plan, encode(call))
        return plan

    def _predicted(self, made: Any, place: Home) -> Any:
        returned = [made] if len(self._given) == 1 else list(made or ())
        flat: list[Any] = []
        returns: list[Returned] = []
        for value, given in zip(returned, self._given, strict=False):
            if given is not None:
                returns.append(("given", self._positions[given]))
            elif isinstance(value, (list, tuple)):
                returns.append(("list", len(flat), len(value)))
                flat += value
            elif value is None or isinstance(value, Tensor):
                returns.append(("new", len(flat)))
                flat.append(value)
            elif value.__class__ is int:
                returns.append(("number", value))
            else:
                raise TypeError(f"{self.name} gives a {type(value).__name__}")
        sizes, results = results_of(flat, place.views)
        fresh = [
            None
            if result.view is None
            else (
                result.storage,
                form_of(
                    tensor.dtype,
                    result.view.shape,
                    result.view.stride,
                    result.view.offset,
                    sizes[result.storage],
                ),
            )
            for tensor, result in zip(flat, results, strict=True)
        ]
        return sizes, results, fresh, returns

    def _giver(self, returns: list[Returned]) -> Callable[..., Any] | None:
        if not returns:
            return None
        names = self._in_order

        def one(item: Returned, fresh: Sequence[Any], args: Sequence[Any], keywords: Any) -> Any:
            kind, at, *count = item
            if kind == "new":
                return fresh[at]
            if kind == "number":
                return at
            if kind == "list":
                return list(fresh[at : at + count[0]])
            return keywords[names[at]] if names[at] in keywords else args[at]

        if len(returns) == 1:
            (single,) = returns
            return lambda fresh, args, keywords: one(single, fresh, args, keywords)
        return lambda fresh, args, keywords: tuple(
            one(item, fresh, args, keywords) for item in returns
        )

    def _unpredicted(self) -> Any:
        """Every result is a storage of its own, of which nothing is known."""
        if any(self._given) or any(self._lists):
            raise NotImplementedError(
                f"{self.name}: only the server knows the results, and how many there are"
            )
        count = len(self._given)
        results = [Result(k, None, "") for k in range(count)]
        return [None] * count, results, [None] * count

    def _learn(self, place: Home, plan: CallPlan, number: int) -> Any:
        """Ask for the shapes of results that could not be predicted: a round trip."""
        core = place.core
        waits = [core.ask(Op.META, number + k, kind="shape") for k in range(plan.step)]
        made = []
        for k, wait in enumerate(waits):
            shape, name = core.wait(wait)
            dtype = getattr(torch, name)
            stride = torch.empty(shape, device="meta").stride()
            size = dtype.itemsize * torch.Size(shape).numel()
            form = form_of(dtype, tuple(shape), stride, 0, size)
            made.append(make_tensor(place, number + k, form))
        return made[0] if len(made) == 1 else tuple(made)

    def _adjust(
        self,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
        fakes: list[Any],
        named: dict[str, Any],
    ) -> None:
        """Give ``out=`` the shape that the op gave it."""
        if not self._writes:
            return
        for argument in self.op._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            position, name = self._positions[argument.name], argument.name
            real = (
                keywords.get(name) if name in keywords else (*args, None)[min(position, len(args))]
            )
            fake = named.get(name) if name in named else (*fakes, None)[min(position, len(fakes))]
            if isinstance(real, Tensor) and isinstance(fake, Tensor) and real.shape != fake.shape:
                real.resize_(fake.shape)
                raise _Again


def _teach(plan: CallPlan, key: Any, values: list[Any]) -> None:
    """Let the part in C++ know the plan of the call that it did not know."""
    core = plan.place.core
    with core.lock:
        known: Any = core.plans.get(key)
        if known is plan:  # else the plans were forgotten meanwhile
            record = plan.pack(plan.id, *values)
            native.learn(
                plan.id,
                plan.layout.format,
                record,
                plan.step,
                plan.fresh,
                plan.returns,
                plan.sizes,
            )


class _Again(Exception):
    """An argument was changed: look at them anew."""


class _Template:
    """The arguments of a plan: as they travel, and as fakes."""

    def __init__(self, place: Home, operands: list[Operand], bases: dict[int, Tensor]) -> None:
        self._place = place
        self._operands = operands
        self._bases = bases

    def place(self, kind: int, value: Any) -> tuple[Any, Any]:
        """An argument as it travels, and as inference takes it."""
        if value is None:
            return None, None
        if kind == TENSOR:
            return self._tensor(value)
        if kind == TENSORS:
            pairs = [(None, None) if item is None else self._tensor(item) for item in value]
            return ["list", *(a for a, _ in pairs)], [b for _, b in pairs]
        if kind == DEVICE:
            return ["device"], torch.device(self._place.kind)
        if kind == GENERATOR:
            self._operands.append("i")
            kind_of = "generator" if value.device.type == "remote" else "seeded"
            if kind_of == "generator" and value.device != self._place.device:
                raise RuntimeError(
                    f"Expected a '{self._place.device}' generator device but found '{value.device}'"
                )
            return [kind_of, ["slot", len(self._operands) - 1]], None
        if kind in (NUMBER, NUMBERS):
            return self._number(value)
        return _fixed(value), value

    def _tensor(self, tensor: Tensor) -> tuple[Any, Any]:
        if tensor.__class__ in _CODES:
            return self._number(tensor)
        if tensor.is_cpu:
            slot, _ = self._number(tensor.item())
            return ["number", str(tensor.dtype)[6:], slot], host_fake(tensor.dtype)
        held = HELD[(tensor.data_ptr() or _address(tensor)) >> SHIFT]
        self._operands.append(view_of(tensor, self._place.views))
        fake = fake_of(tensor, self._place.kind, self._bases, held.name)
        return ["slot", len(self._operands) - 1], fake

    def _number(self, value: Any) -> tuple[Any, Any]:
        if isinstance(value, (list, tuple)):
            pairs = [self._number(item) for item in value]
            return ["list", *(a for a, _ in pairs)], [b for _, b in pairs]
        self._operands.append(_CODES[value.__class__])
        return ["slot", len(self._operands) - 1], value


def _fixed(value: Any) -> Any:
    """A value that belongs to the plan, as it travels."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (list, tuple)):
        return ["list", *map(_fixed, value)]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)[6:]]
    if isinstance(value, torch.layout):
        return ["layout", str(value)[6:]]
    if isinstance(value, torch.memory_format):
        return ["format", str(value)[6:]]
    raise TypeError(f"an op can't take a {type(value).__name__} to a server")


def _kind(argument: Any, numbers: int) -> int:
    kind = argument.type
    listed = False
    while kind.kind() in ("OptionalType", "ListType"):
        listed = listed or kind.kind() == "ListType"
        kind = kind.getElementType()
    match kind.kind():
        case "TensorType":
            return TENSORS if listed else TENSOR
        case "NumberType" | "FloatType" | "ComplexType":
            return NUMBERS if listed else numbers
        case "GeneratorType":
            return GENERATOR
        case "DeviceObjType":
            return DEVICE
    return FIXED


def _number(value: Any, key: list[Any], values: list[Any]) -> None:
    """Take a Python number by its value."""
    code = _CODES[value.__class__]
    key.append(code)
    if code == "c":
        values += (value.real, value.imag)
    else:
        values.append(value)


def _drawn_from(generator: torch.Generator) -> int:
    """What names a generator to the server: its number there, or a seed out of one of the host."""
    if generator.device.type == "remote":
        return int(native.generator_of(generator))
    return int(torch.randint(1 << 62, (), generator=generator).item())


def _host_number(tensor: Tensor, key: list[Any], values: list[Any]) -> bool:
    """Take a tensor of the host without axes by its value; False if it is none."""
    if not tensor.is_cpu or tensor.dim():
        return False
    key.append(tensor.dtype)
    _number(tensor.item(), key, values)
    return True


def _name_of(op: Any) -> str:
    schema = op._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _address(tensor: Tensor) -> int:
    """Of the storage; a tensor without elements has none itself."""
    return tensor.untyped_storage().data_ptr()
