"""How long a transport that broke is left alone."""

from __future__ import annotations

import pytest

from gpuremote import _clock
from gpuremote.rpc.cooldown import FIRST, LASTING, LONGEST, Cooldowns


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock stands still; the test moves it."""
    now = [1000.0]
    monkeypatch.setattr(_clock, "now", lambda: now[0])
    return now


def test_nothing_was_lost(time: list[float]) -> None:
    cooldowns = Cooldowns()
    cooldowns.used("rdma")
    assert cooldowns.due() is None
    assert cooldowns.resting() == {}


def test_the_pause_doubles_up_to_a_limit(time: list[float]) -> None:
    """So that a bad cable does not take a session down every second."""
    cooldowns = Cooldowns()
    pauses = []
    for _ in range(12):
        cooldowns.used("rdma")
        cooldowns.failed("rdma", "the link is down")
        due = cooldowns.due()
        assert due is not None
        pauses.append(due - time[0])
        assert "the link is down" in cooldowns.resting()["rdma"]
        time[0] = due
        assert cooldowns.resting() == {}
        assert cooldowns.reasons == {"rdma": "the link is down"}
    assert pauses[:4] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert pauses[-1] == LONGEST


def test_one_that_worked_for_long_begins_anew(time: list[float]) -> None:
    cooldowns = Cooldowns()
    for _ in range(3):
        cooldowns.failed("rdma", "")
    cooldowns.used("rdma")
    assert cooldowns.reasons == {}
    time[0] += LASTING + 1
    cooldowns.failed("rdma", "")
    assert cooldowns.due() == time[0] + FIRST
