"""NumPy and CuPy code on a remote device.

>>> import gpuremote.cupy as cp
>>> x = cp.arange(6).reshape(2, 3)  # doctest: +SKIP
>>> float((x * 2).sum())            # doctest: +SKIP
30.0

The names and arguments are those of NumPy 2 and CuPy 14; the namespace follows the array API
standard 2024.12. Arrays live on the server at ``GPUREMOTE_URL``, without that on one started on
this machine. Ops return at once; what waits is asking for a value, and functions whose result's
shape depends on values. See ``docs/cupy.md`` for what differs.
"""

from __future__ import annotations

import difflib as _difflib
from typing import Any as _Any

from gpuremote.cupy._names import NAMES as _NAMES

globals().update(_NAMES)
__all__ = list(_NAMES)


def __getattr__(name: str) -> _Any:
    """What is not here is refused by name, with those that are near it."""
    text = f"gpuremote.cupy has no {name!r}"
    reason = _NAMES["missing"]().get(name)
    near = _difflib.get_close_matches(name, _NAMES, 4)
    if reason:
        text += f": {reason}"
    if near:
        text += f"; near it are {', '.join(near)}"
    raise AttributeError(text)
