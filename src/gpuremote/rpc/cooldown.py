"""Transports that failed in the middle of a session, and when to try them again."""

from __future__ import annotations

from typing import Final

from gpuremote import _clock

__all__ = ["Cooldowns"]

FIRST: Final = 1.0
"""Seconds until a transport that broke is tried again."""
LONGEST: Final = 300.0
"""The pause doubles up to this, so that a bad cable does not take a session down every second."""
LASTING: Final = 60.0
"""Seconds in use after which the next failure counts as a first one."""


class Cooldowns:
    """What a session knows of the transports that it lost."""

    def __init__(self) -> None:
        self._pauses: dict[str, float] = {}
        self._until: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._since: dict[str, float] = {}

    def used(self, name: str) -> None:
        """It is in use now."""
        self._until.pop(name, None)
        self._reasons.pop(name, None)
        self._since[name] = _clock.now()

    def failed(self, name: str, reason: str) -> None:
        """It broke, or could not be brought up again."""
        now = _clock.now()
        since = self._since.pop(name, None)
        if since is not None and now - since > LASTING:
            self._pauses.pop(name, None)
        pause = self._pauses[name] = min(2 * self._pauses.get(name, FIRST / 2), LONGEST)
        self._until[name] = now + pause
        self._reasons[name] = reason

    def resting(self) -> dict[str, str]:
        """Those to leave alone for now, with the reason."""
        now = _clock.now()
        return {
            name: f"{self._reasons[name]}; left alone for {until - now:.0f} s more"
            for name, until in self._until.items()
            if until > now
        }

    @property
    def reasons(self) -> dict[str, str]:
        """Why each one that is not in use was lost."""
        return dict(self._reasons)

    def due(self) -> float | None:
        """When to try again, on ``_clock.now()``; None: nothing was lost."""
        return min(self._until.values(), default=None)
