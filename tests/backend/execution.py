"""Runs an op's cases on a backend, all the way of a call, and compares with plain NumPy."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from gpuremote.backend.base import Backend
from gpuremote.errors import GpuRemoteError, OpError
from gpuremote.ops.catalogue import find
from gpuremote.ops.operands import scalar_operand
from gpuremote.ops.plan import Plan, decode_definition, define, encode_definition
from tests.ops.case import METAS, Array, Case
from tests.ops.cases import CASES
from tests.ops.references import reference, results

RANDOM = {"random_uniform", "random_normal", "random_draw", "empty"}
NUMPY_ERRORS = (TypeError, ValueError, IndexError, OverflowError, ArithmeticError)


def planned(name: str, case: Case) -> Plan | None:
    """The plan as the server has it; None for a case that inference refuses."""
    try:
        plan = define(1, find(name), case.kinds(), case.params, 0, METAS)
    except OpError:
        return None
    return decode_definition(msgpack.unpackb(msgpack.packb(encode_definition(plan))), METAS)


def arguments(plan: Plan, case: Case, upload: Callable[[Array], Any]) -> list[Any]:
    """Operands as a worker has them after unpacking a call."""
    arrays: dict[int, Any] = {}
    packed: list[Any] = []
    for number, operand in enumerate(case.operands):
        if isinstance(operand, np.ndarray):
            arrays[number] = upload(operand.copy())
            packed.append(number)
        else:
            packed.extend(scalar_operand(operand)[1])
    fields = plan.layout.unpack(plan.layout.pack(plan.id, *packed))
    return plan.arguments(fields, arrays.__getitem__)


def check(
    name: str,
    backend: Backend,
    upload: Callable[[Array], Any],
    download: Callable[[Any], Array],
    *,
    same_values: bool = True,
    every: int = 1,
) -> None:
    """Run the cases of an op: all of them, or one of so many."""
    run = 0
    for case in itertools.islice(CASES[name](), 0, None, every):
        plan = planned(name, case)
        if plan is None:
            continue
        operands = arguments(plan, case, upload)
        function = backend.compile(plan)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = results(reference(name, case))
            except NUMPY_ERRORS as reason:
                refused(backend, function, operands, reason)
                continue
            found = function(operands)
        run += 1
        compare(name, plan, case, operands, found, expected, backend, download, same_values)
    assert run >= 3


def refused(backend: Backend, function: Any, operands: list[Any], reason: Exception) -> None:
    """NumPy refuses these values: the backend does too, or gives what it gives."""
    error: Exception | None = None
    try:
        function(operands)
    except NUMPY_ERRORS as raised:
        error = raised
    if error is not None:
        assert isinstance(backend.translate_error(error), GpuRemoteError)
        assert isinstance(error, type(reason)) or isinstance(reason, type(error)), error


def compare(
    name: str,
    plan: Plan,
    case: Case,
    operands: list[Any],
    found: Any,
    expected: list[Array],
    backend: Backend,
    download: Callable[[Any], Array],
    same_values: bool,
) -> None:
    if plan.spec.inplace:
        assert found is None
        found = (operands[0],)
    elif plan.outputs is not None:
        for result, meta in zip(found, plan.outputs, strict=True):
            assert backend.meta(result) == (meta.shape, meta.dtype), case
    assert isinstance(found, tuple)
    for result, wanted in zip(found, expected, strict=True):
        host = download(result)
        assert isinstance(host, np.ndarray)
        assert (host.shape, host.dtype) == (wanted.shape, wanted.dtype), case
        assert result.dtype == host.dtype
        if name not in RANDOM and same_values:
            close(host, wanted, case)
        if not plan.spec.inplace:
            storages(plan, operands, result, backend, case)


def close(found: Array, wanted: Array, case: Case) -> None:
    if wanted.dtype.kind not in "fc":
        np.testing.assert_array_equal(found, wanted, err_msg=str(case))
        return
    tolerance = {2: 1e-2, 4: 1e-4, 8: 1e-8}[wanted.real.dtype.itemsize]
    np.testing.assert_allclose(
        found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True, err_msg=str(case)
    )


def storages(plan: Plan, operands: list[Any], result: Any, backend: Backend, case: Case) -> None:
    """A result lies in memory of its own, except views, and those in operand 0's only."""
    root = backend.storage_of(result)
    assert root is backend.storage_of(result)
    for position, operand in enumerate(operands):
        if hasattr(operand, "shape") and operand.shape and not np.isscalar(operand):
            shared = backend.storage_of(operand) is root
            assert not shared or (plan.spec.view and position == 0), case
