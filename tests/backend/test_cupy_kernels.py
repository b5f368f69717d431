"""Kernels that programs bring, over doubles of CuPy's three kernel classes: what they are made
with and what they are given. What a real compiler makes of them: tests/gpu/test_kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuremote.backend.cupy_backend import CupyBackend
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.errors import ConfigError, OpFailed, ShapeError, UnsupportedOp
from gpuremote.ops.catalogue import find
from gpuremote.ops.client_kernels import LAUNCH, CodeBook
from gpuremote.ops.plan import Plan, define, encode_definition
from gpuremote.server.execute import Executable
from tests.backend.cupy_double import CupyDouble
from tests.ops.case import METAS

Told = list[tuple[Any, ...]]


class Kernels(CupyDouble):
    """CuPy with kernels that note what they are told, and double what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Told = []
        self.called: Told = []

    def _kernel(self, *made: Any, **options: Any) -> Any:
        self.made.append((made, options))

        def call(*arguments: Any, **given: Any) -> Any:
            self.called.append((arguments, given))
            return self.multiply(arguments[0], 2)

        return call

    RawKernel = ElementwiseKernel = ReductionKernel = _kernel


@pytest.fixture
def cupy() -> Kernels:
    return Kernels()


@pytest.fixture
def backend(cupy: Kernels) -> CupyBackend:
    backend = CupyBackend(cupy=cupy)
    backend.permit({}, "", True)
    return backend


def planned(op: str, count: int = 1, **params: Any) -> Plan:
    operands: list[Any] = [METAS.get((4,), np.dtype("f4"), 0)] * count
    launch = ["i"] * LAUNCH if op == "raw_kernel" else []
    return define(3, find(op), [*operands, *launch], params, 0, METAS)


RAW: dict[str, Any] = {"code": "...", "name": "f"}


def test_a_raw_kernel(cupy: Kernels, backend: CupyBackend) -> None:
    run = backend.compile(planned("raw_kernel", 2, **RAW, options=("-DN=2",)))
    x, y = (cupy.upload(np.ones(4, "f4")) for _ in range(2))
    run([x, y, 4, 1, 1, 32, 1, 1, 64])
    with pytest.raises(ShapeError, match="block"):
        run([x, y, 4, 1, 1, 4096, 1, 1, 0])
    assert cupy.made == [(("...", "f", ("-DN=2",)), {})]
    assert cupy.called == [(((4, 1, 1), (32, 1, 1), (x, y)), {"shared_mem": 64})]


def test_an_elementwise_kernel(cupy: Kernels, backend: CupyBackend) -> None:
    text: dict[str, Any] = {
        "in_params": "T x",
        "out_params": "T y",
        "operation": "y = 2 * x",
        "name": "k",
    }
    run = backend.compile(planned("elementwise_kernel", **text, preamble="//"))
    x, y = (cupy.upload(np.ones(4, "f4")) for _ in range(2))
    (made,) = run([x]) or ()
    assert made.host.tolist() == [2, 2, 2, 2]
    assert cupy.made == [(("T x", "T y", "y = 2 * x", "k"), {"preamble": "//"})]
    in_place = backend.compile(planned("elementwise_kernel_", 2, **text))
    assert in_place([x, y]) is None
    assert cupy.called == [((x,), {}), ((x, y), {})]


def test_a_reduction_kernel(cupy: Kernels, backend: CupyBackend) -> None:
    plan = planned(
        "reduction_kernel",
        in_params="T x",
        out_params="float32 y",
        map_expr="x",
        reduce_expr="a + b",
        post_map_expr="y = a",
        identity="0",
        name="total",
        reduce_type="float",
        axis=0,
        keepdims=True,
    )
    run = backend.compile(plan)
    x = cupy.upload(np.ones(4, "f4"))
    with pytest.raises(Exception, match="shape \\(4,\\) instead of \\(1,\\)"):
        run([x])  # the double does not reduce, and a result that was not foreseen is noticed
    assert cupy.made == [
        (("T x", "float32 y", "x", "a + b", "y = a", "0", "total"), {"reduce_type": "float"})
    ]
    assert cupy.called == [((x,), {"axis": 0, "keepdims": True})]


def test_only_where_the_operator_allows_them(cupy: Kernels) -> None:
    for backend in (CupyBackend(cupy=cupy), NumpyBackend()):
        with pytest.raises(UnsupportedOp, match="--backend cupy --allow-kernels"):
            backend.compile(planned("raw_kernel", **RAW))
    assert not cupy.made
    with pytest.raises(ConfigError, match="--allow-kernels is for the backend cupy, not numpy"):
        NumpyBackend().permit({}, "", True)


def test_what_cupy_refuses_is_told_by_the_calls(
    cupy: Kernels, backend: CupyBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not end the worker."""

    def refuse(*_made: Any, **_options: Any) -> Any:
        raise ValueError("invalid kernel name")

    monkeypatch.setattr(Kernels, "RawKernel", refuse)
    definition = encode_definition(planned("raw_kernel", **RAW))
    made = Executable.from_wire(definition, METAS, backend, 1, CodeBook(), Executable)
    with pytest.raises(OpFailed, match="invalid kernel name"):
        made.function([])
    assert made.writes == (0,)
