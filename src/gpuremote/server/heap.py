"""How much of what is freed the C library keeps for the next results of a worker.

Results come and go with every op. What is given back to the system has to be asked for again, and
is cleared page by page, which takes a tenth of a step of GPT-2 on a processor. So a worker keeps
more than a program would, and gives it back when no op comes for a while. glibc is told
(``mallopt``, ``malloc_trim``); elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

__all__ = ["ENVIRONMENT", "give_back", "keep"]

MiB: Final = 1 << 20
_TRIM, _MAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""
LEAST: Final = {_TRIM: 32 * MiB, _MAP: 16 * MiB}
MOST: Final = {_TRIM: 2047 * MiB, _MAP: 192 * MiB}
"""An int in bytes is what mallopt takes. Older C libraries refuse to take more than 32 MiB for the
second."""
PART: Final = {_TRIM: 4, _MAP: 64}
"""Of a session's memory. Larger blocks than its 64th are mapped each by itself, as what lies
between others when it is freed stays until the worker is idle."""

_NAMES: Final = {_TRIM: "MALLOC_TRIM_THRESHOLD_", _MAP: "MALLOC_MMAP_THRESHOLD_"}
ENVIRONMENT: Final = {_NAMES[name]: str(nbytes) for name, nbytes in LEAST.items()}
"""Of a process whose session's memory is not known yet."""

_libc: Final[Any] = ctypes.CDLL(None)


def keep(limit: int) -> None:
    """Keep what a session of so many bytes frees, unless the environment says otherwise."""
    for name, told in _NAMES.items():
        nbytes = min(MOST[name], max(LEAST[name], limit // PART[name]))
        if os.environ.get(told) != ENVIRONMENT[told] or not hasattr(_libc, "mallopt"):
            continue
        if not _libc.mallopt(name, nbytes):
            _libc.mallopt(name, min(nbytes, 32 * MiB))


def give_back() -> None:
    """Give the system what is free. Takes up to some 0.1 s for each GiB."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
