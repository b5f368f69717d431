"""Handwritten digits on a remote device: PCA and a logistic regression, checked against NumPy.

Runs on ``local://`` (a device server on this machine, started as a child) or on the server that
``GPUREMOTE_URL`` names. Everything is computed there; then the same functions run on local NumPy
arrays, and components, weights and predictions have to agree.

    python examples/digits.py [PICTURE.png]

Prints, among other things::

    components, weights and predictions equal local NumPy's
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

import gpuremote

STEPS = 400
RATE = 0.5
TRAIN = 1347  # the first three quarters; the others are held out
SHOW = 50  # steps from one look at the loss to the next

Array = npt.NDArray[Any]
console = Console(highlight=False)


# -- the computation: the same code for remote and for local arrays --------------------------------


def principal_components(x: Any) -> tuple[Any, Any]:
    """The rows of ``x`` along their two main directions, and each one's share of the variance."""
    centred = x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    # eigh sorts upwards: the main directions come last.
    return centred @ vectors[:, :-3:-1], values[:-3:-1] / values.sum()


def descend(x: Any, y: Any, weights: Any) -> Iterator[tuple[Any, Any]]:
    """Multinomial logistic regression by gradient descent: weights and loss, step by step.

    ``y`` is one-hot.
    """
    for _ in range(STEPS):
        scores = x @ weights
        scores = scores - scores.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        total = odds.sum(axis=1, keepdims=True)
        loss = ((np.log(total) - scores) * y).sum() / len(x)
        weights = weights - (x.T @ (odds / total - y)) * (RATE / len(x))
        yield weights, loss


def predict(x: Any, weights: Any) -> Any:
    return np.argmax(x @ weights, axis=1)


# -- there and here --------------------------------------------------------------------------------


def compute_remotely(session: gpuremote.Session, x: Array, y: Array, start: Array) -> list[Array]:
    """Components, shares, weights, predictions and losses, computed on the remote device."""
    device = session.devices[0]
    remote = device.put(x)
    components, shares = principal_components(remote[:, :-1])
    labels, weights = device.put(y[:TRAIN]), device.put(start)
    losses = []
    with Progress(
        TextColumn("  training    "),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=STEPS, loss="")
        for weights_now, loss in descend(remote[:TRAIN], labels, weights):
            weights = weights_now
            losses.append(loss)
            step = len(losses)
            if step % SHOW == 0:
                # The only wait of this loop: it needs a value. Ops are issued without one.
                value = float(loss)
                progress.update(bar, completed=step, loss=f"loss {value:.3f}")
                if not console.is_terminal and step % 100 == 0:
                    say("training", f"step {step} of {STEPS}, loss {value:.3f}")
    results = [components, shares, weights, predict(remote, weights), np.stack(losses)]
    return session.get_many(results)


def compute_locally(x: Array, y: Array, start: Array) -> list[Array]:
    """The same on local arrays."""
    components, shares = principal_components(x[:, :-1])
    weights, losses = start, []
    for weights_now, loss in descend(x[:TRAIN], y[:TRAIN], start):
        weights = weights_now
        losses.append(loss)
    return [components, shares, weights, predict(x, weights), np.stack(losses)]


def compare(remote: list[Array], local: list[Array]) -> None:
    """Raise AssertionError where the two differ by more than rounding."""
    # The sign of an eigenvector is free.
    np.testing.assert_allclose(np.abs(remote[0]), np.abs(local[0]), atol=1e-8)
    np.testing.assert_allclose(remote[1], local[1], rtol=1e-8)
    np.testing.assert_allclose(remote[2], local[2], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(remote[3], local[3])
    np.testing.assert_allclose(remote[4], local[4], rtol=1e-8)


def main(picture: Path) -> int:
    digits = load_digits()
    x = np.hstack([digits.data / 16.0, np.ones((len(digits.data), 1))])
    y = np.eye(10)[digits.target]
    start = np.zeros((x.shape[1], 10))

    # One BLAS thread on either side: for matrices this small, more only get in each other's way
    # when the cores are busy. A server that is started here inherits the variables.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

    console.print("[bold]Handwritten digits on a remote device[/]")
    say("images", f"{len(x):,} of 8 × 8 pixels; {TRAIN:,} to train with, {len(x) - TRAIN} held out")
    with gpuremote.connect_sync() as session:
        say("device", f"{session.devices[0]}, {session.backend} backend")
        began = time.perf_counter()
        remote = compute_remotely(session, x, y, start)
        took = time.perf_counter() - began
        explanation, stats = session.transport.explain(), session.stats()

    with threadpool_limits(1, "blas"):
        began = time.perf_counter()
        local = compute_locally(x, y, start)
        local_took = time.perf_counter() - began
    compare(remote, local)

    components, shares, _, predicted, losses = remote
    right = predicted == digits.target
    draw(picture, digits, components, shares, losses, predicted)

    console.print("\n[bold]Results[/]")
    say("variance", f"two components hold {shares.sum():.1%}")
    say("accuracy", f"{right[TRAIN:].mean():.1%} of the held-out digits")
    say("check", "components, weights and predictions equal local NumPy's")
    inside = picture.resolve().is_relative_to(Path.cwd())
    say("picture", os.path.relpath(picture) if inside else str(picture))

    console.print("\n[bold]How it ran[/]")
    say("transport", f"{explanation.chosen}: {explanation.reason}")
    for candidate in explanation.candidates:
        if not candidate["available"]:
            say("", f"not {candidate['name']}: {candidate['reason']}")
    say("bytes", f"{stats.bytes_sent:,} sent, {stats.bytes_received:,} received")
    say("messages", f"{stats.messages_sent} sent, {stats.messages_received} received")
    say("ops", f"{stats.ops:,} in {stats.batches} batches")
    trips = ", ".join(f"{count} {kind}" for kind, count in stats.round_trips.items())
    say("round trips", f"{stats.round_trips.total()}: {trips}")
    say("time", f"{took:.2f} s remote, {local_took:.2f} s local NumPy on one thread")
    return 0


def say(name: str, text: str) -> None:
    """A line of the report: what, and on the right of it the facts, wrapped."""
    width = max(40, min(console.width, 100) - 16)
    for number, line in enumerate(textwrap.wrap(text, width)):
        label = name if number == 0 else ""
        console.print(f"  [cyan]{label:<12}[/]  {line}", soft_wrap=True, markup=True)


# -- the picture -----------------------------------------------------------------------------------


def draw(
    path: Path,
    digits: Any,
    components: Array,
    shares: Array,
    losses: Array,
    predicted: Array,
) -> None:
    """Held-out digits with what they were taken for, the two components, the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patheffects import withStroke

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.08)
    figure = plt.figure(figsize=(14, 5), layout=layout)
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.1, 1.35, 1.0], wspace=0.04)

    right_ones = predicted == digits.target
    left.suptitle("Held-out digits, recognised (red: wrongly)")
    for number, axes in enumerate(left.subplots(4, 5).flat, TRAIN):
        axes.imshow(digits.images[number], cmap="gray_r", interpolation="nearest")
        axes.set_axis_off()
        colour = "#2a7f3f" if right_ones[number] else "#c62828"
        axes.set_title(f"{predicted[number]}", color=colour, fontsize=11, fontweight="bold", pad=2)

    middle.suptitle("Two principal components")
    axes = middle.subplots()
    colours = plt.get_cmap("tab10").colors
    for digit in range(10):
        points = components[digits.target == digit]
        axes.scatter(points[:, 0], points[:, 1], s=9, alpha=0.55, color=colours[digit], lw=0)
    for digit in range(10):
        x, y = np.median(components[digits.target == digit], axis=0)
        outline = [withStroke(linewidth=3, foreground="white")]
        style = {"ha": "center", "va": "center", "fontsize": 17, "fontweight": "bold"}
        axes.text(x, y, f"{digit}", color=colours[digit], path_effects=outline, **style)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"first component ({shares[0]:.1%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.1%})")

    right.suptitle("Logistic regression")
    axes = right.subplots()
    axes.plot(np.arange(1, STEPS + 1), losses, color=colours[0], lw=2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.02 * STEPS, 1.04 * STEPS)
    axes.set_xlabel("step of the gradient descent")
    axes.set_ylabel("cross entropy of the training digits")
    axes.grid(alpha=0.25)
    text = f"{right_ones[TRAIN:].mean():.1%} of {len(predicted) - TRAIN} held-out digits right"
    axes.text(0.95, 0.94, text, transform=axes.transAxes, ha="right", va="top")

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    default = Path(__file__).parent / "output" / "digits.png"
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
