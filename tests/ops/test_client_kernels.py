"""Kernels that a program brings: what is inferred, what they write to, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, LimitExceeded, OpError, ShapeError
from gpuremote.ops import client_kernels
from gpuremote.ops.catalogue import find
from gpuremote.ops.client_kernels import check_launch, parse_parameters
from gpuremote.ops.meta import Meta
from gpuremote.ops.plan import Plan, PlanCaps, decode_definition, define, encode_definition
from tests.ops.case import METAS


def array(dtype: str, *shape: int) -> Meta:
    return METAS.get(shape, np.dtype(dtype), 0)


def plan_of(op: str, operands: list[Any], **params: Any) -> Plan:
    return define(7, find(op), operands, params, 0, METAS)


def elementwise(ins: str, outs: str, operands: list[Any], **params: Any) -> Plan:
    in_place = len(operands) > len(parse_parameters(ins))
    return plan_of(
        "elementwise_kernel" + "_" * in_place,
        operands,
        in_params=ins,
        out_params=outs,
        operation="",
        name="k",
        **params,
    )


def metas(plan: Plan) -> list[tuple[tuple[int, ...], str]]:
    assert plan.outputs is not None
    return [(meta.shape, meta.wire_dtype) for meta in plan.outputs]


def test_parameters_as_cupy_reads_them() -> None:
    assert [tuple(p) for p in parse_parameters("float32 x, raw T y")] == [
        (False, np.dtype("f4"), "", "x"),
        (True, None, "T", "y"),
    ]
    assert parse_parameters(" ") == ()
    for text in ("x", "T x y", "raw x", "T x-1", "T 1x", "T x,", ",", "raw"):
        with pytest.raises(ShapeError, match="is not \\[raw\\] TYPE NAME"):
            parse_parameters(text)
    for text in ("T i", "T _ind"):
        with pytest.raises(ShapeError, match="its loop's own"):
            parse_parameters(text)
    for text in ("quantum x", "object x", "U8 x", "datetime64 x"):
        with pytest.raises(DTypeError, match="is no dtype of a device's"):
            parse_parameters(text)


def test_placeholders() -> None:
    f4, f8 = array("f4", 3, 1), array("f8", 4)
    assert metas(elementwise("T x, U y", "T z, U w", [f4, f8])) == [((3, 4), "f4"), ((3, 4), "f8")]
    assert metas(elementwise("T x, float64 y", "bool z", [f4, f8])) == [((3, 4), "b1")]
    # Python's numbers become what the kernel takes, also before any array.
    assert metas(elementwise("T x, T y", "T z", ["f", f4])) == [((3, 1), "f4")]
    # What is written to says it before what is read does, and a result has to be it.
    with pytest.raises(DTypeError, match="parameter x is float64, and the array float32"):
        elementwise("T x", "T z", [f4, array("f8", 3, 1)])
    with pytest.raises(DTypeError, match="parameter y is float32, and the array float64"):
        elementwise("T x, T y", "T z", [f4, f8])
    with pytest.raises(DTypeError, match="parameter x is int32"):
        elementwise("int32 x", "T z", [f4])
    with pytest.raises(DTypeError, match="nothing says what type U"):
        elementwise("T x", "U z", [f4])
    with pytest.raises(DTypeError, match="nothing says what type T"):
        elementwise("T x", "T z", ["f"], size=3)


def test_length_of_the_loop() -> None:
    x = array("f4", 5, 2)
    assert metas(elementwise("T x, raw T y", "T z", [x, array("f4", 9)])) == [((5, 2), "f4")]
    assert metas(elementwise("raw T x", "raw T z", [x], size=7)) == [((7,), "f4")]
    with pytest.raises(ShapeError, match="give size="):
        elementwise("raw T x", "T z", [x])
    with pytest.raises(ShapeError, match="only if all of its arrays are raw"):
        elementwise("T x", "T z", [x], size=7)
    with pytest.raises(ShapeError, match="raw result"):
        elementwise("T x", "raw T z", [x])
    with pytest.raises(ShapeError, match="negative"):
        elementwise("raw T x", "T z", [x], size=-1)
    with pytest.raises(ShapeError, match="has to be an array"):
        elementwise("T x, raw T y", "T z", [x, "f"])
    with pytest.raises(ShapeError, match="broadcast"):
        elementwise("T x, T y", "T z", [x, array("f4", 3)])


def test_results_that_are_given_are_written_to() -> None:
    x, z = array("f4", 5), array("f4", 5)
    plan = elementwise("T x, float64 y", "T z, raw int32 w", [x, "f", z, array("i4", 9)])
    assert plan.n_out == 0
    assert plan.inplace
    assert plan.writes == (2, 3)
    with pytest.raises(ShapeError, match="takes 1 arguments, or 2 with its results, not 3"):
        elementwise("T x", "T z", [x, z, z])
    with pytest.raises(ShapeError, match="result z is \\(1,\\), not \\(5,\\)"):
        elementwise("T x", "T z", [x, array("f4", 1)])
    with pytest.raises(DTypeError, match="result z has to be an array"):
        elementwise("T x", "T z", [x, "f"])


def test_reductions() -> None:
    def reduction(ins: str, operands: list[Any], **params: Any) -> Plan:
        return plan_of(
            "reduction_kernel",
            operands,
            **{
                "in_params": ins,
                "out_params": "T y",
                "map_expr": "x * x",
                "reduce_expr": "a + b",
                "post_map_expr": "y = sqrt(a)",
                "identity": "0",
                "name": "norm",
                **params,
            },
        )

    x = array("f4", 5, 6)
    assert metas(reduction("T x", [x])) == [((), "f4")]
    assert metas(reduction("T x", [x], axis=1)) == [((5,), "f4")]
    assert metas(reduction("T x, T w", [x, array("f4", 6)], axis=(0,), keepdims=True)) == [
        ((1, 6), "f4")
    ]
    with pytest.raises(OpError, match="axis 2 does not exist"):
        reduction("T x", [x], axis=2)
    with pytest.raises(ShapeError, match="takes 1 arguments, not 2"):
        reduction("T x", [x, x])
    with pytest.raises(ShapeError, match="one result"):
        reduction("T x", [x], out_params="T y, T z")


RAW: dict[str, Any] = {"code": "...", "name": "f"}
HOW = ["i"] * 7


def test_raw_kernels_may_write_to_all_of_their_arrays() -> None:
    plan = plan_of("raw_kernel", [array("f4", 3), "f8", array("i4", 2), "i", *HOW], **RAW)
    assert plan.writes == (0, 2)
    assert plan.n_out == 0
    assert plan_of("raw_kernel", HOW, **RAW).writes == ()
    for operands in ([], HOW[1:], [*HOW[1:], "f"], [*HOW[1:], array("i8")]):
        with pytest.raises(ShapeError, match="the last 7 operands"):
            plan_of("raw_kernel", operands, **RAW)


def test_launches() -> None:
    assert check_launch([4, 1, 1, 32, 2, 1, 64]) == ((4, 1, 1), (32, 2, 1), 64)
    for launch in (
        [0, 1, 1, 32, 1, 1, 0],
        [1 << 31, 1, 1, 32, 1, 1, 0],
        [1, 1, 1, 1025, 1, 1, 0],
        [1, 1, -1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, -1],
        [1, 1, 1, 1, 1, 1, 1 << 31],
    ):
        with pytest.raises(ShapeError):
            check_launch(launch)


@pytest.mark.parametrize(
    "wrong",
    [
        {"code": 3},
        {"code": "x" * ((256 << 10) + 1)},
        {"name": ""},
        {"name": 3},
        {"name": "my kernel"},
        {"name": "f" * 65},
        {"options": ("-I/etc",)},
        {"options": ("--include-path=/etc",)},
        {"options": ("-include", "/etc/passwd")},
        {"options": ("-DX=`id`",)},
        {"options": ("-DX=" + "1" * 70,)},
        {"options": "-DX"},
    ],
)
def test_what_is_refused_before_it_travels(wrong: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        plan_of("raw_kernel", HOW, **{**RAW, **wrong})


def test_what_a_kernel_needs() -> None:
    with pytest.raises(ShapeError, match="takes code"):
        plan_of("raw_kernel", HOW, name="f")
    x = array("f4", 3)
    with pytest.raises(ShapeError, match="takes operation"):
        plan_of("elementwise_kernel", [x], in_params="T x", out_params="T y", name="k")
    with pytest.raises(ShapeError, match="takes map_expr"):
        plan_of("reduction_kernel", [x], in_params="T x", out_params="T y", name="k")


def test_what_a_session_brings_is_kept_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_kernels, "MAX_CODE_IN_ALL", 20)
    book = client_kernels.CodeBook()
    first, again = ({"code": "".join(["0123", "456789"])} for _ in range(2))
    for _ in range(5):
        book.enter(first)
        book.enter(again)
    assert again["code"] is first["code"]
    book.enter({"operation": "0123456789", "preamble": "abcdefghij", "name": "x" * 60})
    with pytest.raises(ShapeError, match="the most there may be"):
        book.enter({"code": "k"})
    book.enter({"code": 3})  # told by the op's rule


def test_options_for_arithmetic_and_names() -> None:
    options = ("-DN=3", "-D_X", "--std=c++17", "--use_fast_math", "--fmad=false", "-lineinfo")
    plan_of("raw_kernel", HOW, **RAW, options=options)


def test_code_travels_and_is_bounded() -> None:
    x = array("f4", 3)
    long = "//" + "x" * 5000
    plan = plan_of("raw_kernel", [x, *HOW], **{**RAW, "code": long})
    again = decode_definition(encode_definition(plan), METAS)
    assert again.params["code"] == long
    assert again.writes == (0,)
    with pytest.raises(LimitExceeded, match="a kernel of 5002 characters; at most 5000"):
        decode_definition(encode_definition(plan), METAS, PlanCaps(code=5000))
    # Only what is text of a program may be long.
    short = encode_definition(plan)
    short[4]["name"] = "f" * 65
    with pytest.raises(LimitExceeded, match="too long"):
        decode_definition(short, METAS)
    assert metas(elementwise("T x", "T z", [x], preamble=long)) == [((3,), "f4")]
