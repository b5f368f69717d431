"""Every example runs, as a program of its own, and prints what its docstring says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpuremote.testing.servers import device_server

FOLDER = Path(__file__).parents[1] / "examples"
README = Path(__file__).parents[1] / "README.md"
EXAMPLES = sorted(FOLDER.glob("*.py"))
PRINTS = "Prints, among other things::\n"
PICTURES = ("digits", "cupy_denoise")
"""Those that draw one, to where their argument says."""


def run(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """An example in a process of its own; what is not closed makes it fail."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GPUREMOTE_")}
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=55,
        # One thread: on busy cores several only wait for each other.
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def promised(path: Path) -> list[str]:
    """The lines that the example's docstring says it prints."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    _, found, lines = text.partition(PRINTS)
    assert found, f"{path.name}: say in the docstring what it prints, after {PRINTS!r}"
    return [line.removeprefix("    ") for line in lines.splitlines() if line]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    done = run(path, *([str(picture)] if path.stem in PICTURES else []))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    missing = [line for line in promised(path) if line not in done.stdout]
    assert not missing, done.stdout
    assert "\x1b" not in done.stdout, "colours and progress bars are for terminals"
    if path.stem in PICTURES:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000
    if path.stem == "cupy_digits":
        check_the_readme(done.stdout)


def test_examples_go_where_the_environment_says() -> None:
    with device_server() as server:
        done = run(FOLDER / "quickstart_sync.py", GPUREMOTE_URL=server.url)
    assert done.returncode == 0, done.stderr
    assert f"peer 127.0.0.1:{server.port}" in done.stdout


def test_the_torch_example_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not installed')\n")
    done = run(FOLDER / "from_torch.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "this example needs PyTorch: pip install torch\n"


@pytest.mark.parametrize("number", range(3))
def test_programs_on_the_page_of_arrays(number: int, tmp_path: Path) -> None:
    page = (FOLDER.parent / "docs" / "cupy.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(programs) == 3
    (tmp_path / "program.py").write_text(programs[number])
    done = run(tmp_path / "program.py")
    assert done.returncode == 0, done.stderr


def check_the_readme(stdout: str) -> None:
    """The README shows what the demo of three namespaces prints."""
    (shown,) = re.findall(r"```text\n(One program.*?)```", README.read_text(), re.DOTALL)
    printed = {measured(line) for line in stdout.splitlines()}
    for line in shown.splitlines():
        assert line.strip() == "..." or measured(line) in printed, line


def measured(line: str) -> str:
    """A line without what differs from run to run: times, bytes and rounding."""
    return re.sub(r" +(\d[\d.,]*e-\d+|\d+\.\d+ s|\d[\d,]{4,})(?= |$)", " #", line)


def test_the_demo_of_three_namespaces_goes_without_torch(tmp_path: Path) -> None:
    """As where it is not installed; what is left out is said."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
    )
    done = run(FOLDER / "cupy_digits.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "equal         NumPy, gpuremote.cupy\n" in done.stdout
    assert "missing       torch remote: pip install torch\n" in done.stdout
