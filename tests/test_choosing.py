"""Which of several ways is the fastest is told from how long they take, as conditions change."""

from __future__ import annotations

import ctypes
import random
from collections import Counter

import pytest

from gpuremote._speed import NATIVE, native

pytestmark = pytest.mark.skipif(native is None, reason=f"_native: {NATIVE}")


class Choice(ctypes.Structure):
    """What the caller fills in; behind it lies what native/choosing.c keeps."""

    _fields_ = (
        ("run", ctypes.c_int),
        ("ways", ctypes.c_uint),
        ("warms", ctypes.c_int),
        ("best", ctypes.c_int),
        ("kept", ctypes.c_char * 1024),
    )

    def __init__(self, run: int, ways: int, warms: int) -> None:
        super().__init__(run, ways, warms, next(way for way in range(8) if ways >> way & 1))
        library = ctypes.CDLL(native.__file__)
        self.choose, self.note = library.choosing_way, library.choosing_learn
        self.note.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_double]

    def way(self) -> int:
        return int(self.choose(ctypes.byref(self)))

    def learn(self, way: int, rate: float) -> None:
        self.note(ctypes.byref(self), way, rate)


def steps(
    choice: Choice, rates: dict[int, float], count: int, noise: random.Random
) -> Counter[int]:
    """So many steps on a machine that is half as fast now and then: how often each way was gone."""
    gone: Counter[int] = Counter()
    busy = 1.0
    for _ in range(count):
        if noise.random() < 0.1 / choice.run:
            busy = noise.choice([1.0, 0.5])
        way = choice.way()
        gone[way] += 1
        choice.learn(way, rates[way] * busy * (0.3 if noise.random() < 0.05 else 1.0))
    return gone


@pytest.mark.parametrize("warms", [0, 1])
@pytest.mark.parametrize("run", [1, 2, 4, 8, 24])
@pytest.mark.parametrize("fastest", [0, 3, 7])
def test_most_steps_go_the_fastest_way(run: int, fastest: int, warms: int) -> None:
    choice, noise = Choice(run, 0b11011101, warms), random.Random(run)
    rates = {way: 20.0 + way for way in (0, 2, 3, 4, 6, 7)} | {fastest: 40.0}
    gone = steps(choice, rates, 20 * run + 20, noise)
    assert set(gone) == set(rates)
    gone = steps(choice, rates, 200 * run, noise)
    assert gone[fastest] > 0.8 * 200 * run


def test_another_one_becomes_the_fastest() -> None:
    choice, noise = Choice(4, 0b11, 0), random.Random(0)
    steps(choice, {0: 10.0, 1: 7.0}, 2000, noise)
    steps(choice, {0: 7.0, 1: 10.0}, 1000, noise)
    assert steps(choice, {0: 7.0, 1: 10.0}, 1000, noise)[1] > 850


@pytest.mark.parametrize(("run", "ways"), [(24, 0b1111), (4, 0b11011101), (1, 0b11011101)])
def test_one_that_was_far_behind_is_found(run: int, ways: int) -> None:
    there = [way for way in range(8) if ways >> way & 1]
    for best in there:
        for late in there:
            choice, noise = Choice(run, ways, 1), random.Random(1)
            rates = dict.fromkeys(there, 20.0) | {best: 40.0}
            steps(choice, rates, 200 * run, noise)
            found = steps(choice, rates | {late: 120.0}, 2500 * run, noise)
            assert found[late] > 1250 * run, (best, late, found)


def test_where_there_is_one_way_it_is_gone() -> None:
    choice = Choice(2, 0b10000000 >> 7, 1)
    assert steps(choice, {0: 1.0}, 1000, random.Random(0)) == {0: 1000}


def test_what_is_known_of_others_will_do_at_first() -> None:
    rates, noise = {0: 10.0, 1: 30.0, 2: 20.0}, random.Random(0)
    others, fewer = Choice(4, 0b111, 1), Choice(4, 0b11, 1)
    likes = [Choice(2, 0b111, 1) for _ in range(3)]

    def begin_like(one: Choice, another: Choice) -> None:
        ctypes.CDLL(native.__file__).choosing_begin_like(ctypes.byref(one), ctypes.byref(another))

    begin_like(likes[0], others)
    assert set(steps(likes[0], rates, 8, noise)) == {0, 1, 2}  # nothing was known
    steps(others, rates, 1000, noise)
    steps(fewer, {0: 30.0, 1: 10.0}, 1000, noise)
    begin_like(likes[1], others)
    begin_like(likes[1], fewer)
    assert steps(likes[1], rates, 4, noise) == {1: 4}
    begin_like(likes[1], others)  # no longer: by now it has learnt itself
    assert steps(likes[1], rates | {1: 5.0}, 400, noise)[2] > 200
    begin_like(likes[2], fewer)
    assert set(steps(likes[2], rates, 8, noise)) == {0, 1, 2}


def test_steps_of_two_threads_that_overlap() -> None:
    choice, rates = Choice(4, 0b111, 1), {0: 10.0, 1: 30.0, 2: 20.0}
    under_way = choice.way()
    gone: Counter[int] = Counter()
    for _ in range(4000):
        way = choice.way()
        gone[way] += 1
        choice.learn(under_way, rates[under_way])
        under_way = way
    assert gone[1] > 3200
