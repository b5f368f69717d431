"""NumPy's loops called in C: the bits of the ufuncs, and nothing outside of the arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuremote._speed import NATIVE, native

pytestmark = pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")

DTYPES = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u1")
ARITHMETIC = (np.add, np.subtract, np.multiply, np.maximum, np.minimum)


def loops(steps: list[tuple[Any, ...]], places: int, dtype: str = "f8") -> Any:
    kind = np.dtype(dtype)
    return native.Loops(steps, places, kind.num, kind.itemsize)


def numbers(dtype: str, size: int, seed: int) -> npt.NDArray[Any]:
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        found = rng.standard_normal(size).astype(kind)
        found[::97], found[5::89], found[7::83] = np.nan, np.inf, -0.0
        return found
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, size, kind, endpoint=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 1000, 20_011])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bits_are_those_of_the_ufuncs(dtype: str, size: int) -> None:
    x, y = numbers(dtype, size, 1), numbers(dtype, size, 2)
    value = numbers(dtype, 1, 3).reshape(())
    for block in (1, 7, 512, 4096, 1 << 20):
        if block == 1 and size > 1000:
            continue
        for ufunc in ARITHMETIC:
            out, room = np.empty_like(x), np.empty(4096 * 256, dtype)
            # Places: two arrays, a value, a block, and the result, which is written to in turns.
            steps: list[tuple[Any, ...]]
            steps = [(ufunc, 0, 1, 3), (ufunc, 3, 2, 3), (np.negative, 3, None, 3)]
            steps += [(np.square, 3, None, 4), (ufunc, 4, 3, 4)]
            if dtype[0] == "u":
                steps[2] = (np.square, 3, None, 3)
            assert loops(steps, 5, dtype).run([x, y, value, room, out], b"mmvrm", size, block)
            wanted = ufunc(ufunc(x, y), value)
            wanted = np.square(wanted) if dtype[0] == "u" else np.negative(wanted)
            wanted = ufunc(np.square(wanted), wanted)
            np.testing.assert_array_equal(out.view("u1"), wanted.view("u1"))


def test_in_place() -> None:
    x, y = numbers("f8", 5000, 1), numbers("f8", 5000, 2)
    wanted = x + y + y
    assert loops([(np.add, 0, 1, 0), (np.add, 0, 1, 0)], 2).run([x, y], b"mm", 5000, 512)
    np.testing.assert_array_equal(x, wanted)


def test_nobody_hears_of_what_the_loops_met() -> None:
    x, out = np.zeros(10), np.empty(10)
    assert loops([(np.divide, 0, 0, 1)], 2).run([x, out], b"mm", 10, 512)
    assert np.isnan(out).all()
    with np.errstate(all="raise"):
        np.add(out, 1.0)


@pytest.mark.parametrize(
    "steps",
    [
        [(np.add, 0, None, 1)],
        [(np.negative, 0, 1, 1)],
        [(np.divmod, 0, 1, 1)],
        [(np.arctan2, 0, 1, 1)],
        [(len, 0, 1, 1)],
        [(np.frompyfunc(max, 2, 1), 0, 1, 1)],
    ],
)
def test_what_has_no_loop(steps: list[tuple[Any, ...]]) -> None:
    # Of int64: arctan2 has no loop for that.
    with pytest.raises(LookupError, match="no loop"):
        loops(steps, 2, "i8")


@pytest.mark.parametrize("step", [(np.add, 0, 1, 2), (np.add, -1, 0, 1), (np.add, 0, 9, 1)])
def test_places_are_checked(step: tuple[Any, ...]) -> None:
    with pytest.raises(IndexError, match="place"):
        loops([step], 2)
    with pytest.raises(LookupError, match="places"):
        loops([], 1 << 20)
    with pytest.raises(IndexError, match="place"):
        loops([(np.add, 0, 1 << 32, 1)], 2)
    with pytest.raises(TypeError):
        loops([step[:2]], 2)


def test_objects_are_no_numbers() -> None:
    with pytest.raises(LookupError, match="no loop"):
        native.Loops([(np.add, 0, 0, 1)], 2, np.dtype("O").num, 8)


def test_what_was_refused_does_nothing() -> None:
    made = native.Loops.__new__(native.Loops)
    with pytest.raises(LookupError, match="places"):
        made.__init__([], 5000, np.dtype("f8").num, 8)
    with pytest.raises(TypeError, match="run"):
        made.run([np.ones(10)] * 5000, b"m" * 5000, 10, 512)


def test_memory_is_checked() -> None:
    made = loops([(np.add, 0, 1, 2)], 3)
    x, short = np.ones(100), np.ones(99)
    for arrays, kinds in (
        ([short, x, x], b"mmm"),
        ([x, x, short], b"mmm"),
        ([x, np.ones(0), x], b"mvm"),
        ([x, x, short], b"mmr"),
        ([x, x, x], b"mmv"),
        ([x, x, x], b"mm?"),
    ):
        with pytest.raises(ValueError, match="memory"):
            made.run(arrays, kinds, 100, 512)
    fixed = np.ones(100)
    fixed.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        made.run([x, x, fixed], b"mmm", 100, 512)
    for arguments in (
        ([x, x], b"mmm", 100, 1),
        ([x, x, x], b"mm", 100, 1),
        ([x, x, x], b"mmm", -1, 1),
        ([x, x, x], b"mmm", 100, 0),
        ([x, x, x], b"mmm", 100),
    ):
        with pytest.raises(TypeError, match="run"):
            made.run(*arguments)
    with pytest.raises(TypeError):
        made.run([x, x, "text"], b"mmm", 100, 512)
    assert (x == 1).all()
    assert (short == 1).all()


def test_what_does_not_lie_right_is_left_alone() -> None:
    memory = np.zeros(8 * 101, np.uint8)
    odd = memory[1 : 1 + 800].view("f8")
    out = np.empty(100)
    assert loops([(np.negative, 0, None, 1)], 2).run([odd, out], b"mm", 100, 512) is False
