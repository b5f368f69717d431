"""Which part makes ops into records: the one in C++, or the one in Python.

Both write the same. The one in C++ needs a tenth of the time, and some of what torch knows of a
device can only be said there. It is compiled when it is wanted first, if there is a compiler.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from gpuremote.errors import BuildFailed
from gpuremote.torch_native import build

__all__ = ["REASON", "native", "needs_native"]


def _choose() -> tuple[Any, str]:
    """The module in C++ or None, and why."""
    wanted = build.wanted()
    if wanted == "python":
        return None, f"{build.VARIABLE}=python"
    try:
        build.check_python()
        path = build.built() or _make()
        return _load(str(path)), f"built for torch {torch.__version__}"
    except (BuildFailed, ImportError) as error:
        if wanted == "cpp":
            raise
        text = str(error)
        if build.compiler() is not None:
            warnings.warn(
                f"the part of gpuremote.torch in C++ is missing ({text}); ops take some ten times "
                f"as long without it. {build.VARIABLE}=python goes without it and without this "
                "warning",
                RuntimeWarning,
                stacklevel=2,
            )
        return None, text


def _make() -> Path:
    """Build it here and now, and say so: it takes half a minute."""
    if build.compiler() is None:
        raise BuildFailed(build.NO_COMPILER)
    begin = time.monotonic()
    print(
        f"gpuremote: building its part in C++ for torch {torch.__version__}, once (some 30 s) ...",
        file=sys.stderr,
        flush=True,
    )
    terminal = sys.stderr.isatty()

    def progress(done: int, of: int) -> None:
        if terminal:
            print(f"\r  {done} of {of} files", end="\n" if done == of else "", file=sys.stderr)

    found = build.build(progress)
    print(f"gpuremote: built in {time.monotonic() - begin:.0f} s: {found}", file=sys.stderr)
    return found


def _load(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(build.MODULE, path)
    spec = importlib.util.spec_from_file_location(build.MODULE, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


native, REASON = _choose()
"""The module in C++ or None, and why."""


def needs_native(what: str) -> str:
    """Why something is refused without the part in C++, and what to do."""
    return (
        f"{what} needs the part of gpuremote.torch in C++, and that is not in use here ({REASON}): "
        "install a C++ compiler, and run `gpuremote torch build`"
    )
