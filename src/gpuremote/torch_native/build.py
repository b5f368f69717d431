"""The part of ``gpuremote.torch`` in C++: compiled once for this torch and Python, and kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, TypeAlias

from gpuremote.errors import BuildFailed, ConfigError

__all__ = [
    "MODULE",
    "NO_COMPILER",
    "TIERS",
    "VARIABLE",
    "Progress",
    "build",
    "built",
    "check_python",
    "compiler",
    "folder",
    "outlook",
    "torch_version",
    "wanted",
]

MODULE: Final = "gpuremote_torch"
SOURCES: Final = Path(__file__).parent
VARIABLE: Final = "GPUREMOTE_TORCH_TIER"
TIERS: Final = ("auto", "cpp", "python")
"""Values of the variable: the part in C++ if it can be had; no other; the one in Python."""
FLAGS: Final = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
)
LIMIT: Final = 600
"""Seconds for one file, and for another process that builds the same."""
_TAIL: Final = 2000
NO_COMPILER: Final = "there is no C++ compiler (Debian: apt-get install g++; CXX names another one)"

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many files are done, and of how many."""


def _nothing(done: int, of: int) -> None: ...


def wanted() -> str:
    """Which part is asked for, one of ``TIERS``."""
    found = os.environ.get(VARIABLE) or "auto"
    if found not in TIERS:
        raise ConfigError(f"{VARIABLE} is one of {', '.join(TIERS)}, not {found!r}")
    return found


def torch_version() -> str:
    """Of the torch that is installed; "" if none is."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def outlook() -> tuple[bool, str]:
    """Whether the part in C++ is what ``import gpuremote.torch`` uses here, and why."""
    if not torch_version():
        return False, "torch is not installed"
    if wanted() == "python":
        return False, f"{VARIABLE}=python"
    try:
        check_python()
        found = built()
    except BuildFailed as error:
        return False, str(error)
    if found is not None:
        return True, f"built for torch {torch_version()}"
    if compiler() is None:
        return False, NO_COMPILER
    return True, "built when it is imported first (or by `gpuremote torch build`)"


def check_python() -> None:
    """
    Raises
    ------
    BuildFailed
        It can't be used with this Python.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildFailed("it needs a Python with an interpreter lock")


def compiler() -> str | None:
    """The C++ compiler there is (``CXX`` names another one)."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("c++")


def folder() -> Path:
    """Where it is kept: for each version of torch, Python and this package its own.

    ``GPUREMOTE_TORCH_BUILD`` names another place than the user's cache, such as one in an image.
    """
    found = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        found.update(source.name.encode() + source.read_bytes())
    key = f"torch-{torch_version()}-{sys.implementation.cache_tag}-{found.hexdigest()[:12]}"
    base = os.environ.get("GPUREMOTE_TORCH_BUILD")
    if base:
        return Path(base) / key
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gpuremote" / key


def built() -> Path | None:
    """The module, if it was built before.

    Raises
    ------
    BuildFailed
        Somebody else may write where it is: it is code.
    """
    found = folder() / f"{MODULE}.so"
    try:
        facts = found.stat()
    except OSError:
        return None
    for place in (facts, found.parent.stat()):
        if place.st_uid not in (0, os.getuid()) or place.st_mode & 0o022:
            raise BuildFailed(
                f"{found} is not loaded, as others than its user may write there; remove it"
            )
    return found


def build(progress: Progress = _nothing) -> Path:
    """Compile it, unless that was done before.

    Parameters
    ----------
    progress : Progress

    Raises
    ------
    BuildFailed
        No compiler, or what it says.
    """
    command = compiler()
    check_python()
    if command is None:
        raise BuildFailed(NO_COMPILER)
    target = folder()
    try:
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        target.chmod(0o755)
        with _alone(target):
            return built() or _compile(command, target, progress)
    except OSError as error:
        raise BuildFailed(f"it can't be built in {target}: {error}") from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """No other process builds the same meanwhile."""
    with open(target / "lock", "w") as lock:
        deadline = time.monotonic() + LIMIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildFailed(
                        f"another process builds in {target}, for more than {LIMIT} s"
                    ) from None
                time.sleep(0.1)
        yield


def _compile(command: str, target: Path, progress: Progress) -> Path:
    from torch.utils import cpp_extension

    headers = [*cpp_extension.include_paths("cpu"), sysconfig.get_path("include")]
    flags = [*FLAGS, *(part for path in headers for part in ("-isystem", path))]
    # The longest first, as they are made side by side.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", dir=target) as place:
        objects = [Path(place) / f"{source.stem}.o" for source in sources]
        waiting = [
            [command, *flags, "-c", str(source), "-o", str(made)]
            for source, made in zip(sources, objects, strict=True)
        ]
        _run_all(waiting, progress)
        made = Path(place) / f"{MODULE}.so"
        libraries = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
        names = ("c10", "torch_cpu", "torch", "torch_python")
        link = [command, "-shared", *map(str, objects), "-o", str(made)]
        _run_all([[*link, *libraries, *(f"-l{name}" for name in names)]])
        made.chmod(0o755)
        return made.replace(target / made.name)


def _run_all(waiting: list[list[str]], progress: Progress = _nothing) -> None:
    """Run commands side by side, as many as there are processors."""
    total = len(waiting)
    width = max(1, len(os.sched_getaffinity(0)))
    running: list[tuple[subprocess.Popen[bytes], list[str]]] = []
    deadline = time.monotonic() + LIMIT
    progress(0, total)
    try:
        while waiting or running:
            while waiting and len(running) < width:
                command = waiting.pop(0)
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
                )
                running.append((process, command))
            process, command = running.pop(0)
            said, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            if process.returncode:
                text = said.decode(errors="replace")[-_TAIL:].strip()
                raise BuildFailed(f"{command[0]} ended with {process.returncode}: {text}")
            progress(total - len(waiting) - len(running), total)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{waiting or running} took more than {LIMIT} s") from None
    finally:
        for process, _ in running:
            process.kill()
            process.communicate()
