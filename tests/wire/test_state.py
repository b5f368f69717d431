"""The session's state table."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuremote.errors import ProtocolError
from gpuremote.wire.state import TRANSITIONS, SessionState, State, Stimulus, diagram


def test_a_session_with_one_loss() -> None:
    state = SessionState()
    for stimulus in (
        Stimulus.WELCOME,
        Stimulus.CONNECTION_LOST,
        Stimulus.RESUMED,
        Stimulus.GOODBYE,
        Stimulus.DONE,
    ):
        assert not state.over
        state.advance(stimulus)
    assert state.value is State.CLOSED
    assert state.over


def test_what_the_table_does_not_have_is_refused() -> None:
    for state in State:
        for stimulus in Stimulus:
            if (state, stimulus) in TRANSITIONS:
                continue
            session = SessionState()
            session.value = state
            with pytest.raises(ProtocolError, match="can't happen"):
                session.advance(stimulus)
            assert session.value is state


def test_every_state_is_reached_and_ends_somewhere() -> None:
    reached = {State.NEW}
    while True:
        more = reached | {after for (before, _), after in TRANSITIONS.items() if before in reached}
        if more == reached:
            break
        reached = more
    assert reached == set(State)
    over = {State.CLOSED, State.DEAD}
    assert not any(before in over for before, _ in TRANSITIONS)


def test_the_diagram_in_the_docs_is_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    assert diagram() in page
