"""Running the command line as a user does: real processes, with and without a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

TIMEOUT: Final = 50.0
BOXES: Final = "─━│┃"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpuremote", *arguments]


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without a terminal."""
    return subprocess.run(
        command(*arguments),
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document that standard output must be."""
    assert done.stdout.endswith("\n")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def plain(text: str) -> bool:
    """Whether nothing in it is meant for a terminal."""
    return not set(text) & {"\x1b", "\r", *BOXES}


class Terminal:
    """A pseudo-terminal; ``end`` is what a process gets as its output."""

    def __init__(self) -> None:
        self._ours, self.end = pty.openpty()
        self.said = ""

    def read(self, until: str = "") -> str:
        """Collect what is printed, until it contains ``until`` or (without one) ends."""
        if not until and self.end >= 0:
            os.close(self.end)  # or the end would never come
            self.end = -1
        deadline = time.monotonic() + TIMEOUT
        while not until or until not in self.said:
            assert time.monotonic() < deadline, f"no {until!r} in {self.said!r}"
            if not select.select([self._ours], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(self._ours, 65536)
            except OSError:  # EIO: no process holds the other end any more
                break
            self.said += data.decode(errors="replace")
        return self.said

    def close(self) -> None:
        os.close(self._ours)
        if self.end >= 0:
            os.close(self.end)


@contextmanager
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    try:
        yield opened
    finally:
        opened.close()
