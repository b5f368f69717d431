"""Heat spreads over a plate: the same steps by slices, in place, on a remote device and by NumPy.

Only the temperature in the middle is read, every 100 steps. So 13,000 ops wait 10 times, and once
for the whole plate in the end.

Prints, among other things::

    round trips: 11
    the plates are equal: True
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

import gpuremote.cupy as cp

SIZE = 200
STEPS = 1000
EVERY = 100
"""Steps after which a temperature is looked at: nothing else waits for the server."""
console = Console(highlight=False)


def plate(xp: Any) -> Any:
    """Cold, with a hot edge and a hot square in the middle."""
    found = xp.zeros((SIZE, SIZE))
    found[0, :] = 100.0
    half = SIZE // 2
    found[half - 20 : half + 20, half - 20 : half + 20] = 60.0
    return found


def spread(xp: Any, heat: Any, change: Any) -> None:
    """One step, in place; the edges stay as they are."""
    inner = heat[1:-1, 1:-1]
    xp.add(heat[:-2, 1:-1], heat[2:, 1:-1], out=change)
    change += heat[1:-1, :-2]
    change += heat[1:-1, 2:]
    change -= 4.0 * inner
    change *= 0.2
    inner += change


def main() -> None:
    remote, change = plate(cp), cp.zeros((SIZE - 2, SIZE - 2))
    before = cp.session().stats().round_trips
    begin = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        bar = progress.add_task("heat", total=STEPS)
        for step in range(1, STEPS + 1):
            spread(cp, remote, change)
            if step % EVERY == 0:
                middle = remote[SIZE // 2, SIZE // 2].item()
                progress.update(bar, completed=step)
                progress.console.print(f"step {step:5}: {middle:6.2f} degrees in the middle")
    found = remote.get()
    took = time.perf_counter() - begin
    trips = (cp.session().stats().round_trips - before).total()

    local, change_here = plate(np), np.zeros((SIZE - 2, SIZE - 2))
    begin = time.perf_counter()
    for _ in range(STEPS):
        spread(np, local, change_here)
    took_here = time.perf_counter() - begin
    print("round trips:", trips)
    print("the plates are equal:", bool(np.array_equal(found, local)))
    print(f"{took:.2f} s on the remote device, {took_here:.2f} s with NumPy here")
    cp.close()


if __name__ == "__main__":
    main()
