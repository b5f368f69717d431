"""Chains run block by block give the bits that their ops give one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuremote._speed import native
from gpuremote.backend.fused import BLOCK, GRAIN, REGISTERS, SMALLEST, Blocked, Chain, Piece
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.errors import OpError
from gpuremote.ops.catalogue import find
from gpuremote.ops.meta import DTYPES, MetaTable
from gpuremote.ops.operands import Operand
from gpuremote.ops.plan import Plan, define
from gpuremote.ops.ufuncs import BINARY, UNARY

Array = npt.NDArray[Any]

METAS: Final = MetaTable()
SIZES: Final = [SMALLEST, SMALLEST + 1, SMALLEST + GRAIN - 1, SMALLEST + 12 * GRAIN + 4099]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def backend() -> NumpyBackend:
    return NumpyBackend()


def numbers(size: int, dtype: str, seed: int, offset: int = 0) -> Array:
    """Any bits at all, or numbers such as programs have with some special ones among them; not
    always at the start of an allocation."""
    chance = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    room = np.empty(size + offset, kind)
    found = room[offset:]
    if kind.kind == "b":
        found[...] = chance.integers(0, 2, size)
    elif seed % 2:
        found[...] = chance.integers(0, 256, size * kind.itemsize, np.uint8).view(kind)
    elif kind.kind in "iu":
        found[...] = chance.integers(0, 100, size)
    else:
        found[...] = chance.standard_normal(size) * chance.choice([1e-3, 1, 10, 1e3], size)
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1, 2, 0.5], kind)
        places = chance.integers(0, size, size // 50)
        found[places] = chance.choice(special, len(places))
        if kind.kind == "c":
            found *= chance.choice(np.array([1, 1j, 1 + 1j, -0.5j], kind), size)
    return found


def meta(array: Any) -> Operand:
    if not isinstance(array, np.ndarray):
        return {bool: "b", int: "i", float: "f", complex: "c"}[type(array)]
    return METAS.get(array.shape, array.dtype, 0)


def plan_of(name: str, operands: Sequence[Any], **params: Any) -> Plan:
    return define(64, find(name), [meta(o) for o in operands], params, 0, METAS)


def alone(backend: NumpyBackend, plan: Plan, operands: Sequence[Any]) -> Any:
    """What the op gives by itself; None if it is one in place."""
    made = backend.compile(plan)(operands)
    return None if made is None else made[0]


def fused(backend: NumpyBackend, plan: Plan, operands: Sequence[Any], repeat: int) -> Array:
    """The op, and then copies, so that its own result is never whole."""
    piece = backend.piece(plan)
    assert piece is not None
    steps: list[tuple[Any, tuple[int, ...]]]
    steps = [(piece, tuple(range(-1, -1 - len(operands), -1)))]
    copying = backend.piece(define(65, find("copy"), plan.bounds, {}, 0, METAS))
    steps += [(copying, (k,)) for k in range(repeat)]
    program = backend.fuse(Chain(steps, [len(steps) - 1]))
    assert program is not None
    out = np.empty(plan.bounds[0].shape, plan.bounds[0].dtype)
    program(operands, [out])
    return out


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_every_ufunc(backend: NumpyBackend, name: str) -> None:
    ran = 0
    for seed, dtype in enumerate(DTYPES):
        itemsize = np.dtype(dtype).itemsize
        for odd in (0, 1) if dtype in ("f4", "f8") else (seed % 2,):
            # Two blocks, of which the last is longer.
            size = 2 * BLOCK // itemsize + (0, 1, 4099, GRAIN - 1)[(seed + 2 * odd) % 4]
            x = numbers(size, dtype, 2 * seed + odd, seed % 4)
            y = numbers(size, dtype, 2 * seed + odd + 40, (3 * seed) % 4)
            forms: list[tuple[Any, ...]] = [(x,)]
            if name in BINARY:
                forms = [(x, y), (x, 3), (2.5, x), (x, x), (x, y[5:6].reshape(()))][odd:]
            for operands in forms:
                try:
                    plan = plan_of(name, operands)
                    expected = alone(backend, plan, operands)
                except (OpError, ValueError, OverflowError, TypeError):
                    continue
                if plan.bounds[0].nbytes < SMALLEST:
                    continue
                if name == "expm1" and x.dtype.kind == "c":
                    assert backend.piece(plan) is None  # it is more than NumPy's ufunc
                    continue
                found = fused(backend, plan, operands, 2)
                assert found.tobytes() == expected.tobytes(), (name, dtype, size)
                ran += 1
    assert ran


@pytest.mark.parametrize("source", DTYPES)
def test_every_cast(backend: NumpyBackend, source: str) -> None:
    for seed, target in enumerate(DTYPES):
        x = numbers(SIZES[seed % len(SIZES)], source, seed)
        try:
            plan = plan_of("astype", (x,), dtype=target)
        except OpError:
            continue
        expected = alone(backend, plan, (x,))
        assert fused(backend, plan, (x,), 2).tobytes() == expected.tobytes(), target


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "c16"])
def test_where_clip_round(backend: NumpyBackend, dtype: str) -> None:
    x, y = numbers(SIZES[3], dtype, 2), numbers(SIZES[3], dtype, 4)
    condition = numbers(SIZES[3], "?", 0)
    one = np.array(1, dtype)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("where", (condition, x, y), {}),
        ("where", (condition, one, y), {}),
        ("where", (x, x, y), {}),
        ("where", (condition, x, 0), {}),
        ("clip", (x, one, y), {}),
        ("clip", (x, -1, 1), {}),
        ("clip", (x, 1), {"bounds": "min"}),
        ("clip", (x, y), {"bounds": "max"}),
        ("round", (x,), {"decimals": 1}),
    ]
    for name, operands, params in calls:
        plan = plan_of(name, operands, **params)
        expected = alone(backend, plan, operands)
        assert fused(backend, plan, operands, 2).tobytes() == expected.tobytes(), name


CHAINED: Final = [
    "add",
    "subtract",
    "multiply",
    "divide",
    "maximum",
    "hypot",
    "less",
    "exp",
    "sqrt",
]
DRAWN = st.tuples(
    st.sampled_from([*CHAINED, "add_", "multiply_", "astype", "where"]),
    st.integers(0, 99),
    st.integers(0, 99),
    st.sampled_from(["", "3", "0.5"]),
    st.booleans(),
)


@given(
    dtype=st.sampled_from(["f4", "f8", "f2", "i4", "c8"]),
    size=st.sampled_from(SIZES),
    drawn=st.lists(DRAWN, min_size=2, max_size=20),
)
def test_chains(
    backend: NumpyBackend, dtype: str, size: int, drawn: list[tuple[str, int, int, str, bool]]
) -> None:
    """Registers are given to others when nobody reads them any more, and not before."""
    inputs: list[Any] = [numbers(size, dtype, 2), numbers(size, "f4", 4)]
    values: dict[int, Any] = {-1: inputs[0].copy(), -2: inputs[1].copy()}
    steps: list[tuple[Any, tuple[int, ...]]] = []
    # Both occur first in this order.
    first = plan_of("add", inputs)
    drawn_plans: list[tuple[Plan, list[int]]] = [(first, [-1, -2])]
    values[0] = alone(backend, first, inputs)
    wanted: list[int] = []
    for name, a, b, scalar, keep in drawn:
        names = sorted(values)
        refs = [names[a % len(names)], names[b % len(names)]]
        params = {"dtype": "f4"} if name == "astype" else {}
        if name in ("exp", "astype"):
            refs = refs[:1]
        elif name == "where":
            refs = [refs[0], refs[1], refs[0]]
        operands = [values[ref] for ref in refs]
        if scalar and len(refs) == 2:
            number = int(scalar) if scalar == "3" else float(scalar)
            operands[1] = number
        try:
            plan = plan_of(name, operands, **params)
        except OpError:
            continue
        if backend.piece(plan) is None:
            continue
        if scalar and len(refs) == 2:
            inputs.append(operands[1])
            refs[1] = -len(inputs)
        made = alone(backend, plan, operands)
        number_of = len(drawn_plans)
        drawn_plans.append((plan, refs))
        if made is not None:
            values[number_of] = made
            if keep:
                wanted.append(number_of)
    steps = [(backend.piece(plan), tuple(refs)) for plan, refs in drawn_plans]
    program = backend.fuse(Chain(steps, wanted))
    if program is None:
        return
    given_ = [x.copy() if isinstance(x, np.ndarray) else x for x in inputs]
    given_[0], given_[1] = numbers(size, dtype, 2), numbers(size, "f4", 4)
    results = [np.empty(size, drawn_plans[k][0].bounds[0].dtype) for k in wanted]
    program(given_, results)
    for k, result in zip(wanted, results, strict=True):
        assert result.tobytes() == values[k].tobytes(), (k, drawn_plans[k])
    for k in (0, 1):
        assert given_[k].tobytes() == values[-1 - k].tobytes()


OF_OTHER_DTYPES: Final = {"ldexp", "signbit"}
"""Ufuncs whose results and operands are never of one dtype."""


def forms_of(name: str, x: Array, y: Array) -> list[tuple[Any, ...]]:
    """Operands: arrays, numbers on either side, and arrays without axes."""
    if name in UNARY:
        return [(x,)]
    value = y[5:6].reshape(())
    return [(x, y), (x, 3), (2.5, x), (x, 0.5), (x, x), (x, value), (value, x)]


@pytest.mark.skipif(native is None, reason="only where the part in C is")
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_every_ufunc_in_c(backend: NumpyBackend, name: str) -> None:
    """Its result is a block that the next op reads, or is kept as well."""
    ran = 0
    for seed, dtype in enumerate(DTYPES):
        itemsize = np.dtype(dtype).itemsize
        size = max(SMALLEST // itemsize, GRAIN) + (1, 4099, GRAIN - 1, 0)[seed % 4]
        x = numbers(size, dtype, 2 * seed, seed % 4)
        y = numbers(size, dtype, 2 * seed + 40, 3 * seed % 4)
        forms = forms_of(name, x, y)
        for operands in {seed % len(forms), seed // 2 % len(forms), 0}:
            ran += runs_in_c(backend, name, forms[operands], seed % 2 == 0)
    assert bool(ran) == (name not in OF_OTHER_DTYPES)


@pytest.mark.skipif(native is None, reason="only where the part in C is")
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_every_ufunc_in_place(backend: NumpyBackend, name: str) -> None:
    """In the place of an operand it gives the same bits: ``native/execute.c`` relies on that."""
    ran = 0
    for seed, dtype in enumerate(DTYPES):
        size = 4096 + (1, 4099, 0, 7)[seed % 4]
        x = numbers(size, dtype, 2 * seed, seed % 4)
        y = numbers(size, dtype, 2 * seed + 40, 3 * seed % 4)
        for operands in forms_of(name, x, y):
            try:
                plan = plan_of(name, operands)
                expected = alone(backend, plan, operands)
            except (OpError, TypeError, ValueError, OverflowError):
                continue  # not of these dtypes, or of these values
            function: Any = backend.compile(plan)
            if not getattr(function, "elementwise", False):
                continue
            for position, operand in enumerate(operands):
                if getattr(operand, "shape", ()) != x.shape or operand.dtype != expected.dtype:
                    continue
                place = operand.copy()
                values = [place if o is operand else o for o in operands]
                assert function.kernel(*values, out=place) is place
                assert place.tobytes() == expected.tobytes(), (plan, position)
                ran += 1
    assert ran


def runs_in_c(backend: NumpyBackend, name: str, operands: tuple[Any, ...], keep: bool) -> bool:
    """Whether that is a chain of one dtype; then its bits are compared."""
    try:
        plan = plan_of(name, operands)
        first = alone(backend, plan, operands)
    except (OpError, TypeError, ValueError, OverflowError):
        return False  # not of these dtypes, or of these values
    piece = backend.piece(plan)
    if piece is None or not piece.uniform:
        return False
    last = define(
        65, find("logical_not" if first.dtype == bool else "square"), plan.bounds, {}, 0, METAS
    )
    steps = [(piece, tuple(range(-1, -1 - len(operands), -1))), (backend.piece(last), (0,))]
    if last.bounds != plan.bounds:
        return False
    program = backend.fuse(Chain(steps, [0, 1] if keep else [1]))
    assert isinstance(program, Blocked)
    if program._loops is None:
        return False  # numbers that are cast by what they are
    outs = [np.empty_like(first) for _ in range(1 + keep)]
    program(operands, outs)
    assert outs[-1].tobytes() == alone(backend, last, [first]).tobytes(), (plan, operands)
    assert outs[0].tobytes() == first.tobytes() or not keep, (plan, operands)
    return True


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("name", ["square", "exp"])
def test_loops_in_c(backend: NumpyBackend, name: str, offset: int) -> None:
    """Of one dtype it runs in C, where the part in C is there; not on what lies across words."""
    size = SIZES[0] + 4099
    x = np.empty(8 * size + 8, "u1")[offset:][: 8 * size].view("f8")
    x[:] = numbers(size, "f8", 2)
    plans = [plan_of(name, (x,)), plan_of("add", (x, x)), plan_of("multiply", (x, 0.3))]
    pieces = [backend.piece(plan) for plan in plans]
    steps = [(pieces[0], (-1,)), (pieces[1], (0, -1)), (pieces[2], (1, -2))]
    program = backend.fuse(Chain(steps, [2]))
    assert isinstance(program, Blocked)
    assert (program._loops is None) == (native is None)
    out = np.empty(size)
    program([x, 0.3], [out])
    wanted = (alone(backend, plans[0], [x]) + x) * 0.3
    assert out.tobytes() == wanted.tobytes()
    mixed = plan_of("astype", (x,), dtype="f4")
    steps = [*steps, (backend.piece(mixed), (2,))]
    program = backend.fuse(Chain(steps, [3]))
    assert isinstance(program, Blocked)
    assert program._loops is None


def test_too_many_at_a_time(backend: NumpyBackend) -> None:
    x = numbers(SIZES[0], "f8", 2)
    plan = plan_of("exp", (x,))
    adding = plan_of("add", (x, x))
    piece, add = backend.piece(plan), backend.piece(adding)
    steps: list[tuple[Any, tuple[int, ...]]]
    steps = [(piece, (-1,)) for _ in range(REGISTERS + 1)]
    steps += [(add, (0, k)) for k in range(1, REGISTERS + 1)]
    assert backend.fuse(Chain(steps, [])) is None
    assert backend.fuse(Chain(steps[1:-1], [])) is not None


def test_what_is_no_part_of_a_chain() -> None:
    x, small = numbers(SIZES[0], "f8", 2), numbers(64, "f8", 2)
    wide = x.reshape(-1, 64)
    assert Piece.of(plan_of("add", (x, x))) is not None
    assert Piece.of(plan_of("add", (small, small))) is None
    assert Piece.of(plan_of("add", (wide, small))) is None  # broadcast
    assert Piece.of(plan_of("sum", (x,))) is None
    assert Piece.of(plan_of("reshape", (x,), shape=(-1,))) is None
