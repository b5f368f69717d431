"""``gpuremote torch build``: the part of the PyTorch front end that is in C++, ahead of its use."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from gpuremote.cli._console import say
from gpuremote.torch_native import build

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "torch", help="build the part of gpuremote.torch that is in C++"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    action: argparse.ArgumentParser = actions.add_parser(
        "build",
        help="compile it for the installed torch (some 30 s)",
        description="Compile the part of gpuremote.torch in C++ for the installed torch and this "
        "Python, unless that was done before; `import gpuremote.torch` does it too. It is kept in "
        "the user's cache, or in the folder that GPUREMOTE_TORCH_BUILD names.",
    )
    action.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    if not build.torch_version():
        print("gpuremote: torch is not installed", file=sys.stderr)
        return 1
    known = build.built()
    if known is not None:
        say(f"built before: {known}")
        return 0
    begin = time.monotonic()

    def progress(done: int, of: int) -> None:
        print(f"{done} of {of} files", file=sys.stderr, flush=True)

    found = build.build(progress)
    say(f"built in {time.monotonic() - begin:.0f} s: {found}")
    return 0
