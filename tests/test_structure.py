"""What the project promises about its own sources."""

from __future__ import annotations

import ast
import configparser
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import gpuremote
from gpuremote import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "gpuremote"

MAX_LINES = 600
VAGUE = {"manager", "helper", "helpers", "util", "utils", "handler", "proxy"}


def sources() -> Iterator[Path]:
    for folder in ("src", "tests", "benchmarks", "examples"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_no_file_is_too_long_to_hold_in_mind() -> None:
    native = (PACKAGE / "native").glob("*.[ch]")
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (*sources(), *native)
    }
    assert Path("src/gpuremote/native/lane.c") in lengths
    assert Path("src/gpuremote/errors.py") in lengths
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_import_is_pure() -> None:
    # In a process of its own: this one has imported far more.
    script = """
import os, sys
events = []
sys.addaudithook(lambda name, args: events.append(name))
environment = dict(os.environ)
import gpuremote
acts = {"_thread.start_new_thread", "subprocess.Popen", "os.fork", "os.posix_spawn", "socket.bind",
        "socket.connect", "socket.getaddrinfo", "socket.__new__"}
print(sorted(acts.intersection(events)))
print(sorted({"torch", "cupy", "sklearn", "matplotlib"}.intersection(sys.modules)))
print(environment == dict(os.environ))
print("import" in events)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.splitlines() == ["[]", "[]", "True", "True"]


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert gpuremote.__version__ == project["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_has_its_place_in_the_layers() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    rows = setup["importlinter:contract:layers"]["layers"].split("\n")
    names = {name.strip(" ()") for row in rows for name in row.split("|")}
    present = {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or any(path.glob("*.py"))
    }
    assert {"errors", "wire"} <= present
    assert present <= names, f"not in the layers of setup.cfg: {present - names}"


def test_every_package_is_marked_as_one() -> None:
    # import-linter and mypy overlook folders without __init__.py.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert {str(folder) for folder in folders if not (folder / "__init__.py").exists()} == set()
    assert (PACKAGE / "py.typed").exists()


def test_exported_names_exist() -> None:
    for info in pkgutil.walk_packages(gpuremote.__path__, "gpuremote."):
        # The front ends import what may be missing here; __main__ runs a program.
        if info.name.startswith(("gpuremote.torch", "gpuremote.cupy")) or "__main__" in info.name:
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", [])
        assert sorted(set(names)) == sorted(names), f"{info.name}.__all__ repeats a name"
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, f"{info.name}.__all__ names what is not there: {missing}"


def tree(root: type[errors.GpuRemoteError]) -> Iterator[type[errors.GpuRemoteError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def test_every_error_has_a_code_of_its_own() -> None:
    classes = list(tree(errors.GpuRemoteError))
    inherited = [cls.__name__ for cls in classes if "code" not in vars(cls)]
    assert inherited == []
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes)
    for cls in classes:
        error = errors.error_from_wire(cls.code, "text", op="add", device="cpu:0", peer="h:1")
        assert type(error) is cls
        assert (error.message, error.op, error.device, error.peer) == (
            "text",
            "add",
            "cpu:0",
            "h:1",
        )
    assert {cls.__name__ for cls in classes} <= set(errors.__all__)


def test_errors_live_in_one_file() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & set(errors.__all__), f"{path}:{node.lineno}: {node.name}"


def drawing(cls: type[errors.GpuRemoteError], indent: str = "") -> Iterator[str]:
    children = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    for child in children:
        last = child is children[-1]
        own = [base.__name__ for base in child.__bases__ if base is not cls]
        suffix = f" ({', '.join(own)})" if own else ""
        yield f"{indent}{'└' if last else '├'}── {child.__name__}{suffix}"
        yield from drawing(child, indent + ("    " if last else "│   "))


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^    ([│├└ ].*)$", errors.__doc__, re.MULTILINE)
    assert drawn == list(drawing(errors.GpuRemoteError))


def test_no_vague_names() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        inside_testing = "testing" in path.relative_to(PACKAGE).parts
        vague = VAGUE - {"proxy"} if inside_testing else VAGUE
        names = [(1, path.stem)] + [
            (node.lineno, node.name)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for line, name in names:
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
            if vague.intersection(word.lower() for word in words):
                found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert found == []
