"""Definitions of graphs on the wire: what is accepted comes back as it was, the rest is refused."""

from __future__ import annotations

import copy
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.ops.torch_call import Views
from gpuremote.ops.torch_graph import MAX_NODES, Graph, Node, decode, encode, is_graph, last_uses

VIEW = Views().get("float32", (2,), (1,))
PLANS: dict[int, tuple[Any, int]] = {
    70: ((VIEW, VIEW, "f"), 1),  # takes two, makes one
    71: ((VIEW,), 0),  # writes
    72: (("i", "b", "c"), 2),
}


def _graph() -> Graph:
    nodes = [
        Node(72, [[3], [True], [1.0, -1.0]]),  # makes 2 and 3
        Node(70, [0, 2, [0.5]]),  # makes 4
        Node(71, [1]),
        Node(70, [4, 4, [1.5]]),  # makes 5
    ]
    return Graph(80, 2, nodes, (5, 3))


def test_there_and_back() -> None:
    blob = msgpack.unpackb(msgpack.packb(encode(_graph())))
    assert is_graph(blob)
    found = decode(blob, PLANS.__getitem__)
    assert encode(found) == encode(_graph())
    assert found.layout.size == 4 + 2 * 8
    assert (found.step, found.n_out) == (2, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_whether_it_is_to_be_compiled(compiled: bool) -> None:
    plain = _graph()
    blob = encode(Graph(plain.id, plain.inputs, plain.nodes, plain.outputs, compiled))
    # As older servers know it, where it is not asked for.
    assert len(blob) == 5 + compiled
    assert decode(blob, PLANS.__getitem__).compiled is compiled


@pytest.mark.parametrize("rest", [[1], ["yes"], [None], [True, True]])
def test_what_is_no_answer_to_that(rest: list[Any]) -> None:
    with pytest.raises(ProtocolError):
        decode([*encode(_graph()), *rest], PLANS.__getitem__)


def test_what_nobody_needs_any_more() -> None:
    made = [PLANS[node.plan][1] for node in _graph().nodes]
    assert last_uses(_graph(), made) == [[], [2], [], [4]]


def test_what_nobody_ever_needs() -> None:
    graph = Graph(80, 0, [Node(72, [[1], [True], [1.0, 1.0]])], (1,))
    assert last_uses(graph, [2]) == [[0]]


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ((1,), -1, ProtocolError),
        ((1,), "80", ProtocolError),
        ((2,), -1, ProtocolError),
        ((2,), 1 << 20, LimitExceeded),
        ((3,), None, ProtocolError),
        ((3, 0), [70], ProtocolError),
        ((3, 0), [73, []], ProtocolError),
        ((3, 0), [72, [[3], [True]]], ProtocolError),
        ((3, 0, 1, 0), [1 << 63], LimitExceeded),
        ((3, 0, 1, 0), [3.0], ProtocolError),
        ((3, 0, 1, 0), [True], ProtocolError),
        ((3, 0, 1, 1), [1], ProtocolError),
        ((3, 0, 1, 2), [1.0], ProtocolError),
        ((3, 1, 1, 0), 4, ProtocolError),  # its own result
        ((3, 1, 1, 0), -1, ProtocolError),
        ((3, 1, 1, 0), True, ProtocolError),
        ((3, 1, 1, 0), [0.5], ProtocolError),
        ((3, 1, 1, 2), 0, ProtocolError),
        ((4,), [1], ProtocolError),  # an input
        ((4,), [6], ProtocolError),
        ((4,), [5, 5], ProtocolError),
        ((4,), ["5"], ProtocolError),
    ],
)
def test_definitions_that_are_none(path: tuple[int, ...], value: Any, error: type) -> None:
    blob = copy.deepcopy(encode(_graph()))
    place = blob
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(error):
        decode(blob, PLANS.__getitem__)


def test_too_many_nodes() -> None:
    blob = encode(_graph())
    blob[3] = [[71, [0]]] * (MAX_NODES + 1)
    with pytest.raises(LimitExceeded):
        decode(blob, PLANS.__getitem__)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 90) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(_VALUES, max_size=5))
def test_anything_else_is_refused(rest: list[Any]) -> None:
    try:
        found = decode(["graph", *rest], PLANS.__getitem__)
    except ProtocolError:
        return
    assert encode(found) == ["graph", *rest]
