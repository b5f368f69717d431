"""Random numbers: NumPy's ``Generator``, and CuPy's functions that share one state.

Numbers are made on the device. The state is here: each draw takes the next seed out of a sequence
that belongs to the generator, so nothing is waited for, and the same seed gives the same numbers
on the same kind of backend.
"""

from __future__ import annotations

import builtins
import inspect
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpuremote.cupy._array import ndarray
from gpuremote.cupy._generator import Generator, default_rng
from gpuremote.cupy._seeds import XORWOW, BitGenerator, MRG32k3a, Philox4x3210

__all__ = [
    "XORWOW",
    "BitGenerator",
    "Generator",
    "MRG32k3a",
    "Philox4x3210",
    "RandomState",
    "beta",
    "binomial",
    "bytes",
    "chisquare",
    "choice",
    "default_rng",
    "dirichlet",
    "exponential",
    "f",
    "gamma",
    "geometric",
    "get_random_state",
    "gumbel",
    "hypergeometric",
    "laplace",
    "logistic",
    "lognormal",
    "logseries",
    "multinomial",
    "multivariate_normal",
    "negative_binomial",
    "noncentral_chisquare",
    "noncentral_f",
    "normal",
    "pareto",
    "permutation",
    "poisson",
    "power",
    "rand",
    "randint",
    "randn",
    "random",
    "random_integers",
    "random_sample",
    "ranf",
    "rayleigh",
    "reset_states",
    "sample",
    "seed",
    "set_random_state",
    "shuffle",
    "standard_cauchy",
    "standard_exponential",
    "standard_gamma",
    "standard_normal",
    "standard_t",
    "triangular",
    "uniform",
    "vonmises",
    "wald",
    "weibull",
    "zipf",
]

_POSITIONAL: Final = inspect.Parameter.POSITIONAL_OR_KEYWORD


def _made_in(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """What numbers are drawn in that are wanted in a dtype."""
    return np.dtype(np.float32 if np.dtype(dtype) == np.float32 else np.float64)


def _typed(name: str, default: Any = float) -> Callable[..., Any]:
    """A method of the Generator, as CuPy's older class has it: with the dtype last."""
    method = getattr(Generator, name)
    named = inspect.signature(method).parameters
    own = "dtype" in named  # made in that dtype, as floats of 4 and 8 bytes
    signature = inspect.Signature(
        [
            *(named[key] for key in named if key not in ("dtype", "out", "method")),
            inspect.Parameter("dtype", _POSITIONAL, default=default),
        ]
    )

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        wanted = np.dtype(bound.arguments.pop("dtype", default))
        bound.arguments["self"] = bound.arguments["self"].generator
        native = {"dtype": _made_in(wanted)} if own else {}
        found: ndarray = method(*bound.args, **bound.kwargs, **native)
        return found.astype(wanted, copy=False)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"As ``Generator.{name}``, in a dtype."
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


class RandomState:
    """CuPy's older way to draw: the distributions of :class:`Generator`, in a dtype.

    Parameters
    ----------
    seed : int, sequence of int, SeedSequence, optional
    method
        CuPy's, without effect.

    Attributes
    ----------
    generator : Generator
        What draws.
    """

    def __init__(self, seed: Any = None, method: Any = None) -> None:
        self.generator = default_rng(seed)

    def seed(self, seed: Any = None) -> None:
        """Begin anew, from a seed."""
        self.generator = default_rng(seed)

    beta = _typed("beta")
    binomial = _typed("binomial", int)
    chisquare = _typed("chisquare")
    dirichlet = _typed("dirichlet")
    exponential = _typed("exponential")
    f = _typed("f")
    gamma = _typed("gamma")
    geometric = _typed("geometric", int)
    gumbel = _typed("gumbel")
    hypergeometric = _typed("hypergeometric", int)
    laplace = _typed("laplace")
    logistic = _typed("logistic")
    lognormal = _typed("lognormal")
    logseries = _typed("logseries", int)
    negative_binomial = _typed("negative_binomial", int)
    noncentral_chisquare = _typed("noncentral_chisquare")
    noncentral_f = _typed("noncentral_f")
    pareto = _typed("pareto")
    poisson = _typed("poisson", int)
    power = _typed("power")
    random_sample = _typed("random")
    rayleigh = _typed("rayleigh")
    standard_cauchy = _typed("standard_cauchy")
    standard_exponential = _typed("standard_exponential")
    standard_gamma = _typed("standard_gamma")
    standard_normal = _typed("standard_normal")
    standard_t = _typed("standard_t")
    triangular = _typed("triangular")
    vonmises = _typed("vonmises")
    wald = _typed("wald")
    weibull = _typed("weibull")
    zipf = _typed("zipf", int)
    random = ranf = sample = random_sample

    def normal(
        self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None, dtype: npt.DTypeLike = float
    ) -> Any:
        """As ``Generator.normal``, in a dtype."""
        found = self.generator._located("standard_normal", loc, scale, size, _made_in(dtype))
        return found.astype(dtype, copy=False)

    def uniform(
        self, low: Any = 0.0, high: Any = 1.0, size: Any = None, dtype: npt.DTypeLike = float
    ) -> Any:
        """As ``Generator.uniform``, in a dtype."""
        found = self.generator._uniform(low, high, size, _made_in(dtype))
        return found.astype(dtype, copy=False)

    def rand(self, *size: int, dtype: npt.DTypeLike = float) -> ndarray:
        """Numbers from 0 to 1, the shape given as arguments."""
        found: ndarray = self.random_sample(size, dtype)
        return found

    def randn(self, *size: int, dtype: npt.DTypeLike = float) -> ndarray:
        """Numbers of the standard normal distribution, the shape given as arguments."""
        found: ndarray = self.standard_normal(size, dtype)
        return found

    def randint(
        self, low: Any, high: Any = None, size: Any = None, dtype: npt.DTypeLike = int
    ) -> Any:
        """Integers from ``low``, below ``high`` (from 0, below ``low``)."""
        return self.generator.integers(low, high, size, dtype)

    def random_integers(self, low: Any, high: Any = None, size: Any = None) -> Any:
        """Integers from ``low`` to ``high`` (from 1 to ``low``)."""
        if high is None:
            low, high = 1, low
        return self.generator.integers(low, high, size, endpoint=True)

    def tomaxint(self, size: Any = None) -> Any:
        """Integers that are 0 or more, of all that an int64 can be."""
        return self.generator.integers(0, np.iinfo(np.int64).max, size, endpoint=True)

    def bytes(self, length: int) -> builtins.bytes:
        """Random bytes, fetched."""
        return self.generator.bytes(length)

    def choice(self, a: Any, size: Any = None, replace: bool = True, p: Any = None) -> ndarray:
        """As ``Generator.choice``."""
        return self.generator.choice(a, size, replace, p)

    def permutation(self, a: Any) -> ndarray:
        """As ``Generator.permutation``."""
        return self.generator.permutation(a)

    def shuffle(self, a: Any) -> None:
        """As ``Generator.shuffle``."""
        self.generator.shuffle(a)

    def multinomial(self, n: Any, pvals: Any, size: Any = None) -> ndarray:
        """As ``Generator.multinomial``."""
        return self.generator.multinomial(n, pvals, size)

    def multivariate_normal(
        self,
        mean: Any,
        cov: Any,
        size: Any = None,
        check_valid: str = "ignore",
        tol: float = 1e-8,
        method: str = "cholesky",
        dtype: npt.DTypeLike = float,
    ) -> Any:
        """As ``Generator.multivariate_normal``, in a dtype."""
        found = self.generator.multivariate_normal(mean, cov, size, check_valid, tol, method=method)
        return found.astype(dtype, copy=False)


# -- one state that is everybody's --------------------------------------------------------------

_lock = threading.Lock()
_state: RandomState | None = None


def get_random_state() -> RandomState:
    """The state that the functions of this module draw from."""
    global _state
    with _lock:
        if _state is None:
            _state = RandomState()
        return _state


def set_random_state(rs: RandomState) -> None:
    """Let the functions of this module draw from another state."""
    global _state
    if not isinstance(rs, RandomState):
        raise TypeError(f"a {type(rs).__name__} is no RandomState")
    with _lock:
        _state = rs


def reset_states() -> None:
    """Forget the state: the next draw begins with a seed of the operating system's."""
    global _state
    with _lock:
        _state = None


def seed(seed: Any = None) -> None:
    """Begin anew, from a seed."""
    get_random_state().seed(seed)


def _shared(name: str) -> Callable[..., Any]:
    method = getattr(RandomState, name)
    signature = inspect.signature(method)

    def function(*args: Any, **kwargs: Any) -> Any:
        return method(get_random_state(), *args, **kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = method.__doc__
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )
    return function


beta = _shared("beta")
binomial = _shared("binomial")
bytes = _shared("bytes")
chisquare = _shared("chisquare")
choice = _shared("choice")
dirichlet = _shared("dirichlet")
exponential = _shared("exponential")
f = _shared("f")
gamma = _shared("gamma")
geometric = _shared("geometric")
gumbel = _shared("gumbel")
hypergeometric = _shared("hypergeometric")
laplace = _shared("laplace")
logistic = _shared("logistic")
lognormal = _shared("lognormal")
logseries = _shared("logseries")
multinomial = _shared("multinomial")
multivariate_normal = _shared("multivariate_normal")
negative_binomial = _shared("negative_binomial")
noncentral_chisquare = _shared("noncentral_chisquare")
noncentral_f = _shared("noncentral_f")
normal = _shared("normal")
pareto = _shared("pareto")
permutation = _shared("permutation")
poisson = _shared("poisson")
power = _shared("power")
rand = _shared("rand")
randint = _shared("randint")
randn = _shared("randn")
random_integers = _shared("random_integers")
random_sample = _shared("random_sample")
random = ranf = sample = random_sample
rayleigh = _shared("rayleigh")
shuffle = _shared("shuffle")
standard_cauchy = _shared("standard_cauchy")
standard_exponential = _shared("standard_exponential")
standard_gamma = _shared("standard_gamma")
standard_normal = _shared("standard_normal")
standard_t = _shared("standard_t")
triangular = _shared("triangular")
uniform = _shared("uniform")
vonmises = _shared("vonmises")
wald = _shared("wald")
weibull = _shared("weibull")
zipf = _shared("zipf")
