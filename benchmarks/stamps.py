"""A backend that leaves a time stamp when it executes an addition.

It is how the suite knows when an op has reached the server: the stamp is taken in the worker,
after the op was received, decoded and dispatched, by CLOCK_MONOTONIC, which all processes of a
host share. Whoever is in time by this stamp has reached the server earlier still.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

from gpuremote.backend.base import Compiled
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.ops.plan import Plan

__all__ = ["StampingBackend", "Stamps", "stamping"]

_VARIABLE: Final = "GPUREMOTE_BENCHMARKS_STAMPS"
_STAMP: Final = struct.Struct("<QQ")
_ROOT: Final = Path(__file__).parent.parent


class StampingBackend(NumpyBackend):
    """NumPy, with stamps."""

    name = "stamps"

    def __init__(self, devices: int = 0) -> None:
        super().__init__(devices)
        with open(os.environ[_VARIABLE], "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _STAMP.size)

    def compile(self, plan: Plan) -> Compiled:
        run = super().compile(plan)
        if plan.spec.name != "add":
            return run

        def stamped(arguments: Sequence[Any]) -> Sequence[Any] | None:
            now = perf_counter_ns()
            # Every session's worker counts in the same place; they never work at the same time.
            count, _ = _STAMP.unpack_from(self._shared)
            _STAMP.pack_into(self._shared, 0, count + 1, now)
            return run(arguments)

        return stamped


@contextlib.contextmanager
def stamping() -> Iterator[Path]:
    """Servers that are started within know the backend ``stamps``; gives the file of the stamps.

    Known by an entry point, as anybody's backend is: a folder with the metadata of a
    distribution goes to the front of their path.
    """
    with tempfile.TemporaryDirectory(prefix="gpuremote-benchmarks-") as name:
        folder = Path(name)
        facts = folder / "gpuremote_benchmarks-1.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: gpuremote-benchmarks\nVersion: 1\n"
        )
        (facts / "entry_points.txt").write_text(
            "[gpuremote.backends]\nstamps = benchmarks.stamps:StampingBackend\n"
        )
        shared = folder / "stamps"
        shared.write_bytes(bytes(_STAMP.size))
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([name, str(_ROOT), *filter(None, [inherited])])
        os.environ[_VARIABLE] = str(shared)
        try:
            yield shared
        finally:
            del os.environ[_VARIABLE], os.environ["PYTHONPATH"]
            if inherited is not None:
                os.environ["PYTHONPATH"] = inherited


class Stamps:
    """The last stamp, seen from the client.

    Parameters
    ----------
    path : str
        The file of :func:`stamping`.
    """

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _STAMP.size)

    def last(self) -> tuple[int, int]:
        """How many there were, and the time of the last one."""
        count, stamp = _STAMP.unpack_from(self._shared)
        return count, stamp

    def close(self) -> None:
        self._shared.close()
