"""Linear algebra: NumPy's and CuPy's names, with the semantics of the array API standard.

Everything here takes stacks of matrices, the last two axes. What can be seen of shapes and dtypes
is refused at once, as by NumPy. Errors that depend on values, of singular matrices for one, are
``gpuremote.errors.LinearAlgebraError`` and come at the next wait (a CuPy server gives inf or nan
instead).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from gpuremote.cupy import _products
from gpuremote.cupy._array import axis_of, integers, ndarray, several, single, store, wire
from gpuremote.cupy._creation import array_of, empty, eye, zeros
from gpuremote.cupy._elementwise import UFUNCS
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.errors import LinearAlgebraError as LinAlgError

__all__ = [
    "EigResult",
    "EighResult",
    "LinAlgError",
    "QRResult",
    "SVDResult",
    "SlogdetResult",
    "cholesky",
    "cond",
    "cross",
    "det",
    "diagonal",
    "eig",
    "eigh",
    "eigvals",
    "eigvalsh",
    "inv",
    "lstsq",
    "matmul",
    "matrix_norm",
    "matrix_power",
    "matrix_rank",
    "matrix_transpose",
    "multi_dot",
    "norm",
    "outer",
    "pinv",
    "qr",
    "slogdet",
    "solve",
    "svd",
    "svdvals",
    "tensordot",
    "tensorinv",
    "tensorsolve",
    "trace",
    "vecdot",
    "vector_norm",
]


class EigResult(NamedTuple):
    eigenvalues: ndarray
    eigenvectors: ndarray


class EighResult(NamedTuple):
    eigenvalues: ndarray
    eigenvectors: ndarray


class QRResult(NamedTuple):
    Q: ndarray
    R: ndarray


class SlogdetResult(NamedTuple):
    sign: ndarray
    logabsdet: ndarray


class SVDResult(NamedTuple):
    U: ndarray
    S: ndarray
    Vh: ndarray


def _matrix(x: Any, op: str) -> ndarray:
    found = array_of(x)
    if found.ndim < 2:
        raise LinAlgError(f"{op} of shape {found.shape}: a matrix has two axes")
    return found


def _square(x: Any, op: str) -> ndarray:
    found = _matrix(x, op)
    if found.shape[-1] != found.shape[-2]:
        raise LinAlgError(
            f"{op} of shape {found.shape}: its last two axes have to be of one length"
        )
    return found


def _triangle(UPLO: str) -> str:
    if UPLO not in ("L", "U", "l", "u"):
        raise ValueError(f"UPLO has to be 'L' or 'U', not {UPLO!r}")
    return UPLO.upper()


def _eps(x: ndarray) -> float:
    return float(np.finfo(x.dtype if x.dtype.kind in "fc" else np.dtype(float)).eps)


def _adjoint(x: ndarray) -> Any:
    turned = x.swapaxes(-1, -2)
    return turned.conj() if x.dtype.kind == "c" else turned


# -- products -----------------------------------------------------------------------------------


def matmul(x1: Any, x2: Any, /) -> ndarray:
    """As ``numpy.linalg.matmul``."""
    return _products.matmul(x1, x2)


def tensordot(x1: Any, x2: Any, /, *, axes: Any = 2) -> Any:
    """As ``numpy.linalg.tensordot``."""
    return _products.tensordot(x1, x2, axes)


def vecdot(x1: Any, x2: Any, /, *, axis: int = -1) -> ndarray:
    """As ``numpy.linalg.vecdot``."""
    return _products.vecdot(x1, x2, axis=axis)


def outer(x1: Any, x2: Any, /) -> ndarray:
    """As ``numpy.linalg.outer``: of vectors only."""
    a, b = array_of(x1), array_of(x2)
    if a.ndim != 1 or b.ndim != 1:
        raise ShapeError(f"shapes {a.shape} and {b.shape}: one axis each is needed", op="outer")
    return single("outer", a, b)


def cross(x1: Any, x2: Any, /, *, axis: int = -1) -> ndarray:
    """As ``numpy.linalg.cross``: of vectors of three elements."""
    return single("cross", array_of(x1), array_of(x2), axis=operator.index(axis))


def multi_dot(arrays: Sequence[Any], *, out: Any = None) -> ndarray:
    """The product of several matrices, in the order that takes the fewest multiplications.

    The first may be a row, the last a column, each with one axis.
    """
    chain = [array_of(x) for x in arrays]
    if len(chain) < 2:
        raise ValueError("two arrays at least are needed")
    row, column = chain[0].ndim == 1, chain[-1].ndim == 1
    if row:
        chain[0] = chain[0].reshape(1, -1)
    if column:
        chain[-1] = chain[-1].reshape(-1, 1)
    for x in chain:
        if x.ndim != 2:
            raise LinAlgError(f"multi_dot: shape {x.shape} in the product of matrices")
    found = _product(chain, _splits([chain[0].shape[0], *(x.shape[1] for x in chain)]), 0, -1)
    lengths = (*(() if row else found.shape[:1]), *(() if column else found.shape[1:]))
    found = found.reshape(lengths)
    return found if out is None else store(found, out)


def _splits(lengths: Sequence[int]) -> list[list[int]]:
    """Behind which matrix to split the product of those from ``i`` to ``j``."""
    count = len(lengths) - 1
    costs = [[0] * count for _ in range(count)]
    splits = [[0] * count for _ in range(count)]
    for span in range(1, count):
        for i in range(count - span):
            j = i + span
            costs[i][j], splits[i][j] = min(
                (
                    costs[i][k] + costs[k + 1][j] + lengths[i] * lengths[k + 1] * lengths[j + 1],
                    k,
                )
                for k in range(i, j)
            )
    return splits


def _product(chain: list[ndarray], splits: list[list[int]], first: int, last: int) -> ndarray:
    last %= len(chain)
    if first == last:
        return chain[first]
    middle = splits[first][last]
    left = _product(chain, splits, first, middle)
    return single("matmul", left, _product(chain, splits, middle + 1, last))


def matrix_power(a: Any, n: int) -> ndarray:
    """A matrix to an integer power; a negative one inverts it first."""
    x = _square(a, "matrix_power")
    n = operator.index(n)
    if n == 0:
        identity = eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return single("copy", single("broadcast_to", identity, shape=x.shape))
    if n < 0:
        x, n = inv(x), -n
    found: ndarray | None = None
    power = x
    while True:
        n, odd = divmod(n, 2)
        if odd:
            found = power if found is None else single("matmul", found, power)
        if not n:
            return cast(ndarray, found)
        power = single("matmul", power, power)


# -- parts of matrices --------------------------------------------------------------------------


def matrix_transpose(x: Any, /) -> Any:
    """The last two axes swapped: a view."""
    found = array_of(x)
    if found.ndim < 2:
        raise ShapeError(f"shape {found.shape}: a matrix has two axes", op="matrix_transpose")
    return found.swapaxes(-1, -2)


def diagonal(x: Any, /, *, offset: int = 0) -> ndarray:
    """The diagonals of the matrices: a view."""
    return array_of(x).diagonal(operator.index(offset), -2, -1)


def trace(x: Any, /, *, offset: int = 0, dtype: Any = None) -> ndarray:
    """The sums of the diagonals of the matrices."""
    kind = None if dtype is None else wire(dtype)
    return single(
        "trace", array_of(x), offset=operator.index(offset), axis1=-2, axis2=-1, dtype=kind
    )


# -- decompositions -----------------------------------------------------------------------------


def cholesky(a: Any, /, *, upper: bool = False) -> ndarray:
    """The triangular factor of Hermitian, positive definite matrices."""
    return single("cholesky", _square(a, "cholesky"), upper=True if upper else None)


def qr(a: Any, mode: str = "reduced") -> Any:
    """As ``numpy.linalg.qr``."""
    x = _matrix(a, "qr")
    if mode == "r":
        return single("qr_r", x)
    if mode not in ("reduced", "complete", "raw"):
        raise ValueError(f"mode has to be reduced, complete, r or raw, not {mode!r}")
    first, second = several("qr", (x,), mode=mode)
    return (first, second) if mode == "raw" else QRResult(first, second)


def svd(
    a: Any, full_matrices: bool = True, compute_uv: bool = True, hermitian: bool = False
) -> Any:
    """As ``numpy.linalg.svd``: U, S and Vh; S alone without ``compute_uv``."""
    x = _matrix(a, "svd")
    if hermitian:
        return _hermitian_svd(x) if compute_uv else _sizes(eigvalsh(x))[0]
    if not compute_uv:
        return single("svdvals", x)
    return SVDResult(*several("svd", (x,), full_matrices=bool(full_matrices)))


def svdvals(x: Any, /) -> ndarray:
    """The singular values, the largest first."""
    return single("svdvals", _matrix(x, "svdvals"))


def _sizes(eigenvalues: ndarray) -> tuple[ndarray, ndarray]:
    """The absolute values, the largest first, and where they were."""
    sizes = UFUNCS["absolute"](eigenvalues)
    order = single("argsort", sizes, axis=-1)[..., ::-1]
    return single("take_along_axis", sizes, order, axis=-1), order


def _hermitian_svd(x: ndarray) -> SVDResult:
    values, vectors = eigh(x)
    sizes, order = _sizes(values)
    signs = single("take_along_axis", UFUNCS["sign"](values), order, axis=-1)
    u = single("take_along_axis", vectors, order[..., None, :], axis=-1)
    return SVDResult(u, sizes, _adjoint(u * signs[..., None, :]))


def eig(a: Any) -> EigResult:
    """Eigenvalues and right eigenvectors of square matrices; complex, whatever the values."""
    return EigResult(*several("eig", (_square(a, "eig"),)))


def eigvals(a: Any) -> ndarray:
    """Eigenvalues of square matrices; complex, whatever the values."""
    return single("eigvals", _square(a, "eigvals"))


def eigh(a: Any, UPLO: str = "L") -> EighResult:
    """Eigenvalues, growing, and eigenvectors of Hermitian matrices."""
    return EighResult(*several("eigh", (_square(a, "eigh"),), uplo=_triangle(UPLO)))


def eigvalsh(a: Any, UPLO: str = "L") -> ndarray:
    """Eigenvalues of Hermitian matrices, growing."""
    return single("eigvalsh", _square(a, "eigvalsh"), uplo=_triangle(UPLO))


# -- norms and other numbers --------------------------------------------------------------------


def norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """As ``numpy.linalg.norm``: of vectors along one axis, of matrices along two."""
    found = array_of(x)
    axes = integers(axis)
    if axes is None:
        if ord is None:
            return vector_norm(found, keepdims=keepdims)
        if found.ndim not in (1, 2):
            raise ShapeError(f"shape {found.shape} with ord and no axis", op="norm")
        axes = tuple(range(found.ndim))
    elif isinstance(axes, int):
        axes = (axes,)
    if len(axes) == 1:
        return vector_norm(found, axis=axes[0], keepdims=keepdims, ord=2 if ord is None else ord)
    if len(axes) != 2:
        raise ShapeError(f"axes {axes}: a norm is along one axis or two", op="norm")
    return _matrix_norm(found, "fro" if ord in (None, "f") else ord, axes, keepdims)


def _matrix_norm(x: ndarray, order: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    places = tuple(axis_of(axis, x.ndim) for axis in axes)
    rest = tuple(i for i in range(x.ndim) if i not in places)
    if len(rest) + 2 != x.ndim:
        raise ShapeError(f"axes {axes} are the same", op="norm")
    if (*rest, *places) != tuple(range(x.ndim)):
        x = x.transpose((*rest, *places))
    found = single("matrix_norm", x, ord=_order(order))
    if not keepdims:
        return found
    lengths = iter(found.shape)
    return found.reshape([1 if i in places else next(lengths) for i in range(x.ndim)])


def _order(order: Any) -> Any:
    """An order of a norm as it travels."""
    if isinstance(order, str | int):
        return order
    if isinstance(order, np.integer):
        return int(order)
    return float(order)


def matrix_norm(x: Any, /, *, keepdims: bool = False, ord: Any = "fro") -> Any:
    """The norms of the matrices."""
    found = _matrix(x, "matrix_norm")
    return _matrix_norm(found, "fro" if ord is None else ord, (-2, -1), keepdims)


def vector_norm(
    x: Any, /, *, axis: Any = None, keepdims: bool = False, ord: int | float = 2
) -> ndarray:
    """The norms of vectors along an axis; of all elements along several, or all, of them."""
    if isinstance(ord, str):
        raise ShapeError(f"no norm of vectors of ord {ord!r}", op="norm")
    return single(
        "norm",
        array_of(x),
        ord=_order(ord),
        axis=integers(axis),
        keepdims=True if keepdims else None,
    )


def det(a: Any) -> ndarray:
    """The determinants."""
    return single("det", _square(a, "det"))


def slogdet(a: Any) -> SlogdetResult:
    """Sign and logarithm of the absolute value of the determinants."""
    return SlogdetResult(*several("slogdet", (_square(a, "slogdet"),)))


def cond(x: Any, p: Any = None) -> ndarray:
    """The condition numbers, by any of the norms of matrices."""
    found = _matrix(x, "cond")
    if not found.size:
        raise LinAlgError(f"cond: shape {found.shape} has no elements")
    if p not in (None, 2, -2):
        _square(found, "cond")
    return single("linalg.cond", found, p=None if p is None else _order(p))


def matrix_rank(A: Any, tol: Any = None, hermitian: bool = False, *, rtol: Any = None) -> ndarray:
    """How many singular values are above ``tol``, or above ``rtol`` times the largest one."""
    x = array_of(A)
    if tol is not None and rtol is not None:
        raise ValueError("tol and rtol can't both be given")
    rank: ndarray
    if x.ndim < 2:
        rank = (x != 0).any().astype(int)
        return rank
    sizes = svd(x, compute_uv=False, hermitian=hermitian)
    if not sizes.shape[-1]:
        return zeros(x.shape[:-2], int, device=x.device)
    if tol is not None:
        least: Any = _column(tol)
    else:
        given = max(x.shape[-2:]) * _eps(sizes) if rtol is None else _column(rtol)
        least = sizes.max(axis=-1, keepdims=True) * given
    rank = (sizes > least).sum(axis=-1)
    return rank


def _column(value: Any) -> Any:
    """A tolerance for each matrix of a stack, to go with the values of each."""
    if isinstance(value, int | float | np.generic):
        return value
    found = array_of(value)
    return found.reshape((*found.shape, 1))


# -- equations ----------------------------------------------------------------------------------


def inv(a: Any) -> ndarray:
    """The inverse matrices."""
    return single("inv", _square(a, "inv"))


def solve(a: Any, b: Any) -> ndarray:
    """The solutions of ``a @ x == b``; ``b`` is one vector, or (a stack of) matrices."""
    return single("solve", _square(a, "solve"), array_of(b))


_UNSET: Any = object()


def pinv(a: Any, rcond: Any = None, hermitian: bool = False, *, rtol: Any = _UNSET) -> ndarray:
    """The pseudo-inverse matrices.

    Singular values up to ``rcond`` (by default 1e-15) times the largest one count as zero.
    ``rtol`` is the array API's name for it, and None there the larger length times the dtype's
    epsilon.
    """
    x = _matrix(a, "pinv")
    if rcond is not None and rtol is not _UNSET:
        raise ValueError("rcond and rtol can't both be given")
    if rcond is None:
        rcond = 1e-15 if rtol is _UNSET else rtol
    if rcond is None:
        rcond = max(x.shape[-2:]) * _eps(x)
    if isinstance(rcond, int | float | np.generic) and not hermitian:
        return single("pinv", x, rtol=float(rcond))
    if not x.size:
        shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
        return empty(shape, x.dtype, device=x.device)
    u, s, vh = svd(x, full_matrices=False, hermitian=hermitian)
    return single("matmul", _adjoint(vh), _inverted(s, _column(rcond))[..., None] * _adjoint(u))


def _inverted(s: ndarray, rcond: Any) -> Any:
    """One over each singular value; zero for those that count as zero."""
    large = s > s.max(axis=-1, keepdims=True) * rcond
    return single("where", large, 1 / single("where", large, s, 1), 0).astype(s.dtype, copy=False)


def lstsq(a: Any, b: Any, rcond: float | None = None) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """The solutions of least squares: x, residuals, rank, singular values.

    Waits for the rank where there are more equations than unknowns: there are residuals only if
    no column depends on the others.
    """
    x, y = _matrix(a, "lstsq"), array_of(b)
    if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0]:
        raise LinAlgError(f"lstsq: shapes {x.shape} and {y.shape} are no equations")
    m, n = x.shape
    if np.float16 in (x.dtype, y.dtype):
        raise DTypeError("float16 is not solved", op="lstsq")
    # In double precision, as NumPy: the rank of a matrix depends on it.
    kind = np.result_type(x.dtype, y.dtype, np.float32)
    wide = np.result_type(kind, np.float64)
    x, y = x.astype(wide, copy=False), y.astype(wide, copy=False)
    columns = y if y.ndim == 2 else y.reshape(m, 1)
    u, s, vh = svd(x, full_matrices=False)
    if rcond is None:
        rcond = max(m, n) * _eps(s)
    elif rcond < 0:
        rcond = _eps(s)
    if s.size:
        rank = (s > s[0] * rcond).sum().astype(np.int32)
        solved = _adjoint(vh) @ (_inverted(s, rcond)[:, None] * (_adjoint(u) @ columns))
    else:
        rank = zeros((), np.int32, device=x.device)
        solved = zeros((n, columns.shape[1]), wide, device=x.device)
    result = solved if y.ndim == 2 else solved.reshape(n)
    real = np.empty(0, kind).real.dtype
    if m > n and int(rank) == n:
        gaps = UFUNCS["absolute"](columns - x @ solved)
        residuals = (gaps * gaps).sum(axis=0).astype(real)
    else:
        residuals = zeros((0,), real, device=x.device)
    return result.astype(kind, copy=False), residuals, rank, s.astype(real, copy=False)


def tensorinv(a: Any, ind: int = 2) -> Any:
    """The inverse of what sums over the last axes, behind the first ``ind`` ones."""
    x = array_of(a)
    ind = operator.index(ind)
    if ind <= 0:
        raise ValueError(f"ind has to be positive, not {ind}")
    behind, before = x.shape[ind:], x.shape[:ind]
    if math.prod(behind) != math.prod(before):
        raise LinAlgError(f"tensorinv: shape {x.shape} is not square around axis {ind}")
    return inv(x.reshape(math.prod(behind), -1)).reshape(behind + before)


def tensorsolve(a: Any, b: Any, axes: Any = None) -> Any:
    """The solution of ``tensordot(a, x, x.ndim) == b``."""
    x, y = array_of(a), array_of(b)
    if axes is not None:
        ends = [axis % x.ndim for axis in integers(axes)]
        x = x.transpose([*(i for i in range(x.ndim) if i not in ends), *ends])
    shape = x.shape[y.ndim - x.ndim :]
    length = math.prod(shape)
    if x.size != length**2:
        raise LinAlgError(f"tensorsolve: shape {x.shape} is not square for b of {y.shape}")
    return solve(x.reshape(length, length), y.reshape(-1)).reshape(shape)
