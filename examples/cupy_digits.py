"""One program, three namespaces: NumPy here, gpuremote.cupy and PyTorch's ``remote`` there.

The program standardises images of handwritten digits, finds their principal components and trains a
logistic regression on them. It is written once, for any namespace ``xp``, and every result of the
remote ones has to be equal to NumPy's: to within rounding, and to the digit for predictions.

    python examples/cupy_digits.py

Each runs twice; time, round trips and bytes are those of the second run, from the upload of the
images to all results. Images that go through shared memory are not among the bytes. Without PyTorch
its row is left out.

Prints, among other things::

    equal         NumPy, gpuremote.cupy, torch remote
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

STEPS = 300
RATE = 0.5
COMPONENTS = 20
TRAIN = 1347  # the first three quarters; the others are held out
CLOSE = {"rtol": 1e-7, "atol": 1e-9}

Array = npt.NDArray[Any]
console = Console(highlight=False)


# -- the program: nothing in it knows where the arrays are -----------------------------------------


def program(xp: Any, images: Any, labels: Any, tick: Callable[[], None]) -> list[Any]:
    """Shares of the variance, weights, loss and predictions; ``labels`` are one-hot."""
    x = images - xp.mean(images, axis=0)
    deviation = xp.sqrt(xp.mean(x * x, axis=0))
    x = x / xp.where(deviation > 0.0, deviation, xp.ones_like(deviation))

    values, vectors = xp.linalg.eigh(x.T @ x)
    main = vectors[:, -COMPONENTS:]
    main = main * xp.sign(xp.sum(main**3, axis=0))  # the sign of an eigenvector is free
    shares = values[-COMPONENTS:] / xp.sum(values)
    x = x @ main / xp.sqrt(values[-COMPONENTS:] / x.shape[0])

    learnt, wanted = x[:TRAIN], labels[:TRAIN]
    weights = xp.zeros_like(learnt.T @ wanted)
    loss = xp.zeros_like(shares)[0]
    for _ in range(STEPS):
        scores = learnt @ weights
        scores = scores - xp.amax(scores, axis=1, keepdims=True)
        odds = xp.exp(scores)
        total = xp.sum(odds, axis=1, keepdims=True)
        loss = xp.sum((xp.log(total) - scores) * wanted) / TRAIN
        weights = weights - learnt.T @ (odds / total - wanted) * (RATE / TRAIN)
        tick()
    return [shares, weights, loss, xp.argmax(x @ weights, axis=1)]


# -- where it runs ---------------------------------------------------------------------------------


class Run(NamedTuple):
    results: list[Array]
    seconds: float
    trips: int = 0
    sent: int = 0
    received: int = 0


def here(images: Array, labels: Array, tick: Callable[[], None]) -> Run:
    with threadpool_limits(1, "blas"):
        begin = time.perf_counter()
        results = program(np, images, labels, tick)
        return Run(results, time.perf_counter() - begin)


def with_cupy(images: Array, labels: Array, tick: Callable[[], None]) -> Run:
    import gpuremote.cupy as cp

    session = cp.session()
    before = session.stats()
    begin = time.perf_counter()
    remote = program(cp, cp.asarray(images), cp.asarray(labels), tick)
    results = session.get_many(remote)
    took = time.perf_counter() - begin
    after = session.stats()
    return Run(
        results,
        took,
        (after.round_trips - before.round_trips).total(),
        after.bytes_sent - before.bytes_sent,
        after.bytes_received - before.bytes_received,
    )


def with_torch(images: Array, labels: Array, tick: Callable[[], None]) -> Run:
    import torch

    import gpuremote.torch

    with gpuremote.torch.profile() as found:
        given = (torch.asarray(values).to("remote") for values in (images, labels))
        results = [result.cpu().numpy() for result in program(torch, *given, tick)]
    trips = sum(wait.count for wait in found.waits)
    return Run(results, found.seconds, trips, found.bytes_sent, found.bytes_received)


def compare(found: list[Array], expected: list[Array]) -> float:
    """The largest difference; raises AssertionError if it is more than rounding."""
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)
    np.testing.assert_array_equal(found[-1], expected[-1])
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def main() -> None:
    # One thread on either side; a server that is started here inherits the variables.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    digits = load_digits()
    labels = np.eye(10)[digits.target]
    ways = {"NumPy": here, "gpuremote.cupy": with_cupy, "torch remote": with_torch}
    if importlib.util.find_spec("torch") is None:
        del ways["torch remote"]

    console.print("[bold]One program on three kinds of arrays[/]")
    console.print(
        f"  {len(labels):,} images of digits: {COMPONENTS} principal components and {STEPS} steps "
        "of a logistic\n  regression, from the upload to the results\n"
    )
    console.print("                  difference      time  round trips  bytes sent   received")
    expected: list[Array] = []
    with Progress(
        TextColumn("  {task.description:<14}"),
        BarColumn(),
        TaskProgressColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=2 * STEPS * len(ways))
        for name, way in ways.items():
            progress.update(bar, description=name)
            for _ in range(2):
                run = way(digits.data, labels, lambda: progress.advance(bar))
            expected = expected or run.results
            difference = compare(run.results, expected)
            progress.console.print(
                f"  {name:<14}  {difference:10.1e}  {run.seconds:6.2f} s  {run.trips:11,}"
                f"  {run.sent:10,}  {run.received:9,}"
            )
    right = expected[-1] == digits.target
    console.print(f"\n  equal         {', '.join(ways)}")
    console.print(f"  accuracy      {right[TRAIN:].mean():.1%} of the held-out digits")
    if "torch remote" not in ways:
        console.print("  missing       torch remote: pip install torch")

    import gpuremote.cupy

    gpuremote.cupy.close()
    if "torch remote" in ways:
        import gpuremote.torch

        gpuremote.torch.close()


if __name__ == "__main__":
    sys.exit(main())
