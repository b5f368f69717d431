"""The part in C, where it was built: see ``native/native.h``.

``GPUREMOTE_NATIVE=0`` leaves it out. Everything works without it; a call that waits for a few
bytes takes longer then.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["NATIVE", "native"]

native: Any = None
"""The module, or None."""
NATIVE: str
"""Whether it is used, and why not, for people."""

if os.environ.get("GPUREMOTE_NATIVE", "1") == "0":
    NATIVE = "switched off by GPUREMOTE_NATIVE=0"
elif sys.byteorder != "little":
    NATIVE = "not for big-endian machines"
else:
    try:
        native = importlib.import_module("gpuremote._native")
    except ImportError as error:
        NATIVE = f"not built (that takes a C compiler and Python's headers): {error}"
    else:
        NATIVE = "used"
