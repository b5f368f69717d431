"""Where a program waits for its remote devices, and what that costs over a slower way."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from gpuremote.client.origin import caller
from gpuremote.torch import _homes

__all__ = ["Profile", "Wait", "profile"]


@dataclass
class Wait:
    """A line that waits.

    Attributes
    ----------
    place : str
        ``file:line``, of the innermost code that is neither torch's nor this package's.
    count : int
        How often.
    seconds : float
        How long in all.
    """

    place: str
    count: int = 0
    seconds: float = 0.0


@dataclass
class Profile:
    """What a stretch of a program did; made by :func:`profile`.

    Attributes
    ----------
    seconds : float
    ops, bytes_sent, bytes_received : int
    waits : list of Wait
        The longest first.
    round_trip : float
        Seconds, the shortest that was seen while it ran (0: it did not wait).
    """

    seconds: float = 0.0
    ops: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    waits: list[Wait] = field(default_factory=list)
    round_trip: float = 0.0

    def predict(self, delay: float, bandwidth: float = float("inf")) -> float:
        """Seconds that it would take over another way.

        Each wait takes ``delay`` in place of the round trip that was seen; beside that the bytes
        take their time, as far as it is not hidden behind the rest: they travel while ops are
        issued and run.

        Parameters
        ----------
        delay : float
            Round trip, in seconds.
        bandwidth : float
            Bytes per second, in the slower direction.
        """
        count = sum(wait.count for wait in self.waits)
        moved = max(self.bytes_sent, self.bytes_received) / bandwidth
        return max(self.seconds + count * max(0.0, delay - self.round_trip), moved)

    def __str__(self) -> str:
        count = sum(wait.count for wait in self.waits)
        waited = sum(wait.seconds for wait in self.waits)
        lines = [
            f"{self.seconds * 1e3:.1f} ms, {self.ops} ops, {self.bytes_sent} bytes sent, "
            f"{self.bytes_received} received",
            f"waited {count} times, {waited * 1e3:.1f} ms in all",
        ]
        lines += [f"  {w.count:6}  {w.seconds * 1e3:9.1f} ms  {w.place}" for w in self.waits]
        at = ", ".join(f"{self.predict(ms / 1e3) * 1e3:.0f} ms at {ms} ms" for ms in (1, 10, 30))
        return "\n".join([*lines, f"with another round trip: {at}"])


class profile:
    """A context that notes which lines wait for remote devices.

    >>> with gpuremote.torch.profile() as found:  # doctest: +SKIP
    ...     train_one_step()
    >>> print(found)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._found = Profile()
        self._lines: dict[str, Wait] = {}
        self._cores: list[Any] = []
        self._plain: list[tuple[Any, Callable[..., Any]]] = []
        self._shortest = float("inf")
        self._begin = 0.0
        self._before: list[Any] = []

    def __enter__(self) -> Profile:
        _homes.home(0)
        drivers: dict[Any, Any] = {home.core: home.session._driver for home in _homes.opened()}
        self._cores = list(drivers)
        for core, driver in drivers.items():
            plain = driver.wait
            timed = self._timed(plain)
            for place in (core, driver):
                self._plain.append((place, plain))
                place.wait = timed
        self._before = [core.snapshot() for core in self._cores]
        self._begin = time.perf_counter()
        return self._found

    def __exit__(self, *_: object) -> None:
        found = self._found
        found.seconds = time.perf_counter() - self._begin
        for place, plain in self._plain:
            place.wait = plain
        for core in self._cores:
            if core.dead is None:
                core.flush()
        for core, before in zip(self._cores, self._before, strict=True):
            after = core.snapshot()
            found.ops += after.ops - before.ops
            found.bytes_sent += after.bytes_sent - before.bytes_sent
            found.bytes_received += after.bytes_received - before.bytes_received
        found.waits = sorted(self._lines.values(), key=lambda wait: -wait.seconds)
        found.round_trip = 0.0 if self._shortest == float("inf") else self._shortest

    def _timed(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            try:
                return plain(*args, **keywords)
            finally:
                seconds = time.perf_counter() - begin
                place = _place(sys._getframe(1))
                line = self._lines.setdefault(place, Wait(place))
                line.count += 1
                line.seconds += seconds
                self._shortest = min(self._shortest, seconds)

        return wait


def _place(frame: FrameType) -> str:
    found: FrameType | None = caller(frame)
    while found is not None and "/torch/" in found.f_code.co_filename:
        found = found.f_back
    known = found or frame
    return f"{known.f_code.co_filename}:{known.f_lineno}"
