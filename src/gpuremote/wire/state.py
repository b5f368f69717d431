"""The life of a session, as a table. Everything that affects it is here.

Client and server run the same table: this file does not know which role it plays. The
diagram in ``docs/protocol.md`` is :func:`diagram`'s output, which a test checks.
"""

from __future__ import annotations

import enum
from typing import Final

from gpuremote.errors import ProtocolError

__all__ = ["TRANSITIONS", "SessionState", "State", "Stimulus", "diagram"]


class State(enum.Enum):
    """Where a session is."""

    NEW = "new"
    """Nothing was exchanged."""
    OPEN = "open"
    """A connection carries messages."""
    LOST = "lost"
    """The connection broke; both ends keep everything for the grace period."""
    CLOSING = "closing"
    """One end has said goodbye; what is on its way still arrives."""
    CLOSED = "closed"
    """Over, by agreement. Nothing is kept."""
    DEAD = "dead"
    """Over without agreement. Pending work failed with the reason."""


class Stimulus(enum.Enum):
    """What can happen to a session."""

    WELCOME = "welcome"
    """The handshake of a new session was completed."""
    REFUSED = "refused"
    """The server does not take the session, or no longer knows it."""
    CONNECTION_LOST = "connection lost"
    RESUMED = "resumed"
    """A new connection carries the session on."""
    GRACE_OVER = "grace period over"
    GOODBYE = "goodbye"
    """Sent or received."""
    WORKER_DIED = "worker died"
    DONE = "everything delivered"


_S, _I = State, Stimulus
TRANSITIONS: Final[dict[tuple[State, Stimulus], State]] = {
    (_S.NEW, _I.WELCOME): _S.OPEN,
    (_S.NEW, _I.REFUSED): _S.DEAD,
    (_S.NEW, _I.CONNECTION_LOST): _S.DEAD,
    (_S.OPEN, _I.CONNECTION_LOST): _S.LOST,
    (_S.OPEN, _I.GOODBYE): _S.CLOSING,
    (_S.OPEN, _I.WORKER_DIED): _S.DEAD,
    # A server may learn of the new connection before it notices that the old one is gone.
    (_S.OPEN, _I.RESUMED): _S.OPEN,
    (_S.LOST, _I.RESUMED): _S.OPEN,
    (_S.LOST, _I.REFUSED): _S.DEAD,
    (_S.LOST, _I.GRACE_OVER): _S.DEAD,
    (_S.LOST, _I.WORKER_DIED): _S.DEAD,
    (_S.LOST, _I.GOODBYE): _S.CLOSED,
    (_S.CLOSING, _I.DONE): _S.CLOSED,
    (_S.CLOSING, _I.CONNECTION_LOST): _S.CLOSED,
    (_S.CLOSING, _I.GOODBYE): _S.CLOSED,
    (_S.CLOSING, _I.WORKER_DIED): _S.CLOSED,
}


class SessionState:
    """One session's place in the table.

    Attributes
    ----------
    value : State
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = State.NEW

    def advance(self, stimulus: Stimulus) -> State:
        """Move on.

        Raises
        ------
        ProtocolError
            The table has no such transition.
        """
        following = TRANSITIONS.get((self.value, stimulus))
        if following is None:
            raise ProtocolError(
                f"'{stimulus.value}' can't happen to a session that is {self.value.value}"
            )
        self.value = following
        return following

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.value in (State.CLOSED, State.DEAD)

    def __repr__(self) -> str:
        return f"SessionState({self.value.value})"


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> new"]
    lines += [
        f"    {before.value} --> {after.value}: {stimulus.value}"
        for (before, stimulus), after in TRANSITIONS.items()
    ]
    lines += [f"    {state.value} --> [*]" for state in (State.CLOSED, State.DEAD)]
    return "\n".join(lines)
