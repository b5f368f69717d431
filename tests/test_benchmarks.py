"""The benchmarks run, measure what they say, and keep what does not depend on the clock."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.check import REQUIREMENTS, Requirement, judge
from benchmarks.contenders import CONTENDERS, Entry
from benchmarks.suite import SCHEMA
from benchmarks.workloads import FULL, QUICK, UNITS

ROOT = Path(__file__).parent.parent
OURS = ("gpuremote", "gpuremote-uvloop", "gpuremote-asyncio")
MOVING = (*OURS, "sockets", "streams", "pyzmq")
"""Contenders that move bytes between processes."""

Results = dict[str, Any]

pytestmark = pytest.mark.timeout(180)  # the quick run, on a machine that does other things as well


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run has written."""
    folder = tmp_path_factory.mktemp("results")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert "100% done" in done.stderr
    assert "what must hold" in done.stdout
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    found: Results = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture(scope="module")
def measured(results: Results) -> dict[tuple[str, str, str], float]:
    """Medians by workload, contender and metric."""
    return {
        (m["workload"], m["contender"], m["metric"]): m["median"] for m in results["measurements"]
    }


def test_everyone_takes_part(results: Results, measured: dict[tuple[str, str, str], float]) -> None:
    assert {c["name"]: c["left_out"] for c in results["contenders"]} == {
        name: entry.missing() for name, entry in CONTENDERS.items()
    }
    here = {c["name"] for c in results["contenders"] if not c["left_out"]}
    assert {*OURS, "sockets", "streams", "memcpy"} <= here
    cores = results["machine"]["cpus"]
    for workload in QUICK:
        if workload.layout == "two" and cores < 2:
            continue
        took_part = {name for found, name, _ in measured if found == workload.name}
        assert took_part, workload.name
        if workload.kind in ("put", "get", "put_memory", "get_memory", "ops"):
            assert took_part == here - {"uvloop-echo", "uvloop-callbacks"}, workload.name
        elif workload.kind == "round_trip":
            assert took_part == here, workload.name


def test_the_layout_of_the_results(results: Results) -> None:
    assert results["schema"] == SCHEMA
    assert {
        "cpus",
        "processor",
        "memory_gib",
        "kernel",
        "python",
        "packages",
        "load_average",
        "huge_pages",
        "congestion",
    } == set(results["machine"])
    assert results["machine"]["congestion"]["sockets"] in (
        results["machine"]["congestion"]["allowed"] or [""]
    )
    for measurement in results["measurements"]:
        values = measurement["values"]
        assert len(values) == results["rounds"] == 1
        assert measurement["unit"] == UNITS[measurement["metric"]]
        assert measurement["low"] <= measurement["median"] <= measurement["high"]
    for name in OURS:
        facts = next(c["facts"] for c in results["contenders"] if c["name"] == name)
        assert facts["transport"] == "tcp"
        assert "congestion control" in facts["reason"]


def test_the_results_do_not_say_where_they_were_made(folder: Path) -> None:
    for name in ("results.json", "results.txt", "results.svg"):
        text = (folder / name).read_text()
        for private in (str(ROOT), str(Path.home()) + "/", str(folder), socket.gethostname()):
            # A host may be called "linux".
            assert len(private) < 6 or private not in text, f"{name} names {private}"


def test_the_files_can_be_read(folder: Path) -> None:
    assert ET.parse(folder / "results.svg").getroot().tag.endswith("svg")
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "what must hold" in (folder / "results.txt").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20


@pytest.mark.parametrize("name", OURS)
def test_ten_thousand_ops_are_one_round_trip(
    name: str, results: Results, measured: dict[tuple[str, str, str], float]
) -> None:
    if results["machine"]["cpus"] < 2:
        return  # this one is measured on two cores only
    assert measured["ops/64B/two", name, "round_trips"] == 1
    wire = measured["ops/64B/two", name, "wire_bytes_per_op"]
    assert 0 < wire <= 64
    # What the kernel counted holds what this library says of itself, and hardly more.
    counted = measured["ops/64B/two", name, "counted_bytes_per_op"]
    assert counted <= wire < 1.1 * counted + 1


@pytest.mark.parametrize("name", MOVING)
def test_nothing_travels_twice(name: str, measured: dict[tuple[str, str, str], float]) -> None:
    for kind in ("put", "get"):
        wire = measured.get((f"{kind}/8MiB", name, "wire_bytes_per_byte"))
        if wire is not None:
            assert 1 <= wire < 1.01


@pytest.mark.parametrize("name", OURS)
def test_no_side_holds_a_payload_twice(
    name: str, measured: dict[tuple[str, str, str], float]
) -> None:
    for kind in ("put", "get"):
        for side in ("client", "peer"):
            assert measured[f"{kind}_memory/8MiB", name, f"{side}_mib"] < 8 + 7


def test_a_missing_package_is_named() -> None:
    entry = Entry("x", "X", "memcpy", "Memcpy", "no_such_package")
    assert "no_such_package" in entry.missing()


def synthetic(value: Callable[[Requirement], float]) -> Results:
    """Results in which every requirement has the figure ``value`` and divides by 1."""
    found = {}
    for requirement in REQUIREMENTS:
        if requirement.by is not None:
            found[requirement.by] = 1.0
    for requirement in REQUIREMENTS:
        found[requirement.of] = value(requirement)
    return {
        "measurements": [
            {"workload": w, "contender": c, "metric": m, "values": [v, v]}
            for (w, c, m), v in found.items()
        ]
    }


def test_limits_are_kept_or_not() -> None:
    binding = [r for r in REQUIREMENTS if r.binding]
    assert {r.number for r in binding} == {2, 3, 4}
    names = {workload.name for workload in FULL}
    for requirement in REQUIREMENTS:
        assert requirement.of[0] in names
        assert requirement.by is None or requirement.by[0] in names
    assert {v.found for v in judge(synthetic(lambda r: r.limit)) if v.requirement.binding} == {
        "PASS"
    }
    worse = judge(synthetic(lambda r: r.limit * (1.01 if r.sense == "<=" else 0.99)))
    assert {v.found for v in worse if v.requirement.binding} == {"FAIL"}
    assert {v.found for v in judge({"measurements": []})} == {"not measured"}


def test_a_limit_that_is_not_kept_ends_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A quick run measures too little for the limits: that is not a pass.
    stored = str(folder / "results.json")
    assert main(["--from", stored]) == 0
    assert main(["--from", stored, "--check"]) == 1
    assert "not measured" in capsys.readouterr().out
