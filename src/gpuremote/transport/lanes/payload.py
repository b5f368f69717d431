"""A payload whose bytes come in pieces, in any order. Private."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Final

from gpuremote.errors import InternalError, ProtocolError
from gpuremote.transport._incoming import Payload, fitting
from gpuremote.transport.base import Incoming, Target

__all__ = ["Run", "SpreadPayload"]

MAX_RUNS: Final = 4096
"""Stretches of a payload that are known of at a time. Pieces side by side are one when they are
complete, so an honest sender needs a few for each lane."""
_IOV: Final = 256
_start = attrgetter("start")


class Run:
    """A stretch of a payload that has come up to ``at``, or is on its way from there to ``end``."""

    __slots__ = ("at", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = self.at = start
        self.end = end


class SpreadPayload(Payload):
    """A message whose regions come over several lanes.

    ``received`` counts the bytes from the beginning without a gap, as one goes on from there after
    a loss; ``left`` those that have not come.

    Parameters
    ----------
    number : int
        Of the payload.
    header, sizes, untouched
        As for ``Payload``.
    """

    __slots__ = ("_ends", "_runs", "_total", "number")

    def __init__(
        self,
        header: memoryview,
        sizes: tuple[int, ...],
        number: int,
        untouched: Callable[[], None],
    ) -> None:
        super().__init__(header, sizes, 0, untouched)
        self.number = number
        self._total = self.left
        self._runs: list[Run] = []  # disjoint, in order, none of them complete and at the front
        self._ends: list[int] = []

    def into(
        self, buffers: Sequence[Target], done: Callable[[Incoming], None] | None = None
    ) -> None:
        if self._placed:
            raise InternalError("where this payload goes was already said")
        views = fitting(self.sizes, buffers)
        self._ends = list(accumulate(view.nbytes for view in views))
        self._settle(views, done)

    def claim(self, offset: int, count: int) -> Run:
        """A piece begins to arrive.

        Raises
        ------
        ProtocolError
            It does not lie in the payload, or some of it has come already.
        """
        runs = self._runs
        run = Run(offset, offset + count)
        at = bisect_right(runs, offset, key=_start)
        overlaps = (
            offset < self.received
            or (at > 0 and runs[at - 1].end > offset)
            or (at < len(runs) and runs[at].start < run.end)
        )
        if run.end > self._total or overlaps or len(runs) >= MAX_RUNS:
            raise ProtocolError(
                f"{count} bytes at {offset} of payload {self.number}, which has {self._total} and "
                "does not lack those"
            )
        insort(runs, run, key=_start)
        return run

    def targets_of(self, run: Run) -> list[memoryview] | None:
        """Where what is missing of a run goes, or some of it; None if it is dropped."""
        views = self._views
        if views is None:
            return None
        found: list[memoryview] = []
        at, left = run.at, run.end - run.at
        index = bisect_right(self._ends, at)
        while left and len(found) < _IOV:
            view, end = views[index], self._ends[index]
            start = at - (end - view.nbytes)
            count = min(left, end - at)
            found.append(view[start : start + count])
            at += count
            left -= count
            index += 1
        return found

    def arrived(self, run: Run, count: int) -> None:
        """``count`` more bytes of a run are in place, or were dropped."""
        run.at += count
        with self._lock:
            self.left -= count
        runs = self._runs
        if run.at == run.end:
            self._join(runs.index(run))
        while runs and runs[0].start <= self.received:
            self.received = runs[0].at
            if runs[0].at < runs[0].end:
                break
            del runs[0]

    def _join(self, index: int) -> None:
        """Make one of a complete run and complete ones beside it."""
        runs = self._runs
        run = runs[index]
        after = runs[index + 1] if index + 1 < len(runs) else None
        if after is not None and after.start == run.end and after.at == after.end:
            run.end = run.at = after.end
            del runs[index + 1]
        if index and (before := runs[index - 1]).at == before.end == run.start:
            before.end = before.at = run.end
            del runs[index]
