"""The pages say what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpuremote import errors
from gpuremote.errors import GpuRemoteError
from gpuremote.wire import caps
from gpuremote.wire.batch import Op

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = [
    pytest.param(block, id=f"{page.stem}-{index}")
    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def text(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("block", RUNNABLE)
def test_code_runs(block: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", block],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_what_its_first_example_prints() -> None:
    readme = (ROOT / "README.md").read_text()
    block, output = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", readme, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, timeout=55, check=True
    )
    assert done.stdout == output


def tree(cls: type[GpuRemoteError]) -> list[type[GpuRemoteError]]:
    return [cls, *(c for child in cls.__subclasses__() for c in tree(child))]


@pytest.mark.parametrize("cls", tree(errors.GpuRemoteError), ids=lambda cls: cls.__name__)
def test_every_error_is_explained(cls: type[GpuRemoteError]) -> None:
    again = "yes" if cls.retryable else "no"
    assert f"| `{cls.__name__}` | {cls.code} | {again} |" in text("operations.md")


def test_every_option_of_serve_is_explained() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuremote", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    page = text("operations.md")
    for option in set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}:
        assert f"`{option}" in page, option


@pytest.mark.parametrize("name", [name for name in dir(caps) if name.isupper()])
def test_every_cap_is_listed_with_its_value(name: str) -> None:
    assert f"| `{name}` | {getattr(caps, name):,} |" in text("protocol.md")


@pytest.mark.parametrize("op", list(Op), ids=lambda op: op.name)
def test_every_record_is_listed(op: Op) -> None:
    assert f"| {op.value} | {op.name} |" in text("protocol.md")


def test_nothing_local_is_named() -> None:
    for page in PAGES:
        assert not re.search(r"/(root|home|work|tmp)/", page.read_text()), page
