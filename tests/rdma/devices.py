"""Whether this machine has RDMA devices, and which kind."""

from __future__ import annotations

import os
from pathlib import Path

MACHINE = "GPUREMOTE_RDMA_MACHINE"
"""Set in the machine that ``machine.py`` makes: there its links may be taken down."""


def in_machine() -> bool:
    return MACHINE in os.environ


def why_not() -> str:
    """Why the tests in this folder can't run here; empty if they can."""
    if in_machine() or any(Path("/dev/infiniband").glob("uverbs*")):
        return ""
    return "no device in /dev/infiniband; `make test-rdma` makes a machine that has one"
