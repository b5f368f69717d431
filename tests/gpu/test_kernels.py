"""Kernels that a program brings, compiled and run by a server with CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pytest

import gpuremote.cupy
from gpuremote.errors import OpError
from gpuremote.testing.servers import device_server
from tests.gpu.machine import no_cupy

pytestmark = [
    pytest.mark.skipif(bool(no_cupy()), reason=no_cupy() or "-"),
    pytest.mark.timeout(120),
]

SAXPY: Final = r"""
extern "C" __global__
void saxpy(const float* x, float* y, float a, long long n) {
    long long i = blockDim.x * (long long)blockIdx.x + threadIdx.x;
    if (i < n) y[i] += a * x[i] + OFFSET;
}
extern "C" __global__
void reversed(const double* x, double* y) {
    extern __shared__ double kept[];
    kept[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def cp() -> Iterator[Any]:
    options = ("--backend", "cupy", "--warm", "1", "--allow-kernels")
    with device_server(*options) as server:
        gpuremote.cupy.use(f"{server.url}?connect_timeout=60")
        yield gpuremote.cupy
        gpuremote.cupy.close()


def test_raw_kernels(cp: Any) -> None:
    x, y = np.arange(1000, dtype="f4"), np.ones(1000, "f4")
    module = cp.RawModule(code=SAXPY, options=("-DOFFSET=1",))
    there = cp.asarray(y)
    trips = cp.session().stats().round_trips.total()
    kernel = module.get_function("saxpy")
    for _ in range(3):  # each sees what the one before wrote
        kernel((4,), (256,), (cp.asarray(x), there, np.float32(2), 1000))
    assert cp.session().stats().round_trips.total() == trips
    np.testing.assert_array_equal(there.get(), y + 3 * (2 * x + 1))
    ordered, turned = cp.arange(64.0), cp.zeros(64)
    module.get_function("reversed")(1, 64, (ordered, turned), shared_mem=512)
    assert turned.tolist() == list(range(63, -1, -1))


def test_elementwise_kernels(cp: Any) -> None:
    x, y = np.random.default_rng(0).random((2, 30, 40), "f4")
    kernel = cp.ElementwiseKernel(
        "T x, T y, float64 scale", "T sum, bool less", "sum = x + scale * y; less = x < y", "two"
    )
    total, less = kernel(cp.asarray(x), cp.asarray(y[0]), 3)
    np.testing.assert_allclose(total.get(), x + 3 * y[0], rtol=1e-6)
    np.testing.assert_array_equal(less.get(), x < y[0])
    out = cp.zeros(5, "i4")
    count = cp.ElementwiseKernel("int64 x", "raw int32 n", "atomicAdd(&n[x % 5], 1)", "count")
    count(cp.arange(12), out)
    assert out.tolist() == [3, 3, 2, 2, 2]
    shifted = cp.ElementwiseKernel("raw T x", "T y", "y = x[(i + 1) % _ind.size()]", "shifted")
    assert shifted(cp.arange(4.0), size=4).tolist() == [1, 2, 3, 0]


def test_reduction_kernels(cp: Any) -> None:
    x = np.random.default_rng(1).random((20, 30))
    norm = cp.ReductionKernel("T x", "T y", "x * x", "a + b", "y = sqrt(a)", "0", "norm_of")
    np.testing.assert_allclose(norm(cp.asarray(x)).item(), np.linalg.norm(x))
    np.testing.assert_allclose(norm(cp.asarray(x), axis=1).get(), np.linalg.norm(x, axis=1))
    out = cp.zeros((1, 30))
    assert norm(cp.asarray(x), axis=0, keepdims=True, out=out) is out
    np.testing.assert_allclose(out.get(), np.linalg.norm(x, axis=0, keepdims=True))


def test_views_and_streams(cp: Any) -> None:
    kernel = cp.ElementwiseKernel("T x", "T y", "y = 2 * x", "double_it")
    x = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(kernel(cp.asarray(x).T[1:]).get(), 2 * x.T[1:])
    target = cp.zeros((3, 4))
    stream = cp.cuda.Stream()
    with stream:
        kernel(cp.asarray(x)[:, ::2], target[:, ::2])
    stream.synchronize()  # nothing else tells another stream of what is written in place
    np.testing.assert_array_equal(target[:, ::2].get(), 2 * x[:, ::2])


def test_code_that_does_not_compile(cp: Any) -> None:
    y, other = cp.ones(4), cp.ones(4)
    cp.RawKernel('extern "C" __global__ void f(double* y) { y[0] = nonsense; }', "f")(1, 1, (y,))
    with pytest.raises(OpError, match="nonsense"):
        y.get()
    cp.RawKernel('extern "C" __global__ void f(double* y) {}', "g")(1, 1, (other,))
    with pytest.raises(OpError, match="raw_kernel"):
        other.get()
    assert cp.ones(2).tolist() == [1, 1]  # the session goes on
