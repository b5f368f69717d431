"""Drawing from distributions: NumPy's ``Generator``, with the numbers made on a device."""

from __future__ import annotations

import builtins
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from gpuremote._types import Shape
from gpuremote.client import issue
from gpuremote.client.array import RemoteArray
from gpuremote.cupy import linalg
from gpuremote.cupy._array import integers as _integers
from gpuremote.cupy._array import ndarray, several, single, store, wire
from gpuremote.cupy._creation import array_of, full, operand
from gpuremote.cupy._elementwise import UFUNCS
from gpuremote.cupy._home import chosen, current
from gpuremote.cupy._seeds import BitGenerator
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.shapes import broadcast

__all__ = ["Generator", "default_rng"]

_Function: TypeAlias = Callable[[Any], ndarray]

_absolute: _Function = UFUNCS["absolute"]
_exp: _Function = UFUNCS["exp"]
_expm1: _Function = UFUNCS["expm1"]
_log: _Function = UFUNCS["log"]
_sqrt: _Function = UFUNCS["sqrt"]

_NUMBERS: Final = (bool, int, float, np.generic)


def _lengths(size: Any) -> Shape:
    found = _integers(size)
    return found if isinstance(found, tuple) else (found,)


def _plain(*values: Any) -> bool:
    """Whether all are numbers, whose values are known here."""
    return all(isinstance(value, _NUMBERS) for value in values)


def _parameters(values: Sequence[Any], size: Any) -> tuple[list[Any], Shape]:
    """The parameters of a distribution, and the shape of what is drawn."""
    found = [operand(value) for value in values]
    for value in found:
        if type(value) is float or type(value) is int:
            continue
        kind = getattr(value, "dtype", None) or np.result_type(type(value))
        if kind.kind not in "biuf":
            raise DTypeError(f"a parameter of a distribution has to be real, not {kind}")
    shapes = [getattr(value, "shape", ()) for value in found]
    if size is None:
        return found, broadcast(*shapes) if shapes else ()
    shape = _lengths(size)
    if any(shapes):
        try:
            fits = broadcast(shape, *shapes) == shape
        except ShapeError:
            fits = False
        if not fits:
            text = " and ".join(map(str, shapes))
            raise ShapeError(f"parameters of shape {text} for numbers of size {size}")
    return found, shape


def _positive(name: str, value: Any, more: bool = False) -> None:
    """Refuse what is below 0 (or is 0); arrays are the device's to look at."""
    if _plain(value) and (value <= 0 if more else value < 0):
        raise ValueError(f"{name} has to be {'more than 0' if more else '0 or more'}, not {value}")


def _chance(name: str, value: Any) -> None:
    if _plain(value) and not 0 <= value <= 1:
        raise ValueError(f"{name} has to be from 0 to 1, not {value}")


def _moved(x: ndarray, loc: Any, scale: Any) -> ndarray:
    if not (_plain(scale) and scale == 1):
        x = x * scale
    return x if _plain(loc) and loc == 0 else x + loc


class Generator:
    """Draws from distributions, as ``numpy.random.Generator``.

    Parameters may be numbers, or remote arrays (or lists) that broadcast with each other; results
    are always arrays. Numbers are checked when a method is called, the values of arrays on the
    device (by a NumPy server; a CuPy server does not look).

    Parameters
    ----------
    bit_generator : BitGenerator

    Notes
    -----
    Draws are made on the device that was in use when the generator was made, else on the one in
    use when they are asked for.
    """

    def __init__(self, bit_generator: BitGenerator) -> None:
        self.bit_generator = bit_generator
        self._device = chosen()

    def __reduce__(self) -> Any:
        return Generator, (self.bit_generator,)

    def __repr__(self) -> str:
        return f"Generator({type(self.bit_generator).__name__})"

    def spawn(self, n_children: int) -> list[Generator]:
        return [Generator(child) for child in self.bit_generator.spawn(n_children)]

    def _draw(
        self, method: str, shape: Shape, *parameters: Any, dtype: Any = None, beside: Any = ()
    ) -> ndarray:
        """One draw; on the device of the parameters, or of those that are ``beside`` it."""
        params: dict[str, Any] = {"method": method, "shape": shape}
        if dtype is not None:
            params["dtype"] = wire(dtype)
        seed = self.bit_generator.next_seed()
        if any(isinstance(x, RemoteArray) for x in parameters):
            return several("random_draw", (seed, *parameters), **params)[0]
        found = next((x for x in beside if isinstance(x, RemoteArray)), None)
        place: Any = (self._device or current()) if found is None else found.device
        scalars = (seed, *parameters)
        return issue.create(place._core, ndarray, "random_draw", place.index, params, scalars)

    def _standard(
        self, method: str, size: Any, *parameters: Any, dtype: Any = None, out: Any = None
    ) -> ndarray:
        if size is None and out is not None:
            size = out.shape
        given, shape = _parameters(parameters, size)
        found = self._draw(method, shape, *given, dtype=dtype, beside=() if out is None else (out,))
        return found if out is None else store(found, out)

    # -- the server's own -----------------------------------------------------------------------

    def random(
        self, size: Any = None, dtype: npt.DTypeLike = np.float64, out: Any = None
    ) -> ndarray:
        return self._standard("random", size, dtype=dtype, out=out)

    def standard_normal(
        self, size: Any = None, dtype: npt.DTypeLike = np.float64, out: Any = None
    ) -> ndarray:
        return self._standard("standard_normal", size, dtype=dtype, out=out)

    def standard_exponential(
        self,
        size: Any = None,
        dtype: npt.DTypeLike = np.float64,
        method: str = "zig",
        out: Any = None,
    ) -> ndarray:
        """By the method of the backend, whatever ``method`` says."""
        return self._standard("standard_exponential", size, dtype=dtype, out=out)

    def standard_gamma(
        self,
        shape: Any,
        size: Any = None,
        dtype: npt.DTypeLike = np.float64,
        out: Any = None,
    ) -> ndarray:
        _positive("shape", shape)
        return self._standard("standard_gamma", size, shape, dtype=dtype, out=out)

    def beta(self, a: Any, b: Any, size: Any = None) -> ndarray:
        _positive("a", a, True)
        _positive("b", b, True)
        return self._standard("beta", size, a, b)

    def vonmises(self, mu: Any, kappa: Any, size: Any = None) -> ndarray:
        _positive("kappa", kappa)
        return self._standard("vonmises", size, mu, kappa)

    def binomial(self, n: Any, p: Any, size: Any = None) -> ndarray:
        _positive("n", n)
        _chance("p", p)
        return self._standard("binomial", size, n, p)

    def geometric(self, p: Any, size: Any = None) -> ndarray:
        _chance("p", p)
        _positive("p", p, True)
        return self._standard("geometric", size, p)

    def hypergeometric(self, ngood: Any, nbad: Any, nsample: Any, size: Any = None) -> ndarray:
        for name, value in (("ngood", ngood), ("nbad", nbad), ("nsample", nsample)):
            _positive(name, value)
        if _plain(ngood, nbad, nsample) and nsample > ngood + nbad:
            raise ValueError(f"{nsample} out of {ngood} + {nbad}")
        return self._standard("hypergeometric", size, ngood, nbad, nsample)

    def logseries(self, p: Any, size: Any = None) -> ndarray:
        _chance("p", p)
        if _plain(p) and p == 1:
            raise ValueError("p has to be less than 1")
        return self._standard("logseries", size, p)

    def poisson(self, lam: Any = 1.0, size: Any = None) -> ndarray:
        _positive("lam", lam)
        return self._standard("poisson", size, lam)

    def zipf(self, a: Any, size: Any = None) -> Any:
        if _plain(a) and a <= 1:
            raise ValueError(f"a has to be more than 1, not {a}")
        return self._standard("zipf", size, a)

    def integers(
        self,
        low: Any,
        high: Any = None,
        size: Any = None,
        dtype: npt.DTypeLike = np.int64,
        endpoint: bool = False,
    ) -> Any:
        if high is None:
            low, high = 0, low
        kind = np.dtype(dtype)
        if kind.kind not in "biu":
            raise DTypeError(f"integers of {kind}")
        (low, high), shape = _parameters((low, high), size)
        if not endpoint:
            high = high - 1
        if _plain(low, high):
            low, high = operator.index(low), operator.index(high)
            least, most = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
            if low > high:
                raise ValueError(f"low {low} is above the highest number, {high}")
            if low < least or high > most:
                raise ValueError(f"numbers from {low} to {high} are out of bounds for {kind}")
        if kind.kind == "b":
            return self._draw("integers", shape, low, high, dtype="u1").astype(bool)
        return self._draw("integers", shape, low, high, dtype=kind)

    def bytes(self, length: int) -> builtins.bytes:
        """Random bytes, fetched."""
        drawn: ndarray = self.integers(0, 256, length, np.uint8)
        return drawn.tobytes()

    # -- put together from those ----------------------------------------------------------------

    def _located(self, method: str, loc: Any, scale: Any, size: Any, dtype: Any = None) -> ndarray:
        _positive("scale", scale)
        (loc, scale), shape = _parameters((loc, scale), size)
        return _moved(self._draw(method, shape, dtype=dtype, beside=(loc, scale)), loc, scale)

    def _exponentials(self, size: Any, *parameters: Any) -> tuple[Any, ...]:
        """Numbers of the standard exponential distribution, and the parameters."""
        given, shape = _parameters(parameters, size)
        return self._draw("standard_exponential", shape, beside=given), *given

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> ndarray:
        return self._located("standard_normal", loc, scale, size)

    def lognormal(self, mean: Any = 0.0, sigma: Any = 1.0, size: Any = None) -> ndarray:
        return _exp(self._located("standard_normal", mean, sigma, size))

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> ndarray:
        return self._uniform(low, high, size)

    def _uniform(self, low: Any, high: Any, size: Any, dtype: Any = None) -> ndarray:
        (low, high), shape = _parameters((low, high), size)
        span = high - low
        if _plain(span) and span < 0:
            raise ValueError(f"no numbers from {low} to {high}")
        if _plain(span) and not math.isfinite(span):
            raise OverflowError(f"from {low} to {high} is too far")
        return _moved(self._draw("random", shape, dtype=dtype, beside=(low, high)), low, span)

    def exponential(self, scale: Any = 1.0, size: Any = None) -> ndarray:
        return self._located("standard_exponential", 0, scale, size)

    def gamma(self, shape: Any, scale: Any = 1.0, size: Any = None) -> ndarray:
        _positive("shape", shape)
        _positive("scale", scale)
        (shape, scale), lengths = _parameters((shape, scale), size)
        return _moved(self._draw("standard_gamma", lengths, shape, beside=(scale,)), 0, scale)

    def chisquare(self, df: Any, size: Any = None) -> ndarray:
        _positive("df", df, True)
        (df,), shape = _parameters((df,), size)
        return self._chisquare(shape, df, None, ())

    def noncentral_chisquare(self, df: Any, nonc: Any, size: Any = None) -> ndarray:
        _positive("df", df, True)
        _positive("nonc", nonc)
        (df, nonc), shape = _parameters((df, nonc), size)
        return self._chisquare(shape, df, nonc, ())

    def _chisquare(self, shape: Shape, df: Any, nonc: Any, beside: Any) -> ndarray:
        half = df / 2
        if nonc is not None:
            half = half + self._draw("poisson", shape, nonc / 2, beside=(df, *beside))
        return self._draw("standard_gamma", shape, half, beside=beside) * 2

    def f(self, dfnum: Any, dfden: Any, size: Any = None) -> ndarray:
        _positive("dfnum", dfnum, True)
        _positive("dfden", dfden, True)
        (dfnum, dfden), shape = _parameters((dfnum, dfden), size)
        return self._ratio(shape, dfnum, dfden, None)

    def noncentral_f(self, dfnum: Any, dfden: Any, nonc: Any, size: Any = None) -> ndarray:
        _positive("dfnum", dfnum, True)
        _positive("dfden", dfden, True)
        _positive("nonc", nonc)
        (dfnum, dfden, nonc), shape = _parameters((dfnum, dfden, nonc), size)
        return self._ratio(shape, dfnum, dfden, nonc)

    def _ratio(self, shape: Shape, dfnum: Any, dfden: Any, nonc: Any) -> ndarray:
        beside = (dfnum, dfden, nonc)
        above = self._chisquare(shape, dfnum, nonc, beside) * dfden
        below = self._chisquare(shape, dfden, None, beside) * dfnum
        return single("divide", above, below)

    def standard_t(self, df: Any, size: Any = None) -> ndarray:
        _positive("df", df, True)
        (df,), shape = _parameters((df,), size)
        half = df / 2
        normal = self._draw("standard_normal", shape, beside=(df,))
        return normal * _sqrt(half / self._draw("standard_gamma", shape, half, beside=(df,)))

    def standard_cauchy(self, size: Any = None) -> ndarray:
        return self.standard_normal(size) / self.standard_normal(size)

    def laplace(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> ndarray:
        _positive("scale", scale)
        first, loc, scale = self._exponentials(size, loc, scale)
        second = self._draw("standard_exponential", first.shape, beside=(first,))
        return _moved(first - second, loc, scale)

    def logistic(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> ndarray:
        _positive("scale", scale)
        first, loc, scale = self._exponentials(size, loc, scale)
        second = self._draw("standard_exponential", first.shape, beside=(first,))
        return _moved(_log(first / second), loc, scale)

    def gumbel(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> ndarray:
        _positive("scale", scale)
        made, loc, scale = self._exponentials(size, loc, scale)
        return _moved(-_log(made), loc, scale)

    def rayleigh(self, scale: Any = 1.0, size: Any = None) -> ndarray:
        _positive("scale", scale)
        made, scale = self._exponentials(size, scale)
        return _moved(_sqrt(made * 2), 0, scale)

    def weibull(self, a: Any, size: Any = None) -> ndarray:
        _positive("a", a)
        made, a = self._exponentials(size, a)
        if _plain(a) and a == 0:
            return single("multiply", made, 0)
        return single("power", made, 1.0 / a)

    def pareto(self, a: Any, size: Any = None) -> ndarray:
        _positive("a", a, True)
        made, a = self._exponentials(size, a)
        return _expm1(made / a)

    def power(self, a: Any, size: Any = None) -> ndarray:
        _positive("a", a, True)
        made, a = self._exponentials(size, a)
        return single("power", -_expm1(-made), 1.0 / a)

    def triangular(self, left: Any, mode: Any, right: Any, size: Any = None) -> ndarray:
        (left, mode, right), shape = _parameters((left, mode, right), size)
        if _plain(left, mode, right) and not (left <= mode <= right and left < right):
            raise ValueError(f"left {left}, mode {mode}, right {right} have to grow")
        x = self._draw("random", shape, beside=(left, mode, right)) * (right - left)
        rising = left + _sqrt(x * (mode - left))
        falling = right - _sqrt((right - left - x) * (right - mode))
        return single("where", x <= mode - left, rising, falling)

    def wald(self, mean: Any, scale: Any, size: Any = None) -> ndarray:
        _positive("mean", mean, True)
        _positive("scale", scale, True)
        (mean, scale), shape = _parameters((mean, scale), size)
        normal = self._draw("standard_normal", shape, beside=(mean, scale))
        # The two solutions of a quadratic equation, mean / root and mean * root.
        w = normal * normal * (mean / scale / 2)
        root = w + _sqrt(w * (w + 2)) + 1
        small = self._draw("random", shape, beside=(normal,)) * (1 + 1 / root) <= 1
        return single("multiply", single("where", small, 1 / root, root), mean)

    def negative_binomial(self, n: Any, p: Any, size: Any = None) -> ndarray:
        _positive("n", n, True)
        _chance("p", p)
        _positive("p", p, True)
        (n, p), shape = _parameters((n, p), size)
        means = self._draw("standard_gamma", shape, n, beside=(p,)) * ((1 - p) / p)
        return self._draw("poisson", shape, means)

    def dirichlet(self, alpha: Any, size: Any = None) -> ndarray:
        a = array_of(alpha)
        if a.ndim != 1:
            raise ShapeError(f"alpha of shape {a.shape}: one axis is needed", op="dirichlet")
        shape = (*(() if size is None else _lengths(size)), *a.shape)
        # Of gammas, by their logarithms: those of small parameters are too small for a float.
        large = _log(self._draw("standard_gamma", shape, a + 1))
        x = large - self._draw("standard_exponential", shape, beside=(a,)) / a
        x = _exp(x - x.max(axis=-1, keepdims=True))
        return single("divide", x, x.sum(axis=-1, keepdims=True))

    def multinomial(self, n: Any, pvals: Any, size: Any = None) -> ndarray:
        """How many of ``n`` fall to each of the chances along the last axis; a draw for each."""
        if not isinstance(pvals, RemoteArray):
            given = np.asarray(pvals, float)
            if (
                (given < 0).any()
                or (given > 1).any()
                or (given[..., :-1].sum(-1) > 1 + 1e-12).any()
            ):
                raise ValueError("pvals have to be chances that make 1 together")
        chances = array_of(pvals).astype(float, copy=False)
        if not chances.ndim or not chances.shape[-1]:
            raise ShapeError(f"pvals of shape {chances.shape}: chances are needed")
        # Of what is left for a number and those behind it, its share.
        behind = chances[..., ::-1].cumsum(axis=-1)[..., ::-1]
        shares = single("clip", single("where", behind > 0, chances / behind, 0.0), 0.0, 1.0)
        (left, _), shape = _parameters((n, chances[..., 0]), size)
        found = []
        for k in range(chances.shape[-1] - 1):
            found.append(self._draw("binomial", shape, left, shares[..., k]))
            left = left - found[-1]
        if not found:
            left = full(shape, left, np.int64, device=chances.device)
        return several("stack", (*found, left), axis=-1)[0]

    def multivariate_normal(
        self,
        mean: Any,
        cov: Any,
        size: Any = None,
        check_valid: str = "ignore",
        tol: float = 1e-8,
        *,
        method: str = "svd",
    ) -> ndarray:
        """As ``numpy.random.Generator.multivariate_normal``; whether ``cov`` is one is looked at
        on request only (``check_valid``: warn, raise), and waited for."""
        m, c = array_of(mean), array_of(cov)
        if m.ndim != 1 or c.shape != (m.size, m.size):
            raise ShapeError(f"mean of shape {m.shape}, cov of shape {c.shape}")
        if method not in ("svd", "eigh", "cholesky"):
            raise ValueError(f"method has to be svd, eigh or cholesky, not {method!r}")
        if check_valid not in ("ignore", "warn", "raise"):
            raise ValueError(f"check_valid has to be ignore, warn or raise, not {check_valid!r}")
        c = c.astype(float, copy=False)
        if method == "cholesky":
            factor = linalg.cholesky(c)
        elif method == "eigh":
            values, vectors = linalg.eigh(c)
            factor = vectors * _sqrt(single("maximum", values, 0.0))
        else:
            u, s, _ = linalg.svd(c)
            factor = u * _sqrt(s)
        if check_valid != "ignore":
            _check_covariance(c, factor, tol, check_valid)
        shape = (*(() if size is None else _lengths(size)), m.size)
        return single("matmul", self._draw("standard_normal", shape, beside=(m,)), factor.T) + m

    # -- order and choice -----------------------------------------------------------------------

    def _order(self, length: int, place: Any = None) -> ndarray:
        keys = self._draw("random", (length,), beside=() if place is None else (place,))
        return single("argsort", keys, axis=0)

    def permutation(self, x: Any, axis: int = 0) -> ndarray:
        """The numbers below an integer, or the elements along an axis, in another order."""
        if isinstance(x, int | np.integer):
            return self._order(int(x))
        found = array_of(x)
        return single("take", found, self._order(found.shape[axis], found), axis=axis)

    def permuted(self, x: Any, axis: int | None = None, out: Any = None) -> ndarray:
        """Each slice along an axis in an order of its own."""
        found = array_of(x)
        flat = found.reshape(-1) if axis is None else found
        keys = self._draw("random", flat.shape, beside=(found,))
        order = single("argsort", keys, axis=-1 if axis is None else axis)
        moved = single("take_along_axis", flat, order, axis=-1 if axis is None else axis)
        moved = moved.reshape(found.shape)
        return moved if out is None else store(moved, out)

    def shuffle(self, x: Any, axis: int = 0) -> None:
        """Put the elements along an axis in another order, in place."""
        if not isinstance(x, ndarray):
            raise TypeError(f"a {type(x).__name__} is not shuffled on a device")
        x[...] = self.permutation(x, axis)

    def choice(
        self,
        a: Any,
        size: Any = None,
        replace: bool = True,
        p: Any = None,
        axis: int = 0,
        shuffle: bool = True,
    ) -> ndarray:
        """As ``numpy.random.Generator.choice``. Chances in a list are checked; of a remote array
        they are taken as they are, up to a factor."""
        whole = isinstance(a, int | np.integer)
        found = None if whole else array_of(a)
        length = int(a) if found is None else found.shape[axis]
        shape = () if size is None else _lengths(size)
        count = math.prod(shape)
        if length < 1 and count:
            raise ValueError("nothing to choose from")
        if not replace and count > length:
            raise ValueError(f"{count} out of {length} can't be chosen without replacement")
        chances = None if p is None else _chances(p, length, 0 if replace else count)
        beside = tuple(x for x in (chances, found) if x is not None)
        if not replace:
            name = "random" if chances is None else "standard_exponential"
            keys = self._draw(name, (length,), beside=beside)
            keys = keys if chances is None else keys / chances
            index = single("argsort", keys, axis=0)[:count].reshape(shape)
        elif chances is None:
            index = self._draw("integers", shape, 0, length - 1, beside=beside)
        else:
            sums = chances.cumsum()
            drawn = self._draw("random", shape, beside=beside) * sums[-1]
            index = single("searchsorted", sums, drawn, side="right")
            index = single("minimum", index, length - 1)
        return index if found is None else single("take", found, index, axis=axis)


def _chances(p: Any, length: int, distinct: int) -> Any:
    if not isinstance(p, RemoteArray):
        given = np.asarray(p, float)
        if given.shape == (length,) and ((given < 0).any() or abs(given.sum() - 1) > 1e-8):
            raise ValueError("chances have to be 0 or more, and make 1 together")
        if np.count_nonzero(given) < distinct:
            raise ValueError(f"fewer than {distinct} chances are not 0")
    found = array_of(p)
    if found.shape != (length,):
        raise ShapeError(f"chances of shape {found.shape} for {length} things to choose from")
    return found.astype(float, copy=False)


def _check_covariance(c: ndarray, factor: ndarray, tol: float, action: str) -> None:
    gap = _absolute(single("matmul", factor, factor.T) - c)
    if builtins.bool((gap <= tol + tol * _absolute(c)).all()):
        return
    if action == "raise":
        raise ValueError("covariance is not symmetric positive-semidefinite.")
    warnings.warn(
        "covariance is not symmetric positive-semidefinite.", RuntimeWarning, stacklevel=3
    )


def default_rng(seed: Any = None) -> Generator:
    """A generator: of a seed, or of what makes seeds; one that is given as it is."""
    if isinstance(seed, Generator):
        return seed
    return Generator(seed if isinstance(seed, BitGenerator) else BitGenerator(seed))
