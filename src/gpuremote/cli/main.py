"""Entry point of the command line.

Exit codes: 0 it worked; 1 it did not (the reason is on standard error); 2 wrong usage;
3 the server can't be reached or refuses; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Final

from gpuremote._types import JSON
from gpuremote._version import __version__
from gpuremote.cli import bench, devices, doctor, serve, torch
from gpuremote.cli._console import printable
from gpuremote.errors import ConfigError, GpuRemoteError, ServerUnavailable, TransportError

__all__ = ["main"]

FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 130

COMMANDS: Final = (serve, devices, doctor, bench, torch)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="gpuremote", description="Remote accelerators as if they were attached here."
    )
    parser.add_argument("--version", action="version", version=f"gpuremote {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; the interpreter is about to flush what is left of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except GpuRemoteError as error:
        _complain(error, as_json=getattr(options, "json", False))
        if isinstance(error, ConfigError):
            return USAGE
        if isinstance(error, (TransportError, ServerUnavailable, TimeoutError)):
            return UNREACHABLE
        return FAILED


def _complain(error: GpuRemoteError, *, as_json: bool) -> None:
    if as_json:
        body: JSON = {
            "error": type(error).__name__,
            "code": error.code,
            "retryable": error.retryable,
            "message": str(error),
        }
        print(json.dumps(body))
    print(printable(f"gpuremote: {error}"), file=sys.stderr)
