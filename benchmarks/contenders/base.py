"""What the suite asks of a contender."""

from __future__ import annotations

import abc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns as now
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from benchmarks.workloads import Kind

__all__ = [
    "ALL",
    "TRANSFERS",
    "Bytes",
    "Contender",
    "Ops",
    "Peer",
    "RelayProcess",
    "Setup",
    "end_with_parent",
    "now",
]

Bytes = npt.NDArray[np.uint8]

TRANSFERS: Final[frozenset[Kind]] = frozenset({"put", "get", "put_memory", "get_memory", "intact"})
ALL: Final[frozenset[Kind]] = TRANSFERS | {"round_trip", "ops"}
"""What a contender does that can move bytes."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a contender is told.

    Attributes
    ----------
    congestion : str
        TCP congestion control for those who can choose; "" keeps the system's.
    url, stamping_url : str
        Device servers for those who need one; the second with the backend that stamps.
    stamps : str
        Path of its stamps.
    option : str
        Which of several contenders one class is.
    """

    congestion: str = ""
    url: str = ""
    stamping_url: str = ""
    stamps: str = ""
    option: str = ""


@dataclass(frozen=True, slots=True)
class Ops:
    """What became of many small ops and one get.

    Attributes
    ----------
    issue, total : int
        Nanoseconds until the last op was issued; until the answer was there.
    cpu : int
        Nanoseconds of CPU time of the calling process until the last op was issued.
    round_trips : int
        Waits for an answer.
    counted : int or None
        Bytes on the wire by the contender's own counter, where it has one.
    """

    issue: int
    total: int
    cpu: int
    round_trips: int
    counted: int | None = None


class Contender(abc.ABC):
    """A way to move bytes between two processes. Lives in a process of its own.

    It takes its own times, in nanoseconds, so that nothing but the contender is in them. All
    move the same kind of memory: a put goes from an array that the caller keeps to memory on the
    other side, a get from there into an array that the caller keeps, and either is over when the
    caller knows that the bytes are in place. Pages that were never touched cost as much as the
    transfer (and where a host has to find them, several times as much), so the other side may
    receive into memory that it has had before; those without a protocol always do.

    Parameters
    ----------
    setup : Setup
    """

    kinds: ClassVar[frozenset[Kind]] = ALL
    restless: ClassVar[bool] = False
    """It polls while it has nothing to do, and is stopped while others are measured."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.handed: list[int] = []
        """Nanoseconds until each get had handed out memory of the library's own, where it can't
        fill the caller's: all of the get but the copy into the caller's array."""

    @abc.abstractmethod
    def open(self) -> None:
        """Start the other side and connect."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the other side."""

    @property
    @abc.abstractmethod
    def peer(self) -> int | None:
        """Process that does the work on the other side."""

    @property
    def processes(self) -> list[int]:
        """Every process that moves the bytes: here, on the other side, and between them."""
        return [os.getpid(), *([] if self.peer is None else [self.peer])]

    def move_to(self, distance: int) -> None:
        """Use the emulated way of this round trip (milliseconds) from now on."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Choices of its own that belong into the results."""
        return {}

    @abc.abstractmethod
    def round_trips(self, size: int, count: int) -> list[int]:
        """Ask for ``size`` bytes and get them, again and again."""

    def rested_round_trips(self, size: int, count: int, rest: float) -> list[int]:
        """The same, after ``rest`` seconds of sleep each."""
        raise NotImplementedError

    def echoes(self, size: int, count: int) -> list[int]:
        """Bring ``size`` bytes there and back, where that is not what a round trip does."""
        return self.round_trips(size, count)

    def puts(self, source: Bytes, count: int) -> list[int]:
        """Bring ``source`` to the other side, which keeps it."""
        raise NotImplementedError

    def gets(self, out: Bytes, count: int) -> list[int]:
        """Fill ``out`` from what the last put brought."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what the last put brought."""
        raise NotImplementedError

    def ops(self, size: int, count: int) -> Ops:
        """Issue ``count`` small ops (messages of ``size`` bytes to those who know no ops) one by
        one, then wait for one answer."""
        raise NotImplementedError

    def first_ops(self, count: int, burn: int) -> list[int]:
        """Time from an op's call to its execution, with a caller that goes on for ``burn``
        nanoseconds without waiting for anything."""
        raise NotImplementedError


class _Child:
    """A process that says on which port it listens, and ends with this one."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            self.close()
            raise RuntimeError(f"{module} {' '.join(arguments)} did not start")
        self.port = int(said)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End it: it watches its standard input."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Peer(_Child):
    """The other side of a contender that has no server of its own.

    Runs ``serve(congestion, ready)`` of the contender's module.
    """

    def __init__(self, module: str, congestion: str) -> None:
        super().__init__("benchmarks.peer", module, "--congestion", congestion)


class RelayProcess(_Child):
    """An emulated way of ``distance`` milliseconds of round trip to a port of this host."""

    def __init__(self, target: int, distance: int) -> None:
        super().__init__("benchmarks.relay", str(target), "--rtt-ms", str(distance))


def end_with_parent(on_end: Callable[[], object] = lambda: os._exit(0)) -> None:
    """Watch standard input in a thread; its end is the end of this process."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        on_end()

    threading.Thread(target=watch, name="benchmarks-lifeline", daemon=True).start()
