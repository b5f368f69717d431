"""What the catalogue infers, against what NumPy really returns."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, IndexOutOfBounds, OpError, ShapeError, UnsupportedOp
from gpuremote.ops.catalogue import CATALOGUE, VARIES, find
from gpuremote.ops.client_kernels import SPECS as BROUGHT
from gpuremote.ops.plan import Plan, define
from tests.ops.case import METAS, Case, values
from tests.ops.cases import CASES
from tests.ops.references import REFERENCE, reference, results, same_meta

# What a function of NumPy's does by its path is compared with it in tests/arrays.
NAMES = sorted(name for name, spec in CATALOGUE.items() if not spec.path and spec not in BROUGHT)

NUMPY_ERRORS = (TypeError, ValueError, IndexError, OverflowError, ArithmeticError, MemoryError)


def outcome(name: str, case: Case) -> Any:
    """What NumPy gives, or the exception it raises."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return results(reference(name, case))
        except NUMPY_ERRORS as error:
            return error


def inferred(name: str, case: Case) -> Plan | OpError:
    """What the catalogue says."""
    try:
        return define(0, find(name), case.kinds(), case.params, 0, METAS)
    except OpError as error:
        return error


def test_every_op_has_cases() -> None:
    indexing = {"getitem", "getitem_advanced", "getitem_mask", "setitem"}
    assert CASES.keys() == set(NAMES)
    assert REFERENCE.keys() | indexing == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_inferred_is_what_numpy_returns(name: str) -> None:
    spec = find(name)
    accepted = 0
    for case in CASES[name]():
        expected = outcome(name, case)
        plan = inferred(name, case)
        if isinstance(plan, OpError):
            assert isinstance(expected, Exception) or stricter(name, case), f"{case}: {plan}"
            assert plan.op == name
            continue
        if isinstance(expected, Exception):
            assert depends_on_values(name, case, expected), f"{case}: NumPy says {expected!r}"
            continue
        accepted += 1
        assert plan.n_out == len(plan.bounds) == (0 if spec.inplace else len(expected))
        assert spec.n_out in (plan.n_out, VARIES)
        if spec.inplace:
            assert plan.outputs == ()
            assert plan.nbytes_out == 0
        elif plan.outputs is not None:
            for meta, array in zip(plan.outputs, expected, strict=True):
                assert same_meta(meta, array), f"{case}: {meta}, NumPy {array.shape} {array.dtype}"
        else:
            for meta, array in zip(plan.bounds, expected, strict=True):
                assert meta.dtype == array.dtype
                assert meta.ndim == array.ndim
                assert all(n <= most for n, most in zip(array.shape, meta.shape, strict=True)), case
    assert accepted >= 3


def stricter(name: str, case: Case) -> bool:
    """Where we refuse what NumPy allows: its leftovers that other namespaces don't share."""
    x, params = case.operands[0], case.params
    return (
        # An axis of an array that has none.
        (not x.ndim and (name == "argsort" or params.get("axis") in (0, -1)))
        # Dropping imaginary parts, which NumPy does with a warning.
        or (x.dtype.kind == "c" and params.get("dtype", "c8")[0] != "c")
        # The largest of no elements, which older versions of NumPy refuse too.
        or (name == "norm" and not x.size and params["ord"] == math.inf)
    )


def depends_on_values(name: str, case: Case, error: Exception) -> bool:
    """Whether NumPy refuses for a reason that inference can't see."""
    if isinstance(error, np.linalg.LinAlgError):
        return "Singular" in str(error) or "positive definite" in str(error)
    if isinstance(error, OverflowError):
        return any(type(o) is int for o in case.operands)
    if name.startswith(("getitem", "setitem")):
        return (isinstance(error, IndexError | ValueError) and "i" in case.kinds()[1:]) or (
            "m" in case.params["index"]
        )
    return False


@pytest.mark.parametrize(
    ("name", "kinds", "params", "error", "text"),
    [
        ("add", [((2,), "f4"), ((3,), "f4")], {}, ShapeError, "(2,) and (3,)"),
        ("add_", [((1, 3), "f4"), ((2, 3), "f4")], {}, ShapeError, "in place"),
        ("add_", [((3,), "i4"), ((3,), "f4")], {}, DTypeError, "int32"),
        ("bitwise_and", [((3,), "f4"), "i"], {}, DTypeError, "float32, int"),
        ("add", ["f", "f"], {}, DTypeError, "one operand"),
        ("add", [((3,), "f4")], {}, ShapeError, "1 operands"),
        ("sin", ["f"], {}, DTypeError, "operand 0"),
        ("sum", [((3,), "f4")], {"axis": True}, ShapeError, "axis True"),
        ("sum", [((3,), "f4")], {"axis": 1.0}, ShapeError, "axis 1.0"),
        ("sum", [((3,), "f4")], {"dtype": "float32"}, DTypeError, "'float32'"),
        ("sum", [((3,), "f4")], {"out": 1}, ShapeError, "out"),
        ("sum", [((3,), "f4")], {"keepdims": 1}, ShapeError, "keepdims"),
        ("matmul", [((2, 3), "f4"), ((2, 3), "f4")], {}, ShapeError, "(2, 3) and (2, 3)"),
        ("svd", [((2, 2), "f2")], {}, DTypeError, "float16"),
        ("astype", [((2,), "c8")], {"dtype": "f4"}, DTypeError, "imaginary"),
        ("setitem", [((2,), "f4"), "c"], {"index": (":",)}, DTypeError, "imaginary"),
        ("fill_", [((2,), "f4"), "c16"], {}, DTypeError, "imaginary"),
        ("full", ["c"], {"shape": (2,), "dtype": "f4"}, DTypeError, "complex"),
        ("arange", ["i", "i", "i"], {"length": -1}, ShapeError, "negative"),
        ("arange", ["i", "c", "i"], {"length": 1}, DTypeError, "complex128"),
        ("random_normal", ["f"], {"shape": ()}, DTypeError, "seed"),
        ("getitem", [((2,), "f4"), ((2,), "i8")], {"index": ("a",)}, ShapeError, "getitem ops"),
        ("getitem", [((2,), "f4")], {"index": ("i",)}, ShapeError, "1 integers"),
        ("getitem", [((2,), "f4"), "i", "i"], {"index": ("i", "i")}, IndexOutOfBounds, "2 indices"),
        ("getitem", [((2,), "f4"), "f"], {"index": ("i",)}, DTypeError, "integer"),
        ("getitem_advanced", [((2,), "f4"), ((2,), "f4")], {"index": ("a",)}, DTypeError, "bools"),
        ("getitem_mask", [((2,), "f4"), ((3,), "b1")], {"index": ("m",)}, IndexOutOfBounds, "(3,)"),
        ("nonzero", [((), "f4")], {}, ShapeError, "without axes"),
        ("tile", [((2,), "f4")], {"reps": (1 << 60, 1 << 60)}, ShapeError, "can't exist"),
        ("zeros", [], {"shape": (1 << 40, 1 << 40)}, ShapeError, "can't exist"),
        ("zeros", [], {"shape": (0, 1 << 63)}, ShapeError, "length"),
        ("expand_dims", [((1,) * 64, "f4")], {"axis": 0}, ShapeError, "65 axes"),
    ],
)
def test_refusals_name_the_reason(
    name: str, kinds: list[Any], params: dict[str, Any], error: type[OpError], text: str
) -> None:
    operands = [k if isinstance(k, str) else METAS.get(k[0], np.dtype(k[1]), 0) for k in kinds]
    with pytest.raises(error) as caught:
        define(0, find(name), operands, params, 0, METAS)
    assert text in caught.value.message
    assert caught.value.op == name
    assert name in str(caught.value)


def test_unknown_op() -> None:
    with pytest.raises(UnsupportedOp, match="from_file"):
        find("from_file")


def test_cost_does_not_grow_with_the_arrays() -> None:
    """Shapes of an exabyte: any rule that touched elements would never come back."""
    huge = METAS.get((1 << 30, 1 << 29), np.dtype("f4"), 0)
    vector = METAS.get((1 << 60,), np.dtype("i1"), 0)
    given: dict[str, dict[str, Any]] = {
        "reshape": {"shape": (-1,)},
        "broadcast_to": {"shape": huge.shape},
        "expand_dims": {"axis": 0},
        "roll": {"shift": 1},
        "repeat": {"repeats": 1},
        "tile": {"reps": (1, 1)},
        "astype": {"dtype": "i1"},
    }
    started = time.perf_counter()
    tried = 0
    for name, spec in CATALOGUE.items():
        if spec.indexed or spec.n_out == 3:
            continue
        for operands in ([huge], [vector], [huge, huge], [huge, 2.0], [vector, vector]):
            kinds = ["f" if o == 2.0 else o for o in operands]
            try:
                define(0, spec, kinds, given.get(name, {}), 0, METAS)  # type: ignore[arg-type]
                tried += 1
            except OpError:
                pass
    assert tried > 200
    assert time.perf_counter() - started < 5


def test_a_plan_miss_costs_less_than_a_millisecond() -> None:
    x = METAS.get((1000, 1000), np.dtype("f4"), 0)
    for name, kinds in [("add", [x, x]), ("matmul", [x, x]), ("sum", [x]), ("svd", [x])]:
        define(0, find(name), kinds, {}, 0, METAS)  # The first ever asks NumPy.
        best = min(_timed(name, kinds) for _ in range(20))
        assert best < 1e-3, name


def _timed(name: str, kinds: list[Any]) -> float:
    started = time.perf_counter()
    define(0, find(name), kinds, {}, 0, METAS)
    return time.perf_counter() - started


def test_values_helper_gives_the_dtype() -> None:
    assert all(values((2,), name).dtype == np.dtype(name) for name in ("b1", "i1", "c8", "f2"))
