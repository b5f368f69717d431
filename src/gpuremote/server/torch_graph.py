"""Running a graph: the calls of a record, one after the other, without slots in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from gpuremote.errors import OutOfDeviceMemory, ProtocolError, UnsupportedOp
from gpuremote.ops.meta import Meta
from gpuremote.ops.torch_graph import Graph, decode, last_uses
from gpuremote.server.execute import Executable
from gpuremote.server.storage import STALLED, Slot, Storage
from gpuremote.server.torch_run import TorchExecutable, blocks_of

if TYPE_CHECKING:
    from gpuremote.server.session import WorkerSession

__all__ = ["GraphExecutable"]


class Failed(Exception):
    """A call of a graph failed: its position and name, and the error."""

    def __init__(self, position: int, name: str, error: Exception) -> None:
        super().__init__(name)
        self.position = position
        self.name = name
        self.error = error


class GraphExecutable(Executable):
    """A graph as the worker keeps it.

    Attributes
    ----------
    graph : Graph
    writes : tuple of int
        Inputs that it writes to.
    metas : tuple of Meta
        Of its outputs.
    reserve : int
        Bytes that it holds at most at a time, beside its inputs.
    """

    __slots__ = ("_calls", "_steps", "_whole", "_written", "graph", "metas", "writes")

    def __init__(self, graph: Graph, plans: Mapping[int, Executable]) -> None:
        self.graph = graph
        self._whole: Callable[[list[Any]], list[Any]] | None = None
        self.ident = graph.id
        self.layout = graph.layout
        self.form = b"Q" * graph.inputs
        self.n_out = graph.n_out
        self.name = f"graph of {len(graph.nodes)} ops"
        self.run = run_graph
        # What else there is was refused when the definition was read.
        calls = [cast(TorchExecutable, plans[node.plan]) for node in graph.nodes]
        self._calls = [call.call for call in calls] if graph.compiled else None
        ends = last_uses(graph, [call.n_out for call in calls])
        self._steps = [
            (call.function, _operands(node.operands), call.n_out, tuple(end), call.name)
            for call, node, end in zip(calls, graph.nodes, ends, strict=True)
        ]
        sizes = [cast(Meta, meta) for call in calls for meta in call.metas]
        self.metas = tuple(sizes[value - graph.inputs] for value in graph.outputs)
        self._written: list[set[Any]] = [
            {node.operands[k] for k in call.writes}
            for call, node in zip(calls, graph.nodes, strict=True)
        ]
        self.writes = self.written_by(len(calls))
        self.reserve = _most(graph, [call.n_out for call in calls], ends, sizes)

    @staticmethod
    def from_definition(blob: Any, plans: Mapping[int, Executable]) -> GraphExecutable:
        """Build from a DEFINE record.

        Raises
        ------
        ProtocolError
            The definition is malformed.
        """

        def shape_of(plan: int) -> Any:
            found = plans[plan]
            if not isinstance(found, TorchExecutable) or None in found.metas:
                raise ProtocolError(f"plan {plan} can't be part of a graph")
            return found.call.operands, found.n_out

        return GraphExecutable(decode(blob, shape_of), plans)

    def written_by(self, count: int) -> tuple[int, ...]:
        """Inputs that the first nodes write to."""
        written = set().union(*self._written[:count])
        return tuple(sorted(value for value in written if value < self.graph.inputs))

    def operands(
        self, fields: tuple[Any, ...], table: dict[int, Slot], missing: Callable[[int], Slot]
    ) -> list[Any]:
        return [table.get(handle) or missing(handle) for handle in fields[1:]]

    def compile(self, session: WorkerSession) -> None:
        """Make one piece of code of it, once; where that can't be it runs op by op."""
        calls, self._calls = self._calls, None
        if calls is None:
            return
        try:
            self._whole = session.backend.compile_graph(self.graph, calls)
        except Exception as error:
            # Whatever it is, there is another way.
            reason = str(error.message if isinstance(error, UnsupportedOp) else repr(error))
            with session.lock:
                session.answers.notice("op by op", graph=self.name, reason=reason[:1024])
        else:
            session.graphs_compiled += 1

    def execute(self, values: list[Any]) -> None:
        """Run the calls; ``values`` are the inputs, and all that there is at the end.

        Raises
        ------
        Failed
            A call failed.
        """
        if self._whole is not None:
            try:
                found = self._whole(values)
            except Exception as error:
                # How far it came nobody knows.
                raise Failed(len(self._steps) - 1, self.name, error) from error
            values += [None] * (max(self.graph.outputs, default=-1) + 1 - len(values))
            for value, block in zip(self.graph.outputs, found, strict=True):
                values[value] = block
            return
        for position, (function, operands, made, ends, name) in enumerate(self._steps):
            try:
                found = function([values[o] if o.__class__ is int else o[0] for o in operands])
            except Exception as error:
                raise Failed(position, name, error) from error
            if made:
                values += found
            for end in ends:
                values[end] = None


def _operands(refs: list[Any]) -> tuple[Any, ...]:
    return tuple(
        ref if isinstance(ref, int) else (complex(*ref),) if len(ref) == 2 else (ref[0],)
        for ref in refs
    )


def _most(graph: Graph, made: list[int], ends: list[list[int]], sizes: list[Any]) -> int:
    """Bytes that are held at most at a time."""
    held = most = 0
    number = 0
    for count, end in zip(made, ends, strict=True):
        held += sum(meta.nbytes for meta in sizes[number : number + count])
        number += count
        most = max(most, held)
        held -= sum(sizes[value - graph.inputs].nbytes for value in end)
    return most


def run_graph(
    number: int,
    session: WorkerSession,
    op: GraphExecutable,
    operands: list[Slot],
    outs: list[Slot],
) -> object:
    """Item of a stream: one graph, if its operands are there (else the one that is not).

    As ``server.execute.run_plan``.
    """
    values = blocks_of(number, session, op, operands, outs)
    if not isinstance(values, list):
        return values
    for position in op.writes:
        storage = operands[position].storage
        if storage is not None and storage.outgoing:
            return STALLED
    op.compile(session)
    try:
        # Counted before anything is allocated; what only nodes need is given back at the end.
        reserved = Storage(session.quota, op.reserve)
    except OutOfDeviceMemory as full:
        failure = session.failed(number, op.name, full)
        for slot in outs:  # nothing was written to
            slot.poison(failure)
        return None
    try:
        op.execute(values)
    except Failed as failed:
        failure = session.failed(number, failed.name, failed.error)
        for slot in outs:
            slot.poison(failure)
        for position in op.written_by(failed.position + 1):
            operands[position].poison(failure)
        return None
    finally:
        session.ops_executed += len(op.graph.nodes)
    parts = reserved.split([meta.nbytes for meta in op.metas])
    for slot, value, meta, part in zip(outs, op.graph.outputs, op.metas, parts, strict=True):
        slot.fill(values[value], meta, part)
    return None
