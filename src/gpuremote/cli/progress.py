"""How far a command is, on standard error: only on a terminal, and only for commands.

The library itself shows nothing. A transfer is watched from outside, by looking at the session's
counters now and then; one that is over soon is never looked at.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gpuremote import _clock
from gpuremote.cli._console import size
from gpuremote.client.stats import SessionStats

__all__ = ["Bars"]

LARGE: Final = 64 << 20
"""Bytes from which on a transfer gets a bar."""
PATIENCE: Final = 0.5
"""Seconds that a transfer may take before its bar appears."""
INTERVAL: Final = 0.1
"""Seconds between two looks at the counters."""


class Counted(Protocol):
    """Something with counters: a session of either kind."""

    def stats(self) -> SessionStats: ...


class Bars:
    """A bar for the steps of a command, and one below it while a large transfer goes on.

    Between its calls it does nothing, so what the command measures is not disturbed; only the
    bar of a transfer that takes longer than ``patience`` is drawn by a thread.

    Parameters
    ----------
    what : str
        What the command does, as its bar's name.
    steps : int
        How many steps there are.
    console : Console, optional
        Where to draw; default: standard error if that is a terminal, else nowhere.
    large : int
        Bytes from which on a transfer gets a bar.
    patience : float
        Seconds.
    """

    def __init__(
        self,
        what: str,
        steps: int,
        *,
        console: Console | None = None,
        large: int = LARGE,
        patience: float = PATIENCE,
    ) -> None:
        self._large = large
        self._patience = patience
        self._progress: Progress | None = None
        if console is None and sys.stderr.isatty():
            console = Console(stderr=True)
        if console is not None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[amount]}", markup=False),
                console=console,
                transient=True,
                auto_refresh=False,
            )
            self._steps = self._progress.add_task(what, total=steps, amount="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, what: str) -> None:
        """One more step is done; ``what`` comes next."""
        if self._progress is not None:
            self._progress.update(self._steps, advance=1, amount=what)
            self._progress.refresh()

    @contextlib.contextmanager
    def transfer(self, session: Counted, nbytes: int, what: str) -> Iterator[None]:
        """Show how far the transfer of ``nbytes`` within this block is, if it takes its time."""
        if self._progress is None or nbytes < self._large:
            yield
            return
        over = threading.Event()
        watching = threading.Thread(
            target=self._watch,
            args=(self._progress, session, _moved(session), nbytes, what, over),
            name="gpuremote-progress",
            daemon=True,
        )
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def _watch(
        self,
        progress: Progress,
        session: Counted,
        before: int,
        nbytes: int,
        what: str,
        over: threading.Event,
    ) -> None:
        began = _clock.now()
        if over.wait(self._patience):
            return
        bar = progress.add_task(what, total=nbytes, amount="")
        # A terminal may go away at any time; the transfer goes on.
        with contextlib.suppress(OSError):
            while True:
                # What is sent again after a lost connection counts again.
                done = min(nbytes, _moved(session) - before)
                speed = done / (_clock.now() - began)
                left = f", {(nbytes - done) / speed:.0f} s left" if speed else ""
                amount = f"{size(done)} of {size(nbytes)}, {size(int(speed))}/s{left}"
                progress.update(bar, completed=done, amount=amount)
                progress.refresh()
                if over.wait(INTERVAL):
                    break
            progress.remove_task(bar)
            progress.refresh()


def _moved(session: Counted) -> int:
    stats = session.stats()
    return stats.payload_sent + stats.payload_received
