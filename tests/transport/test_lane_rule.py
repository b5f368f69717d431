"""How many lanes a way gets, and when compression pays: rules that are fed with figures."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from gpuremote.transport.lanes import compression
from gpuremote.transport.lanes.compression import Rule, agree, wanted_codecs
from gpuremote.transport.lanes.rule import (
    MAX_LANES,
    Way,
    bandwidth_of,
    kernel_limit,
    lanes_for,
    window_between,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    ("way", "lanes"),
    [
        (Way(0.0002, 1e9, 4 * MIB), 1),
        (Way(0.0049, 100e9, 4 * MIB), 1),
        (Way(0.15, 125e6, 4 * MIB), 9),
        (Way(0.15, None, 4 * MIB), 9),
        (Way(0.15, 125e6, 0), 9),
        (Way(0.03, 125e6, 4 * MIB), 2),
        (Way(0.03, 1e6, 4 * MIB), 1),
        (Way(0.15, 125e6, 16 * MIB), 3),
        (Way(0.15, 125e6, 64 << 10), MAX_LANES),
        (Way(0.3, 5e9, 4 * MIB), MAX_LANES),
    ],
    ids=str,
)
def test_lanes_for_a_way(way: Way, lanes: int) -> None:
    assert lanes_for(way) == lanes


def test_windows() -> None:
    assert window_between(4 * MIB, 6 * MIB) == 3 * MIB
    assert window_between(4 * MIB, 32 * MIB) == 4 * MIB
    assert window_between(0, 32 * MIB) == 16 * MIB
    assert window_between(0, 0) == 0


def test_what_the_kernel_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise OSError("no such file")

    assert kernel_limit("tcp_wmem") >= 0
    monkeypatch.setattr(Path, "read_text", fails)
    assert kernel_limit("tcp_wmem") == 0


def arrivals(rate: float, sizes: list[int], begin: float = 0.0) -> list[tuple[float, int]]:
    found, at = [], begin
    for size in sizes:
        at += size / rate
        found.append((at, size))
    return found


def test_a_burst_at_full_speed() -> None:
    found = bandwidth_of(arrivals(125e6, [60 << 10] * 17), 0.15)
    assert found is not None
    assert math.isclose(found, 125e6)


def test_a_burst_that_waits_for_acknowledgements() -> None:
    # 2, 4, 8 and then 16 parts to a round trip, as a connection gets up to speed.
    said: list[tuple[float, int]] = []
    for number, count in enumerate((2, 4, 8, 16)):
        said += arrivals(50e6, [20 << 10] * count, begin=0.1 * number)
    found = bandwidth_of(said, 0.1)
    assert found is not None
    assert math.isclose(found, 50e6)


def test_bytes_that_come_in_lumps() -> None:
    said = [(0.01 * (n // 2) + 1e-5 * (n % 2), 60 << 10) for n in range(16)]
    found = bandwidth_of(said, 0.03)
    assert found is not None
    assert 10e6 < found < 14e6
    # One lump, that is all.
    found = bandwidth_of([(1.0, 60_000), (1.00001, 60_000)], 0.03)
    assert found is not None
    assert found <= 30e6


@pytest.mark.parametrize(
    "said", [[], [(1.0, 100_000)], [(1.0, 60_000)] * 17, [(n * 1.0, 60_000) for n in range(9)]]
)
def test_a_burst_that_says_nothing(said: list[tuple[float, int]]) -> None:
    assert bandwidth_of(said, 0.1) is None


# -- compression ----------------------------------------------------------------------------------


def fed(rate: float, seconds_per_byte: float, ratio: float) -> Rule:
    rule = Rule(rate=rate)
    assert rule.try_next()  # a sample
    raw = MIB
    rule.compressed(raw, int(ratio * raw), seconds_per_byte * raw)
    return rule


@pytest.mark.parametrize(
    ("rate", "seconds_per_byte", "ratio", "worth_it"),
    [
        (10e6, 1 / 400e6, 0.3, True),  # a slow way
        (10e6, 1 / 400e6, 0.95, False),  # that gains nothing
        (10e6, 1 / 10.5e6, 0.1, False),  # a compressor that is no faster
        (350e6, 1 / 400e6, 0.1, True),
        (390e6, 1 / 400e6, 0.1, False),  # a fast way
        (3e9, 1 / 400e6, 0.01, False),
    ],
)
def test_when_it_pays(rate: float, seconds_per_byte: float, ratio: float, worth_it: bool) -> None:
    rule = fed(rate, seconds_per_byte, ratio)
    assert rule.worth_it is worth_it
    assert rule.try_next() is worth_it


def test_a_way_that_is_never_waited_for_costs_nothing() -> None:
    rule = Rule()
    assert not any(rule.try_next() for _ in range(10_000))
    rule.sent(MIB, 0.1)
    assert rule.try_next()


def test_samples_get_rare_where_they_are_of_no_use() -> None:
    rule = fed(1e9, 1 / 400e6, 0.9)
    found = []
    for number in range(5000):
        if rule.try_next():
            found.append(number)
            rule.compressed(MIB, MIB, MIB / 400e6)
    gaps = [after - before for before, after in itertools.pairwise(found)]
    assert gaps[0] < gaps[-1] == 8 * Rule.SAMPLE


def test_the_rule_follows_what_changes() -> None:
    rule = fed(10e6, 1 / 400e6, 0.3)
    assert rule.try_next()
    for _ in range(30):
        rule.sent(100 * MIB, 0.05)
    assert not rule.try_next()
    for _ in range(30):
        rule.sent(MIB, 0.1)
    assert rule.try_next()
    for _ in range(30):
        rule.compressed(MIB, MIB, MIB / 400e6)
    assert not rule.try_next()


def test_it_can_be_asked_for() -> None:
    rule = Rule(always=True)
    rule.compressed(MIB, MIB, 10.0)
    assert rule.try_next()


def test_libraries_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_codecs("auto") == (["zstd", "lz4"], "")
    assert wanted_codecs("lz4") == (["lz4"], "")
    assert wanted_codecs("off")[0] == []
    monkeypatch.setattr(compression, "available", lambda name: name == "lz4")
    assert wanted_codecs("auto") == (["lz4"], "")
    names, why = wanted_codecs("zstd")
    assert names == []
    assert "zstandard is not installed here" in why
    assert agree(["zstd", "lz4"], ["lz4"]) == ("lz4", "")
    name, why = agree(["zstd"], ["lz4"])
    assert name == ""
    assert "zstandard is not installed at the server" in why


def test_a_library_that_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compression._MODULES, "zstd", "gpuremote_no_such_module")
    assert not compression.available("zstd")
    assert compression.available("lz4")
