"""Kernels in CUDA C++ that the program brings along, for servers that run them
(``serve --backend cupy --allow-kernels``).

A kernel is compiled by the server when it is first called, and an error of the compiler's arrives
where errors of ops do: at the next wait for something that the kernel wrote to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuremote.client.array import RemoteArray
from gpuremote.cupy._array import several, store
from gpuremote.errors import DTypeError, ShapeError
from gpuremote.ops.client_kernels import check_launch, parse_parameters

__all__ = ["ElementwiseKernel", "RawKernel", "RawModule", "ReductionKernel"]


class RawKernel:
    """As ``cupy.RawKernel``: a function of CUDA C++, launched with a grid of blocks of threads.

    Parameters
    ----------
    code : str
        Source with the function in it, declared ``extern "C" __global__``; up to 256 KiB.
    name : str
        Of the function.
    options : tuple of str
        For the compiler: those that define names, choose the language's standard or tune
        arithmetic.
    backend : str
        ``"nvrtc"``; the server starts no other compiler.

    Notes
    -----
    Every array that it is given counts as written to: if the kernel fails, what they hold can't be
    relied on, and they raise the error. A kernel reaches all memory of its process on the device;
    nothing checks its addresses.
    """

    def __init__(
        self,
        code: str,
        name: str,
        options: Sequence[str] = (),
        backend: str = "nvrtc",
        *,
        translate_cucomplex: bool = False,
        enable_cooperative_groups: bool = False,
        jitify: bool = False,
    ) -> None:
        if backend != "nvrtc":
            raise ValueError(f"kernels are compiled by nvrtc, not by {backend!r}")
        for given, what in (
            (translate_cucomplex, "translate_cucomplex"),
            (enable_cooperative_groups, "enable_cooperative_groups"),
            (jitify, "jitify"),
        ):
            if given:
                raise NotImplementedError(f"{what} is not offered for kernels on a server")
        self.code = code
        self.name = name
        self.options = tuple(options)

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
    ) -> None:
        """Launch it on the device of its arrays; returns at once.

        Parameters
        ----------
        grid, block : int or tuple of up to three
            Blocks, and threads of a block.
        args : sequence
            Arrays, NumPy's scalars as what they are, and Python's numbers as ``long long``,
            ``double``, ``bool`` and ``complex<double>``.
        shared_mem : int
            Bytes of dynamic shared memory of each block.

        Raises
        ------
        ShapeError
            A launch that no device can do.
        """
        launch = (*_lengths(grid), *_lengths(block), int(shared_mem))
        check_launch(launch)
        several(
            "raw_kernel",
            (*args, *launch),
            code=self.code,
            name=self.name,
            options=self.options or None,
        )


class RawModule:
    """As ``cupy.RawModule``: several kernels of one source (not a file, not a binary)."""

    def __init__(self, *, code: str, options: Sequence[str] = (), backend: str = "nvrtc") -> None:
        self.code = code
        self.options = tuple(options)
        self.backend = backend

    def get_function(self, name: str) -> RawKernel:
        """The kernel of a name. That it is there is seen when it is called."""
        return RawKernel(self.code, name, self.options, self.backend)


class ElementwiseKernel:
    """As ``cupy.ElementwiseKernel``: what is done for each element, in CUDA C++.

    Parameters
    ----------
    in_params, out_params : str
        ``"float32 x, T y, raw T z"``: dtypes, or single letters that stand for the dtype of the
        array given there. Raw ones are indexed by the kernel itself.
    operation : str
        The loop's body; ``i`` is the index and ``_ind.size()`` the length.
    name : str
    preamble, loop_prep, after_loop : str
        Code in front of the kernel, and before and after its loop.
    options : tuple of str
        As of :class:`RawKernel`.
    reduce_dims : bool
        Taken and not needed: shapes are as they are.
    no_return, return_tuple : bool
        Give None, or a tuple also of one result.
    """

    def __init__(
        self,
        in_params: str,
        out_params: str,
        operation: str,
        name: str = "kernel",
        reduce_dims: bool = True,
        preamble: str = "",
        no_return: bool = False,
        return_tuple: bool = False,
        *,
        options: Sequence[str] = (),
        loop_prep: str = "",
        after_loop: str = "",
    ) -> None:
        self.in_params = parse_parameters(in_params)
        self.out_params = parse_parameters(out_params)
        self.name = name
        self._no_return = no_return
        self._return_tuple = return_tuple
        self._params = {
            "in_params": in_params,
            "out_params": out_params,
            "operation": operation,
            "name": name,
            "preamble": preamble or None,
            "options": tuple(options) or None,
            "loop_prep": loop_prep or None,
            "after_loop": after_loop or None,
        }

    @property
    def nin(self) -> int:
        return len(self.in_params)

    @property
    def nout(self) -> int:
        return len(self.out_params)

    @property
    def nargs(self) -> int:
        return self.nin + self.nout

    def __call__(self, *args: Any, size: int | None = None) -> Any:
        """Run it; returns at once.

        Parameters
        ----------
        *args : ndarray or scalar
            Of ``in_params``, then the arrays to write to, or none: new ones are made.
        size : int, optional
            Length of the loop, where all arrays are raw.

        Raises
        ------
        DTypeError, ShapeError
            These arguments are not what the parameters say.
        """
        given = len(args) == self.nargs
        if not given and len(args) != self.nin:
            raise ShapeError(
                f"{self.name} takes {self.nin} arguments, or {self.nargs} with its results, not "
                f"{len(args)}"
            )
        made = several("elementwise_kernel" + "_" * given, args, size=size, **self._params)
        results = args[self.nin :] if given else made
        if self._no_return:
            return None
        return tuple(results) if self._return_tuple or len(results) != 1 else results[0]


class ReductionKernel:
    """As ``cupy.ReductionKernel``: map, reduce and post-map expressions in CUDA C++.

    Parameters
    ----------
    in_params, out_params : str
        As of :class:`ElementwiseKernel`; one result.
    map_expr, reduce_expr, post_map_expr : str
        What is reduced, how two of them (``a`` and ``b``) become one, and what is made of the
        last (``a``).
    identity : str
        What the reduction starts with.
    reduce_dims : bool
        Taken and not needed.
    """

    def __init__(
        self,
        in_params: str,
        out_params: str,
        map_expr: str,
        reduce_expr: str,
        post_map_expr: str,
        identity: Any,
        name: str = "reduce_kernel",
        reduce_type: str | None = None,
        reduce_dims: bool = True,
        preamble: str = "",
        options: Sequence[str] = (),
    ) -> None:
        self.in_params = parse_parameters(in_params)
        self.out_params = parse_parameters(out_params)
        self.name = name
        self._params = {
            "in_params": in_params,
            "out_params": out_params,
            "map_expr": map_expr,
            "reduce_expr": reduce_expr,
            "post_map_expr": post_map_expr,
            "identity": str(identity),
            "name": name,
            "reduce_type": reduce_type,
            "preamble": preamble or None,
            "options": tuple(options) or None,
        }

    def __call__(
        self, *args: Any, out: Any = None, axis: Any = None, keepdims: bool = False
    ) -> Any:
        """Run it along ``axis`` (None: all axes); returns at once.

        Raises
        ------
        DTypeError, ShapeError
            These arguments are not what the parameters say.
        """
        if len(args) != len(self.in_params):
            raise ShapeError(f"{self.name} takes {len(self.in_params)} arguments, not {len(args)}")
        axes = tuple(axis) if isinstance(axis, list) else axis
        (result,) = several(
            "reduction_kernel", args, axis=axes, keepdims=bool(keepdims) or None, **self._params
        )
        return result if out is None else store(result, out)


def _lengths(value: int | Sequence[int]) -> tuple[int, int, int]:
    """Three lengths, those that are not given 1."""
    if isinstance(value, RemoteArray):
        raise DTypeError("the size of a launch has to be integers of this host")
    try:
        given = tuple(map(int, value)) if isinstance(value, Sequence) else (int(value),)
    except (TypeError, ValueError):
        raise DTypeError(f"the size of a launch has to be integers, not {value!r}") from None
    if not 1 <= len(given) <= 3:
        raise ShapeError(f"a launch of {len(given)} dimensions; it has one to three")
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z
