"""Which transports this side offers, and the explanation of what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuremote.errors import TransportUnavailable
from gpuremote.transport.base import Connection
from gpuremote.transport.select import NOT_OFFERED, PREFERENCE, TCP, probe

__all__ = ["TCP", "Explanation", "offers"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ``session.transport.explain()`` tells.

    Attributes
    ----------
    chosen : str
        Transport in use.
    reason : str
        Why that one, and how its path was set up.
    candidates : tuple of dict
        Every transport that was looked at: ``name``, ``available``, ``reason``.
    connection : dict
        Addresses and choices of the present connection.
    """

    chosen: str = ""
    reason: str = ""
    candidates: tuple[dict[str, Any], ...] = ()
    connection: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, choice: dict[str, Any], connection: Connection, failures: Mapping[str, str]
    ) -> Explanation:
        """Of a connection that is up.

        Parameters
        ----------
        choice : dict
            The server's.
        failures : mapping of str to str
            Transports that this side can't use at present, or that were tried in vain: why.
        """
        candidates = []
        for candidate in choice.get("candidates", ()):
            if not isinstance(candidate, dict):
                continue
            name = str(candidate.get("name"))
            here = failures.get(name)
            # What the server says first counts: without it there this side's finding is moot.
            if here is not None and str(candidate.get("reason")) in ("", NOT_OFFERED):
                candidate = {**candidate, "available": False, "reason": f"client: {here}"}
            elif here is not None and candidate.get("available"):
                candidate = {**candidate, "available": False, "reason": here}
            candidates.append(candidate)
        why = f"the best that both sides have ({' > '.join(PREFERENCE)})"
        return cls(
            connection.name,
            f"{why}; {connection.reason}".strip("; "),
            tuple(candidates),
            dict(connection.describe()),
        )

    def reasons(self) -> dict[str, str]:
        """Reason of each candidate, by name."""
        return {str(c.get("name")): str(c.get("reason", "")) for c in self.candidates}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {
            "chosen": self.chosen,
            "reason": self.reason,
            "candidates": [dict(c) for c in self.candidates],
            "connection": dict(self.connection),
        }

    def __str__(self) -> str:
        lines = [f"transport: {self.chosen} ({self.reason})"]
        for candidate in self.candidates:
            mark = "yes" if candidate.get("available") else "no"
            lines.append(f"  {candidate.get('name')}: {mark}, {candidate.get('reason')}")
        return "\n".join(lines)


def offers(wanted: str | None, resting: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What this side can use, restricted to what the program wants, and what it can't: each by
    name, with the finding.

    Parameters
    ----------
    wanted : str or None
        The only one that the program takes.
    resting : mapping of str to str
        Those that failed lately and are left alone for now, with the reason.

    Raises
    ------
    TransportUnavailable
        The one that is wanted can't be had on this side.
    """
    candidates = probe()
    if wanted is None:
        usable = {c.name: c.reason for c in candidates if c.available and c.name not in resting}
        unusable = {c.name: c.reason for c in candidates if not c.available} | dict(resting)
        return usable, unusable
    for candidate in candidates:
        if candidate.name == wanted and candidate.available:
            others = (c.name for c in candidates if c.name != wanted)
            return {wanted: candidate.reason}, dict.fromkeys(others, f"only {wanted} is wanted")
    raise TransportUnavailable(
        f"transport {wanted!r} can't be had on this machine",
        reasons={c.name: c.reason for c in candidates},
    )
