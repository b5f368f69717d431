"""The dtypes that may live on a device and travel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.errors import DTypeError

__all__ = ["DTYPES", "check_dtype"]

DTYPES: dict[str, np.dtype[Any]] = {
    np.dtype(name).str.lstrip("<|="): np.dtype(name)
    for name in (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    )
}
"""Every dtype that may travel, by its name on the wire (``"f4"``, ``"i8"``, ``"b1"``, ...)."""
_THEMSELVES = {dtype: dtype for dtype in DTYPES.values()}


def check_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The NumPy dtype in native byte order, if it is one that may travel.

    Raises
    ------
    DTypeError
        Object, string, datetime, structured or extended-precision dtype.
    """
    if isinstance(dtype, np.dtype) and dtype in _THEMSELVES:
        return _THEMSELVES[dtype]
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise DTypeError(f"{dtype!r} is not a dtype: {error}") from error
    native = DTYPES.get(found.str.lstrip("<>|="))
    if native is None or found.names is not None:
        raise DTypeError(
            f"dtype {found} can't live on a remote device; supported are "
            + ", ".join(str(d) for d in DTYPES.values())
        )
    return native
