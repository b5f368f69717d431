"""``gpuremote.cupy.random``: what is drawn, from where, and how often the same."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gpuremote.backend.cupy_backend import CupyBackend
from gpuremote.errors import DTypeError, ShapeError, UnsupportedOp
from gpuremote.ops.catalogue import find
from gpuremote.ops.plan import define
from tests.backend.cupy_double import CupyDouble
from tests.ops.case import METAS, Case
from tests.session.comparing import case

Array = npt.NDArray[Any]

# Some of each distribution's parameters, in NumPy's order.
DISTRIBUTIONS: dict[str, list[tuple[Any, ...]]] = {
    "beta": [(2.0, 3.0), (0.5, 0.5)],
    "binomial": [(10, 0.3), (1000, 0.9)],
    "chisquare": [(3,), (0.7,)],
    "exponential": [(2.5,)],
    "f": [(4, 7.0)],
    "gamma": [(2.5, 1.5), (0.3, 1)],
    "geometric": [(0.3,), (1.0,)],
    "gumbel": [(1.0, 2.0)],
    "hypergeometric": [(15, 10, 8), (3, 200, 50)],
    "laplace": [(-1.0, 2.0)],
    "logistic": [(1.0, 0.5)],
    "lognormal": [(0.3, 0.7)],
    "logseries": [(0.6,)],
    "negative_binomial": [(5, 0.4), (0.7, 0.2)],
    "noncentral_chisquare": [(3, 2.0), (0.5, 6)],
    "noncentral_f": [(3, 8.0, 2.0)],
    "normal": [(1.0, 3.0), (0, 1)],
    "pareto": [(3.0,)],
    "poisson": [(4.5,), (90.0,)],
    "power": [(0.7,), (3,)],
    "rayleigh": [(1.5,)],
    "standard_cauchy": [()],
    "standard_exponential": [()],
    "standard_gamma": [(1.7,)],
    "standard_normal": [()],
    "standard_t": [(5,)],
    "triangular": [(-1.0, 0.5, 4), (0, 0, 1)],
    "uniform": [(-2.0, 5.0)],
    "vonmises": [(0.5, 2.0)],
    "wald": [(2.0, 3.0), (0.5, 40.0)],
    "weibull": [(1.5,)],
    "zipf": [(2.5,)],
    "random": [()],
    "integers": [(-3, 9), (5,)],
}
WHOLE = {
    "binomial",
    "geometric",
    "hypergeometric",
    "logseries",
    "negative_binomial",
    "poisson",
    "zipf",
}
COUNT = 20_000


def gap(a: Array, b: Array) -> float:
    """The largest difference between the shares of two samples below any number."""
    a, b = np.sort(a.ravel()), np.sort(b.ravel())
    points = np.concatenate((a, b))
    below = (np.searchsorted(x, points, "right") / x.size for x in (a, b))
    return float(np.abs(np.subtract(*below)).max())


def known(found: Any, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """The values, of what has the shape and dtype here and on the server."""
    assert (found.shape, found.dtype) == (shape, np.dtype(dtype))
    told = found._core.wait(found._ask_meta())
    assert (tuple(told[0]), np.dtype(told[1])) == (shape, np.dtype(dtype))
    host: Array = found.get()
    return host


def test_distributions(xp: Any) -> None:
    ours, numpys = xp.random.default_rng(11), np.random.default_rng(12)
    limit = 1.9 * np.sqrt(2 / COUNT)  # one sample in 1000 is further away
    for name, cases in DISTRIBUTIONS.items():
        for parameters in cases:
            with case(name, *parameters):
                wanted = getattr(numpys, name)(*parameters, size=COUNT)
                found = getattr(ours, name)(*parameters, size=COUNT)
                assert gap(known(found, wanted.shape, wanted.dtype), wanted) < limit
                if not parameters or name == "integers":
                    continue
                # The same parameters as arrays, of which each column has its own.
                arrays = [xp.asarray([value] * 2) for value in parameters]
                found = getattr(ours, name)(*arrays, size=(COUNT // 2, 2))
                assert gap(known(found, (COUNT // 2, 2), wanted.dtype), wanted) < limit


def test_shapes_and_dtypes(xp: Any) -> None:
    rng = xp.random.default_rng(0)
    for name, cases in DISTRIBUTIONS.items():
        parameters = cases[0]
        wanted = np.asarray(getattr(np.random.default_rng(0), name)(*parameters))
        method = getattr(rng, name)
        for size, shape in (
            (None, ()),
            ((), ()),
            (3, (3,)),
            ((2, 0), (2, 0)),
            ([2, 3], (2, 3)),
            (np.int64(4), (4,)),
        ):
            with case(name, size):
                known(method(*parameters, size=size), shape, wanted.dtype)
        if parameters:
            with case(name, "arrays"):
                column = xp.asarray([[parameters[0]], [parameters[0]]])
                rows = xp.asarray([parameters[-1]] * 3)
                given = (column, *parameters[1:-1], rows) if len(parameters) > 1 else (column,)
                shape = (2, 3) if len(parameters) > 1 else (2, 1)
                known(method(*given), shape, wanted.dtype)
                known(method(*given, size=(4, *shape)), (4, *shape), wanted.dtype)
                known(method([parameters[0]] * 2, *parameters[1:]), (2,), wanted.dtype)
                known(method(xp.asarray(parameters[0]), *parameters[1:]), (), wanted.dtype)
                with pytest.raises(ShapeError, match="size"):
                    method(*given, size=(5, 7))
    for name in ("random", "standard_normal", "standard_exponential"):
        known(getattr(rng, name)(3, dtype="f4"), (3,), "f4")
        out = xp.zeros(4, "f4")
        assert getattr(rng, name)(dtype="f4", out=out) is out
        assert known(out, (4,), "f4").all()
        with pytest.raises(DTypeError, match="float16"):
            getattr(rng, name)(3, dtype="f2")
    known(rng.standard_gamma(2.0, 3, "f4"), (3,), "f4")


def test_integers(xp: Any) -> None:
    rng = xp.random.default_rng(5)
    for code in "?bBhHiIlL":
        kind = np.dtype(code)
        least, most = (0, 1) if code == "?" else (np.iinfo(kind).min, np.iinfo(kind).max)
        with case(code):
            drawn = known(rng.integers(least, most, 2000, kind, endpoint=True), (2000,), kind)
            # The whole range: each half of it about as often.
            half = least // 2 + most // 2
            assert 0.4 < np.mean(drawn > half) < 0.6
            assert known(rng.integers(1, size=3, dtype=kind), (3,), kind).max() == 0
            with pytest.raises(ValueError, match="out of bounds"):
                rng.integers(least, most + 2, 3, kind)
            with pytest.raises(ValueError, match="above"):
                rng.integers(1, 1, 3, kind)
    low, high = xp.asarray([0, -5, 100]), xp.asarray([[3], [200]])
    drawn = known(rng.integers(low, high[1], (500, 3)), (500, 3), "i8")
    assert (drawn.min(0) >= [0, -5, 100]).all()
    assert (drawn.max(0) < 200).all()
    assert known(rng.integers(7, xp.asarray(8)), (), "i8") == 7
    with pytest.raises(TypeError, match="integer"):
        rng.integers(0.5, 2)
    with pytest.raises(DTypeError, match="float64"):
        rng.integers(2, dtype=float)
    assert len(rng.bytes(9)) == 9


def test_several_at_once(xp: Any) -> None:
    rng, numpys = xp.random.default_rng(3), np.random.default_rng(4)
    limit = 1.9 * np.sqrt(2 / COUNT)
    for alpha in ([1.0, 2.0, 0.5], [1e-3, 1e-3], [30.0]):
        found = known(rng.dirichlet(alpha, COUNT), (COUNT, len(alpha)), "f8")
        wanted: Array = numpys.dirichlet(alpha, COUNT)
        np.testing.assert_allclose(found.sum(-1), 1)
        for k in range(len(alpha)):
            assert gap(found[:, k].round(9), wanted[:, k].round(9)) < limit
    chances = [0.2, 0.0, 0.5, 0.3]
    found = known(rng.multinomial(20, chances, COUNT), (COUNT, 4), "i8")
    wanted = numpys.multinomial(20, chances, COUNT)
    assert (found.sum(-1) == 20).all()
    for k in range(4):
        assert gap(found[:, k], wanted[:, k]) < limit
    many = rng.multinomial(xp.asarray([[5], [7]]), xp.asarray([chances, [0.25] * 4, [0, 0, 0, 1]]))
    assert (known(many, (2, 3, 4), "i8").sum(-1) == [[5] * 3, [7] * 3]).all()
    assert known(rng.multinomial(3, [1.0]), (1,), "i8").tolist() == [3]
    mean, cov = [1.0, -2.0], [[2.0, 1.2], [1.2, 1.0]]
    for method in ("svd", "eigh", "cholesky"):
        drawn = rng.multivariate_normal(mean, cov, COUNT, "raise", method=method)
        host = known(drawn, (COUNT, 2), "f8")
        np.testing.assert_allclose(host.mean(0), mean, atol=0.05)
        np.testing.assert_allclose(np.cov(host.T), cov, atol=0.1)
    known(rng.multivariate_normal(mean, cov), (2,), "f8")
    known(rng.multivariate_normal(mean, [[1, 1], [1, 1]], (3, 2)), (3, 2, 2), "f8")
    with pytest.raises(ValueError, match="semidefinite"):
        rng.multivariate_normal(mean, [[1, 2], [2, 1]], check_valid="raise")
    with pytest.warns(RuntimeWarning, match="semidefinite"):
        rng.multivariate_normal(mean, [[1, 2], [2, 1]], check_valid="warn")


def test_order(xp: Any) -> None:
    rng = xp.random.default_rng(8)
    assert sorted(known(rng.permutation(50), (50,), "i8")) == list(range(50))
    host = np.arange(24).reshape(4, 6)
    x = xp.asarray(host)
    for axis in (0, 1, -1):
        moved = known(rng.permutation(x, axis), (4, 6), "i8")
        assert (np.sort(moved, axis) == host).all()
        y = x.copy()
        rng.shuffle(y, axis)
        assert (np.sort(y.get(), axis) == host).all()
        alone = known(rng.permuted(x, axis), (4, 6), "i8")
        assert (np.sort(alone, axis) == host).all()
        assert alone.tolist() != moved.tolist()
    assert (np.sort(known(rng.permuted(x), (4, 6), "i8"), None) == host.ravel()).all()
    out = xp.zeros((4, 6), int)
    assert rng.permuted(x, 0, out=out) is out
    assert (np.sort(out.get(), 0) == host).all()
    # Each order as often as any other.
    orders = {tuple(rng.permutation(3).tolist()) for _ in range(60)}
    assert len(orders) == 6
    with pytest.raises(TypeError, match="list"):
        rng.shuffle([1, 2])


def test_choice(xp: Any) -> None:
    rng = xp.random.default_rng(9)
    host = np.arange(10.0, 40.0).reshape(3, 10)
    x, p = xp.asarray(host), [0.1, 0.0, 0.6, 0.3]
    assert set(known(rng.choice(5, 300), (300,), "i8")) == set(range(5))
    assert known(rng.choice(1), (), "i8") == 0
    assert set(known(rng.choice([7, 9], 50), (50,), "i8")) == {7, 9}
    known(rng.choice(x), (10,), "f8")
    assert np.isin(known(rng.choice(x, (2, 4), axis=1), (3, 2, 4), "f8"), host).all()
    for chances in (p, xp.asarray(p), xp.asarray(p) * 3):
        drawn = known(rng.choice(4, COUNT, p=chances), (COUNT,), "i8")
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / COUNT, p, atol=0.02)
    assert sorted(known(rng.choice(6, (2, 3), replace=False), (2, 3), "i8").ravel()) == [*range(6)]
    firsts = [0] * 4
    for _ in range(200):
        drawn = known(rng.choice(4, 3, replace=False, p=p), (3,), "i8")
        assert sorted(drawn) == [0, 2, 3]
        firsts[drawn[0]] += 1
    np.testing.assert_allclose(np.array(firsts) / 200, p, atol=0.1)
    known(rng.choice(0, 0), (0,), "i8")
    for arguments, text in (
        ((0, 1), "nothing"),
        ((3, 4, False), "4 out of 3"),
        ((4, 4, False, p), "fewer than 4"),
        ((4, 1, True, [0.5, 0.1, 0.1, 0.1]), "make 1"),
        ((4, 1, True, [1.5, -0.5, 0, 0]), "make 1"),
        ((3, 1, True, [0.5, 0.5]), "shape"),
    ):
        with pytest.raises(ValueError, match=text):
            rng.choice(*arguments)


def test_seeds(xp: Any) -> None:
    random = xp.random

    def drawn(rng: Any) -> list[float]:
        return [*rng.random(3).tolist(), *rng.normal(size=2).tolist(), rng.poisson(50).item()]

    first = drawn(random.default_rng(42))
    assert drawn(random.default_rng(42)) == first
    assert drawn(random.default_rng(np.random.SeedSequence(42))) == first
    assert drawn(random.Generator(random.XORWOW(42))) == first
    rest = [random.default_rng(seed) for seed in (43, None, None, [42, 1])]
    rest += random.default_rng(42).spawn(3)
    assert len({tuple(drawn(rng)) for rng in rest} | {tuple(first)}) == len(rest) + 1
    rng = random.default_rng(1)
    assert random.default_rng(rng) is rng
    drawn(rng)
    for again in (copy.deepcopy(rng), pickle.loads(pickle.dumps(rng))):
        state = rng.bit_generator.state
        assert drawn(again) == drawn(rng)
        rng.bit_generator.state = state
    # Draws of one generator, and of neighbours, have nothing to do with each other.
    samples = [random.default_rng(seed).random(4000).get() for seed in range(6)]
    samples += [rng.random(4000).get() for _ in range(6)]
    for a, b in itertools.combinations(samples, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.07


def test_every_draw_has_a_seed_of_its_own(xp: Any) -> None:
    bits = [xp.random.BitGenerator(seed) for seed in range(4)]
    seeds = [source.next_seed() for source in bits for _ in range(5000)]
    assert len(set(seeds)) == len(seeds)
    assert -(1 << 63) <= min(seeds) < -(1 << 62)
    assert 1 << 62 < max(seeds) < 1 << 63
    for bit in range(64):
        assert 0.47 < np.mean([seed >> bit & 1 for seed in seeds]) < 0.53
    shared, taken = xp.random.BitGenerator(0), [[], []]  # type: ignore[var-annotated]

    def take(into: list[int]) -> None:
        into.extend(shared.next_seed() for _ in range(3000))

    threads = [threading.Thread(target=take, args=(into,)) for into in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*taken[0], *taken[1]}) == 6000


def test_nothing_is_waited_for(xp: Any) -> None:
    rng = xp.random.default_rng(0)
    x, p = xp.ones((5, 2)), xp.asarray([0.25] * 4)
    before = xp.session().stats().round_trips
    for name, cases in DISTRIBUTIONS.items():
        for parameters in cases:
            getattr(rng, name)(*parameters, size=(3, 2))
            arrays = [xp.full(2, value) for value in parameters]
            getattr(rng, name)(*arrays)
    rng.permutation(x)
    rng.permuted(x, 0)
    rng.shuffle(x)
    rng.choice(x, 3, p=None)
    rng.choice(4, 3, replace=False, p=p)
    rng.multinomial(5, p, 3)
    rng.dirichlet(p)
    rng.multivariate_normal(p, xp.eye(4))
    xp.random.seed(3)
    xp.random.rand(3)
    assert xp.session().stats().round_trips == before
    xp.session().synchronize()


def test_where_numbers_are_drawn(xp: Any) -> None:
    there = xp.session().devices[1]
    rng = xp.random.default_rng(0)
    with xp.using(there):
        assert rng.random(2).device is there
        scale, p = xp.ones(2), xp.asarray([0.5, 0.5])
    for found in (
        rng.normal(0, scale),
        rng.gamma(2, scale),
        rng.wald(2, scale),
        rng.standard_t(scale),
        rng.triangular(-1, 0, scale),
        rng.noncentral_f(2, 3, scale),
        rng.f(2, scale),
        rng.negative_binomial(3, p),
        rng.dirichlet(scale),
        rng.multinomial(3, p, 2),
        rng.choice(2, 3, p=p),
        rng.choice(scale, 3),
        rng.permutation(scale),
        rng.permuted(scale),
        rng.integers(0, p.astype(int) + 1),
    ):
        assert found.device is there
    xp.session().synchronize()
    assert rng.random(2).device is xp.session().devices[0]


def test_parameters_that_make_no_sense(xp: Any) -> None:
    rng = xp.random.default_rng(0)
    for name, *parameters in (
        ("normal", 0, -1),
        ("gamma", -1),
        ("gamma", 1, -1),
        ("beta", 0, 1),
        ("binomial", -1, 0.5),
        ("binomial", 1, 1.5),
        ("geometric", 0),
        ("hypergeometric", 3, 4, 8),
        ("logseries", 1),
        ("poisson", -1),
        ("zipf", 1),
        ("uniform", 2, 1),
        ("chisquare", 0),
        ("f", 1, 0),
        ("f", 0, 1),
        ("pareto", 0),
        ("power", -1),
        ("weibull", -1),
        ("wald", 0, 1),
        ("triangular", 1, 0, 2),
        ("triangular", 1, 1, 1),
        ("negative_binomial", 1, 0),
        ("multinomial", 3, [0.9, 0.9, 0.1]),
        ("vonmises", 0, -1),
        ("laplace", 0, -1),
        ("standard_t", 0),
    ):
        with (
            case(name, *parameters),
            pytest.raises(ValueError, match=r"has|have|no numbers|out of"),
        ):
            getattr(rng, name)(*parameters)
    with pytest.raises(DTypeError, match="complex128"):
        rng.normal(1j)
    with pytest.raises(OverflowError):
        rng.uniform(0, np.inf)
    with pytest.raises(DTypeError, match="integer"):
        rng.binomial(2.5, 0.5)
    with pytest.raises(TypeError, match="host array"):
        rng.poisson(np.ones(3))
    with pytest.raises(Exception, match="lam"):  # a NumPy server looks at arrays
        rng.poisson(-xp.ones(3)).get()


def test_functions_that_share_a_state(xp: Any) -> None:
    random = xp.random
    random.seed(7)
    first = [random.rand(2).tolist(), random.randint(100, size=4).tolist()]
    random.seed(7)
    assert [random.rand(2).tolist(), random.randint(100, size=4).tolist()] == first
    state = random.RandomState(7)
    random.set_random_state(state)
    assert random.get_random_state() is state
    assert random.rand(2).tolist() == first[0]
    random.reset_states()
    assert random.get_random_state() is not state
    assert random.rand(2).tolist() != first[0]
    for name, cases in DISTRIBUTIONS.items():
        if name == "integers":
            continue
        function = getattr(random, name)
        whole = name in WHOLE
        for parameters in cases:
            with case(name, parameters):
                known(function(*parameters, size=3), (3,), "i8" if whole else "f8")
                known(function(*parameters, (2, 3), "f4"), (2, 3), "f4")
                known(function(*parameters, size=2, dtype="f2"), (2,), "f2")
        assert [*inspect.signature(function).parameters][-2:] == ["size", "dtype"]
    known(random.rand(), (), "f8")
    known(random.randn(2, 3, dtype="f4"), (2, 3), "f4")
    assert known(random.random_integers(2, size=50), (50,), "i8").min() == 1
    assert known(random.randint(-2, 3, 99, dtype="i1"), (99,), "i1").max() == 2
    assert known(state.tomaxint(4), (4,), "i8").min() > 0
    known(random.multivariate_normal([0.0, 0.0], [[1, 0], [0, 1]], 3, dtype="f4"), (3, 2), "f4")
    known(random.multinomial(4, [0.5, 0.5], size=2), (2, 2), "i8")
    known(random.dirichlet([1, 2, 3], 2, "f4"), (2, 3), "f4")
    assert sorted(known(random.permutation(4), (4,), "i8")) == [0, 1, 2, 3]
    x = xp.arange(9)
    random.shuffle(x)
    assert sorted(x.tolist()) == list(range(9))
    known(random.choice(4, 2, False), (2,), "i8")
    assert isinstance(random.bytes(3), bytes)
    with pytest.raises(TypeError, match="no RandomState"):
        random.set_random_state(3)


def test_integers_of_a_cupy_server() -> None:
    """Which draws some counts of integers in a roundabout way."""
    double = CupyDouble()
    backend = CupyBackend(cupy=double)
    for dtype, low, high in (
        ("i1", -128, 127),
        ("u1", 0, 255),
        ("i4", -(1 << 31), (1 << 31) - 1),
        ("u4", 0, (1 << 32) - 1),
        ("u4", 5, (1 << 31) + 9),
        ("i8", -(1 << 40), 1 << 41),
        ("i8", -(1 << 62), (1 << 62) - 1),
        ("u8", (1 << 64) - 8, (1 << 64) - 1),
    ):
        with case(dtype, low, high):
            for arrays in (False, True):
                bounds = [np.full(4000, bound, dtype) if arrays else bound for bound in (low, high)]
                kinds = Case((1, *bounds)).kinds()
                params = {"method": "integers", "shape": (4000,), "dtype": dtype}
                plan = define(0, find("random_draw"), kinds, params, 0, METAS)
                run = backend.compile(plan)
                given = [double.upload(bound) if arrays else bound for bound in bounds]
                (found,) = run([-5, *given]) or ()
                drawn = found.host.astype(object)
                assert (drawn.min() >= low, drawn.max() <= high) == (True, True)
                shares = np.array((drawn - low) * 4 // (high - low + 1), int)
                np.testing.assert_allclose(np.bincount(shares) / 4000, 0.25, atol=0.04)
    wide = {"method": "integers", "shape": (2,)}
    plan = define(0, find("random_draw"), ["i", "i", "i"], wide, 0, METAS)
    with pytest.raises(UnsupportedOp, match="at most"):
        backend.compile(plan)([0, -(1 << 63), (1 << 63) - 1])
