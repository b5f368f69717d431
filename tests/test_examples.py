"""Every example runs, as a program of its own, with warnings as errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SAYS = {
    "digits": "equal local NumPy's",
    "quickstart_async": "[15. 51.]",
    "quickstart_sync": "LinearAlgebraError",
    "streams": "after the event",
    "two_servers": "bytes of arrays through here: 0",
    "from_torch": "equal",
}


def test_each_example_says_what_to_look_for() -> None:
    assert {path.stem for path in EXAMPLES} == SAYS.keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "picture.png")] if path.stem == "digits" else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPUREMOTE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=55,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
    if arguments:
        assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
