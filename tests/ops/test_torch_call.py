"""Definitions of torch calls on the wire: what is accepted comes back as it was, the rest is a
ProtocolError."""

from __future__ import annotations

import copy
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.ops.torch_call import Call, Result, View, Views, decode, encode, is_call


def _call(views: Views) -> Call:
    view = views.get("float32", (2, 3), (3, 1), 4)
    made = views.get("bfloat16", (2,), (1,))
    arguments = [
        [["slot", 0], ["list", 1, ["dtype", "int64"]], None, 2.5],
        {"alpha": ["slot", 1], "device": ["device"], "value": ["complex", 1.0, -1.0]},
    ]
    results = (Result(0, made, "bfloat16"), Result(-1, None, "uint8"), Result(1, None, ""))
    return Call(70, "aten::made.up", 1, (view, "f"), arguments, (4, None), results)


def test_there_and_back() -> None:
    here, there = Views(), Views()
    call = _call(here)
    blob = msgpack.unpackb(msgpack.packb(encode(call)))
    assert is_call(blob)
    found = decode(blob, there)
    assert encode(found) == encode(call)
    assert found.layout.size == 4 + 8 + 8
    assert found.step == 2
    assert found.operands[0] is there.get("float32", (2, 3), (3, 1), 4)


def test_where_a_view_ends() -> None:
    assert View("float64", (), (), 3, 0).end == 32
    assert View("int16", (0, 7), (7, 1), 9, 0).end == 0
    assert View("int8", (2, 3), (10, 2), 1, 0).end == 16
    assert View("float32", (4, 4), (0, 0), 0, 0).end == 4  # expanded


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((1,), -1),
        ((1,), "70"),
        ((2,), "x" * 300),
        ((3,), 5000),
        ((4,), None),
        ((4, 0), ["float32", [2, 3], [3], 0, 0]),
        ((4, 0), ["float33", [2], [1], 0, 0]),
        ((4, 0), ["float32", [2], [-1], 0, 0]),
        ((4, 0), ["float32", [1 << 47, 1 << 47], [1, 1], 0, 0]),
        ((4, 0), ["float32", [2], [1], 0, 99]),
        ((4, 1), "q"),
        ((5, 0, 0), ["slot", 2]),
        ((5, 0, 0), ["slot", True]),
        ((5, 0, 0), ["import", "os"]),
        ((5, 0, 0), []),
        ((5, 0, 0), b"bytes"),
        ((5, 0, 0), 1 << 70),
        ((5, 1), {"x" * 300: 1}),
        ((6, 0), -4),
        ((6, 0), 3),
        ((7, 0), [5, "float32", None]),
        ((7, 0), [0, "float32"]),
        ((7,), [[0, "float32", None]] * 5000),
    ],
)
def test_what_can_not_be(path: tuple[int, ...], value: Any) -> None:
    blob = copy.deepcopy(encode(_call(Views())))
    at: Any = blob
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(ProtocolError):
        decode(blob, Views())


def test_too_deep() -> None:
    blob = encode(_call(Views()))
    nested: Any = 1
    for _ in range(50):
        nested = ["list", nested]
    blob[5] = [[nested], {}]
    with pytest.raises(LimitExceeded):
        decode(blob, Views())


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)


@given(st.lists(_VALUES, min_size=8, max_size=8), st.integers(0, 8))
def test_any_definition_is_read_or_refused(values: list[Any], kept: int) -> None:
    """The first ones as they should be, the others as they come."""
    blob = encode(_call(Views()))[:kept] + values[kept:]
    try:
        decode(blob, Views())
    except ProtocolError:
        pass
