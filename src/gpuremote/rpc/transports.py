"""Which transports this side offers, and the explanation of what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpuremote.errors import TransportUnavailable
from gpuremote.transport.base import Connection
from gpuremote.transport.select import probe

__all__ = ["Explanation", "offers"]


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
    def of(cls, choice: dict[str, Any], connection: Connection) -> Explanation:
        candidates = tuple(c for c in choice.get("candidates", ()) if isinstance(c, dict))
        return cls(
            str(choice.get("chosen", connection.name)),
            f"{choice.get('reason', '')}; {connection.reason}".strip("; "),
            candidates,
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


def offers(transport: str | None, require: str | None) -> dict[str, str]:
    """What this side can do, restricted to what the program wants; by name, with the finding.

    Raises
    ------
    TransportUnavailable
        The one that is wanted can't be had on this side.
    """
    candidates = probe()
    wanted = require or transport
    if wanted is None:
        return {c.name: c.reason for c in candidates if c.available}
    for candidate in candidates:
        if candidate.name == wanted and candidate.available:
            return {candidate.name: candidate.reason}
    raise TransportUnavailable(
        f"transport {wanted!r} can't be had on this machine",
        reasons={c.name: c.reason for c in candidates},
    )
