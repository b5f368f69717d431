"""One entry of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gpuremote._types import Shape
from gpuremote.ops.operands import DType, Operand

__all__ = ["VARIES", "Infer", "Inferred", "OpSpec", "Params", "table"]

Params: TypeAlias = Mapping[str, Any]
Inferred: TypeAlias = tuple[tuple[Shape, DType], ...]
Infer: TypeAlias = Callable[[Sequence[Operand], Params], Inferred]

VARIES = -1
"""``OpSpec.n_out`` of an op whose number of results depends on its operands."""


@dataclass(frozen=True, slots=True, eq=False)
class OpSpec:
    """What may be done to arrays, and what is known of the result beforehand.

    Compared and hashed by identity.

    Attributes
    ----------
    name : str
        What travels.
    infer : callable
        ``infer(operands, params)`` gives shape and dtype of each result. Never looks at values
        and never takes longer for bigger arrays. For ``data_dependent`` ops, and for ``indexed``
        ones whose index has integers, the shapes are upper bounds. Raises an OpError.
    n_out : int
        Number of results, or ``VARIES``.
    params : frozenset of str
        Names of the parameters it takes.
    view : bool
        A result may share memory with operand 0.
    inplace : bool
        Writes operands and has no result.
    writes : callable or None
        ``writes(operands, params)`` gives the positions of those that an op in place writes to.
        None: it is operand 0.
    data_dependent : bool
        The shape of the result depends on values, so the client asks the server for it.
    indexed : bool
        ``params["index"]`` is an index template, whose integers are operands.
    path : str
        Where the function that does it is in a namespace like NumPy's (``"linalg.eig"``). Empty:
        ``backend.kernels`` knows how.
    names : tuple of str
        Keywords of the last operands, for a function that can be called without them; which of
        them are there is in ``params["given"]``.
    """

    name: str
    infer: Infer
    n_out: int = 1
    params: frozenset[str] = frozenset()
    view: bool = False
    inplace: bool = False
    writes: Callable[[Sequence[Operand], Params], tuple[int, ...]] | None = None
    data_dependent: bool = False
    indexed: bool = False
    path: str = ""
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"OpSpec({self.name!r})"


def table(specs: Iterable[OpSpec]) -> dict[str, OpSpec]:
    """Specs by name; two of one name are a mistake in the catalogue."""
    found: dict[str, OpSpec] = {}
    for spec in specs:
        if spec.name in found:
            raise ValueError(f"two ops named {spec.name}")
        found[spec.name] = spec
    return found
