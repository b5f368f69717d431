"""Backends over a namespace with NumPy's interface: NumPy itself, and CuPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gpuremote._speed import native
from gpuremote.backend.base import Backend, Compiled
from gpuremote.backend.kernels import MAKERS, Kernel, Maker
from gpuremote.backend.kernels_functions import by_path
from gpuremote.errors import GpuRemoteError, InternalError, LinearAlgebraError, UnsupportedOp
from gpuremote.ops.client_kernels import SPECS
from gpuremote.ops.meta import Meta
from gpuremote.ops.plan import Plan

__all__ = ["ArrayNamespaceBackend"]

CLIENT_KERNELS: Final = frozenset(spec.name for spec in SPECS)


def python_single(kernel: Kernel, _elementwise: bool, /) -> Compiled:
    """The function of a plan with one result, which its kernel gives. One that is elementwise takes
    ``out``, which may be an operand, for the part in C."""
    return lambda arguments: (kernel(*arguments),)


single = python_single
if not TYPE_CHECKING and native is not None:
    single = native.Single


class ArrayNamespaceBackend(Backend):
    """Runs plans with the functions of ``xp``.

    Parameters
    ----------
    xp : module
        The namespace.
    devices : int
        How many devices to offer; 0 leaves it to the backend.

    Attributes
    ----------
    exact : bool
        The namespace promotes exactly as the NumPy of this process does, with which the plan's
        results were inferred, so nothing has to be checked per call.
    makers : mapping
        How ops are done that are no function of the namespace.
    """

    exact = False
    makers: Mapping[str, Maker] = MAKERS

    def __init__(self, xp: Any, devices: int = 0) -> None:
        super().__init__(devices)
        self.xp = xp

    def compile(self, plan: Plan) -> Compiled:
        spec = plan.spec
        maker = by_path if spec.path else self.makers.get(spec.name)
        if maker is None:
            raise UnsupportedOp(self.lacking(spec.name), op=spec.name)
        try:
            kernel = maker(self.xp, plan)
        except AttributeError as error:
            raise UnsupportedOp(
                f"backend {self.name} lacks this op: {error}", op=spec.name
            ) from error
        if plan.inplace:
            return lambda arguments: kernel(*arguments)
        outputs = plan.outputs
        if outputs is None or not self.exact:
            return self._checked(plan, kernel)
        return self._trusted(plan, kernel, all(meta.ndim for meta in outputs))

    def lacking(self, op: str) -> str:
        """Why there is no such op here."""
        if op in CLIENT_KERNELS:
            return "kernels of programs run on servers with --backend cupy --allow-kernels"
        return f"backend {self.name} lacks this op"

    def _trusted(self, plan: Plan, kernel: Kernel, arrays: bool) -> Compiled:
        """The results are right; they only may be scalars where an array has no axes."""
        asarray = self.xp.asarray
        if plan.spec.n_out != 1:
            return lambda arguments: tuple(map(asarray, kernel(*arguments)))
        if arrays:
            ufunc: Any = kernel if isinstance(kernel, np.ufunc) else None
            return single(kernel, ufunc is not None and ufunc.signature is None)
        return lambda arguments: (asarray(kernel(*arguments)),)

    def _checked(self, plan: Plan, kernel: Kernel) -> Compiled:
        """Results of another dtype are cast; of another shape, they are a bug."""
        bounds, single = plan.bounds, plan.spec.n_out == 1
        known = plan.outputs is not None
        xp, name = self.xp, plan.spec.name

        def exactly(result: Any, meta: Meta) -> Any:
            array = xp.asarray(result)
            if array.dtype != meta.dtype:
                array = array.astype(meta.dtype)
            if known and array.shape != meta.shape:
                raise InternalError(
                    f"the result has shape {array.shape} instead of {meta.shape}", op=name
                )
            return array

        if single:
            return lambda arguments: (exactly(kernel(*arguments), bounds[0]),)
        return lambda arguments: tuple(map(exactly, kernel(*arguments), bounds))

    def translate_error(self, error: BaseException) -> GpuRemoteError:
        if isinstance(error, self.xp.linalg.LinAlgError):
            return LinearAlgebraError(str(error))
        return super().translate_error(error)
