"""``gpuremote.cupy.fft`` against ``numpy.fft``."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuremote.errors import DTypeError, ShapeError
from tests.arrays.matching import Same

Array = npt.NDArray[Any]

DTYPES = ["?", "i2", "u8", "f2", "f4", "f8", "c8", "c16"]
ALONG = ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"]
SEVERAL = ["fftn", "ifftn", "rfftn", "irfftn"]
PLANES = ["fft2", "ifft2", "rfft2", "irfft2"]


@pytest.fixture
def same(xp: Any) -> Same:
    return Same(xp, xp.fft, np.fft)


def values(shape: tuple[int, ...], dtype: str) -> Array:
    chance = np.random.default_rng([len(shape), *shape])
    found: Any = np.asarray(chance.normal(size=shape) * 3)
    if dtype[0] == "c":
        found = found + 1j * chance.normal(size=shape)
    return np.asarray(abs(found) if dtype[0] == "u" else found).astype(dtype)


def test_along_an_axis(same: Same) -> None:
    for name, dtype in itertools.product(ALONG, DTYPES):
        for shape, n in itertools.product(((5,), (1,), (3, 4), (0,), ()), (None, 1, 4, 7, 0, -1)):
            if name not in ("irfft", "hfft") or shape != (0,):
                same(name, values(shape, dtype), n)
        if dtype not in ("f4", "c16"):
            continue
        x = values((3, 4, 2), dtype)
        for axis, norm in itertools.product(
            (0, 1, -1, -3, 3), (None, "backward", "ortho", "forward", "no")
        ):
            same(name, x, None, axis, norm)
            same(name, x, n=6, axis=axis, norm=norm)
    assert same.refused


def test_along_several_axes(same: Same) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"axes": (0, 1)},
        {"axes": (-1, 0)},
        {"axes": (1,)},
        {"axes": (1, 1)},
        {"axes": (0, 2, 0)},
        {"axes": (0, 5)},
        {"s": (2, 6), "axes": (0, -1)},
        {"s": (2, 6), "axes": (1, 1)},
        {"s": (-1, 3), "axes": (0, 1)},
        {"s": (4, -1), "axes": (0, 1)},
        {"s": (4, 3), "axes": (1,)},
        {"s": (0, 3), "axes": (0, 1)},
        {"s": (5, 2)},
        {"s": (5, 2, 4), "norm": "ortho"},
        {"axes": (2, 0), "norm": "forward"},
        {"norm": "no"},
    ]
    for name, dtype in itertools.product(SEVERAL, DTYPES):
        for keywords in cases if dtype in ("f8", "c8") else cases[:3]:
            same(name, values((3, 4, 2), dtype), **keywords)
    for name, dtype in itertools.product(PLANES, ("f4", "c16", "i4")):
        for keywords in ({}, {"s": (2, 6)}, {"axes": (0, 1)}, {"norm": "ortho"}, {"axes": (0, 0)}):
            same(name, values((3, 4, 2), dtype), **keywords)
        same(name, values((3,), dtype))
    for name in SEVERAL:
        same(name, values((), "c8"))
        same(name, values((3, 4), "f8"), axes=())
        same(name, values((0, 3), "f8"))
        same(name, values((0, 3), "f8"), (2, 2), (0, 1))


def test_frequencies(xp: Any, same: Same) -> None:
    for name, n, d in itertools.product(
        ("fftfreq", "rfftfreq"), (1, 2, 5, 8), (1.0, 2, np.float32(0.3), 1e-3)
    ):
        same(name, n, d)
        found = getattr(xp.fft, name)(n, d=d, dtype=xp.float32)
        same.compare(found, getattr(np.fft, name)(n, d).astype("f4"))
    there = xp.session().devices[1]
    assert xp.fft.fftfreq(4, device=there).device is there
    for name in ("fftshift", "ifftshift"):
        for shape in ((5,), (4,), (3, 4), (0, 2)):
            x = values(shape, "f4")
            same(name, x)
            for axes in range(-x.ndim, x.ndim):
                same(name, x, axes)
        same(name, values((3, 4, 5), "c8"), axes=(0, -1))
        same(name, values((3, 4), "c8"), axes=(2,))
    with pytest.raises(DTypeError, match="int32"):
        xp.fft.fftfreq(4, dtype=xp.int32)
    with pytest.raises(TypeError):
        xp.fft.fftfreq(4.5)


def test_out(xp: Any, same: Same) -> None:
    host = values((3, 4), "c16")
    out = xp.zeros((3, 4), "c16")
    assert xp.fft.fft(xp.asarray(host), out=out) is out
    same.compare(out, np.fft.fft(host))
    assert xp.fft.ifftn(xp.asarray(host), out=out) is out
    same.compare(out, np.fft.ifftn(host))
    assert xp.fft.fftn(xp.asarray(host), axes=(0, 0), out=out) is out
    same.compare(out, np.fft.fftn(host, axes=(0, 0)))
    assert xp.fft.fftn(xp.asarray(host), axes=(), out=out) is out
    same.compare(out, host)
    with pytest.raises(ShapeError, match="out of shape"):
        xp.fft.fft(xp.asarray(host), 3, out=out)


def test_what_is_refused_and_what_waits(xp: Any) -> None:
    x = xp.ones((3, 4))
    before = xp.session().stats().round_trips
    spectrum = xp.fft.rfftn(x, axes=(0, 1))
    xp.fft.irfftn(spectrum, s=x.shape)
    xp.fft.fftshift(xp.fft.fftfreq(9))
    assert xp.session().stats().round_trips == before
    with pytest.raises(DTypeError, match="complex64"):
        xp.fft.rfft(xp.ones(3, "c8"))
    with pytest.raises(ShapeError, match="0 points"):
        xp.fft.irfft(xp.ones(1))
    for name in ("irfft", "hfft", "irfftn"):  # where NumPy gives what it finds in memory
        with pytest.raises(ShapeError, match="no elements"):
            getattr(xp.fft, name)(xp.ones((2, 0), "c8"), 1 if name != "irfftn" else (1, 1))
    with pytest.raises(ShapeError, match="norm"):
        xp.fft.fft(x, norm="other")
    with pytest.raises(TypeError, match="host array"):
        xp.fft.fft(np.ones(3))
    for name in [*ALONG, *SEVERAL]:
        parameters = inspect.signature(getattr(xp.fft, name)).parameters
        assert {"norm", *(("n", "axis") if name in ALONG else ("s", "axes"))} <= parameters.keys()
