"""Graphs: many calls of torch ops as one record.

A definition names calls that were defined before, and how they follow from each other::

    ["graph", id, inputs, nodes, outputs]
    ["graph", id, inputs, nodes, outputs, compiled]

Values are numbered: the ``inputs`` first, then the storages that each node makes, in order. A node
is ``[plan, operands]``: an integer is a value's number, a list with one or two floats, or one
integer or bool, is a scalar. ``outputs`` are the values that the record gives. A call is the
graph's id and the handles of its inputs; it uses as many record numbers as there are outputs.
``compiled``: the server is to make one piece of code of it where it can.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from gpuremote.errors import LimitExceeded, ProtocolError
from gpuremote.ops.torch_call import View

__all__ = ["MAX_NODES", "Graph", "Node", "Ref", "decode", "encode", "is_graph", "last_uses"]

MARK: Final = "graph"
MAX_NODES: Final = 65536
MAX_INPUTS: Final = 16384

Ref: TypeAlias = int | list[Any]
"""A value's number, or a scalar."""


class Node(NamedTuple):
    """A call in a graph."""

    plan: int
    operands: list[Ref]


class Graph:
    """A graph as it is defined.

    Attributes
    ----------
    id : int
    inputs : int
        How many.
    nodes : list of Node
    outputs : tuple of int
        Numbers of values that nodes make.
    compiled : bool
        The server is to make one piece of code of it where it can.
    layout : struct.Struct
    step : int
        Record numbers that a call uses.
    """

    inplace = False

    def __init__(
        self,
        ident: int,
        inputs: int,
        nodes: list[Node],
        outputs: tuple[int, ...],
        compiled: bool = False,
    ) -> None:
        self.compiled = compiled
        self.id = ident
        self.inputs = inputs
        self.nodes = nodes
        self.outputs = outputs
        self.layout = struct.Struct(f"<I{inputs}Q")
        self.step = len(outputs) or 1

    @property
    def n_out(self) -> int:
        return len(self.outputs)


def encode(graph: Graph) -> list[Any]:
    """The definition as plain lists for msgpack."""
    nodes = [[node.plan, node.operands] for node in graph.nodes]
    compiled = [True] if graph.compiled else []
    return [MARK, graph.id, graph.inputs, nodes, list(graph.outputs), *compiled]


def is_graph(obj: Any) -> bool:
    """Whether a definition from the wire is one of these."""
    return isinstance(obj, list) and bool(obj) and obj[0] == MARK


def decode(obj: Any, shape_of: Callable[[int], tuple[Sequence[View | str], int]]) -> Graph:
    """Read a definition that came over the wire.

    Parameters
    ----------
    shape_of : callable
        Operands of a plan, and how many storages it makes; raises KeyError for one that is not
        there.

    Raises
    ------
    ProtocolError
        Not a definition, or of plans or values that there are not (LimitExceeded: one that is over
        a cap).
    """
    match obj:
        case [str(), int(ident), int(inputs), list(nodes), list(outputs), *rest] if len(
            rest
        ) <= 1 and all(type(one) is bool for one in rest):
            compiled = rest == [True]
        case _:
            raise ProtocolError("a malformed definition of a graph")
    if not 0 <= ident < 1 << 32 or inputs < 0:
        raise ProtocolError("a definition of a graph with numbers that can't be")
    if len(nodes) > MAX_NODES or inputs > MAX_INPUTS or len(outputs) > MAX_INPUTS:
        raise LimitExceeded(f"a graph of more than {MAX_NODES} nodes or {MAX_INPUTS} inputs")
    known = inputs
    found: list[Node] = []
    for node in nodes:
        match node:
            case [int(plan), list(operands)]:
                pass
            case _:
                raise ProtocolError("a malformed node of a graph")
        try:
            wanted, made = shape_of(plan)
        except KeyError:
            raise ProtocolError(f"a graph of plan {plan}, which is not defined") from None
        if len(operands) != len(wanted):
            raise ProtocolError(f"a node of {len(operands)} operands where there are {len(wanted)}")
        for operand, kind in zip(operands, wanted, strict=True):
            _check(operand, kind, known)
        found.append(Node(plan, operands))
        known += made
    made_here = range(inputs, known)
    if any(type(value) is not int or value not in made_here for value in outputs):
        raise ProtocolError("a graph that gives a value which none of its nodes makes")
    if len(set(outputs)) != len(outputs):
        raise ProtocolError("a graph that gives a value twice")
    return Graph(ident, inputs, found, tuple(outputs), compiled)


_SCALARS: Final[dict[str, tuple[type, int]]] = {
    "b": (bool, 1),
    "i": (int, 1),
    "f": (float, 1),
    "c": (float, 2),
}


def _check(operand: Any, kind: View | str, known: int) -> None:
    if isinstance(kind, View):
        if type(operand) is not int or not 0 <= operand < known:
            raise ProtocolError("a node of a graph takes a value that is not there yet")
        return
    wanted, count = _SCALARS[kind]
    if (
        not isinstance(operand, list)
        or len(operand) != count
        or any(type(part) is not wanted for part in operand)
    ):
        raise ProtocolError(f"a node of a graph has no scalar of kind {kind!r} where it needs one")
    if kind == "i" and not -(1 << 63) <= operand[0] < 1 << 63:
        raise LimitExceeded("a scalar of a graph is an integer beyond 64 bits")


def last_uses(graph: Graph, made: Sequence[int]) -> list[list[int]]:
    """For each node the values that nobody needs after it, inputs and outputs apart.

    Parameters
    ----------
    made : sequence of int
        How many storages each node makes.
    """
    last: dict[int, int] = {}
    number = graph.inputs
    for position, node in enumerate(graph.nodes):
        for operand in node.operands:
            if isinstance(operand, int):
                last[operand] = position
        for _ in range(made[position]):
            last[number] = position
            number += 1
    found: list[list[int]] = [[] for _ in graph.nodes]
    kept = set(graph.outputs)
    for value, position in last.items():
        if value >= graph.inputs and value not in kept:
            found[position].append(value)
    return found
