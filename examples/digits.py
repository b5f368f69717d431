"""Handwritten digits on a remote device: PCA and a logistic regression, checked against NumPy.

Runs on ``local://`` (a device server on this machine, started as a child) or on the device that
``GPUREMOTE_URL`` names. Everything is computed remotely; the same steps then run locally, and
results and predictions have to agree.

    python examples/digits.py [PICTURE.png]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

import gpuremote

STEPS = 400
RATE = 0.5
TRAIN = 1347

Array = npt.NDArray[Any]


def pca(xp: Any, x: Any) -> tuple[Any, Any]:
    """Two principal components of the rows of ``x``, and the share of variance of each."""
    centred = x - x.mean(axis=0)
    values, vectors = xp.eigh(centred.T @ centred)
    # eigh sorts upwards: the last columns are the main directions.
    return centred @ vectors[:, -2:], values[-2:] / values.sum()


def train(x: Any, y: Any, weights: Any, each: Any) -> tuple[Any, list[Any]]:
    """Multinomial logistic regression by gradient descent; ``y`` is one-hot."""
    losses = []
    for step in range(STEPS):
        scores = x @ weights
        scores -= scores.max(axis=1, keepdims=True)
        odds = np.exp(scores)
        chances = odds / odds.sum(axis=1, keepdims=True)
        weights = weights - (x.T @ (chances - y)) * (RATE / len(x))
        if step % 20 == 0 or step == STEPS - 1:
            losses.append(-(np.log(chances) * y).sum() / len(x))
        each(step)
    return weights, losses


def main(picture: Path) -> int:
    console = Console()
    digits = load_digits()
    x = np.hstack([digits.data / 16.0, np.ones((len(digits.data), 1))])
    y = np.eye(10)[digits.target]
    start = np.zeros((x.shape[1], 10))
    console.print(f"[bold]handwritten digits[/]: {len(x)} images of 8 x 8, {TRAIN} to train with")

    with gpuremote.connect_sync() as session:
        device = session.devices[0]
        console.print(f"device: [bold]{device}[/], {session.backend} backend")
        began = time.perf_counter()
        remote = device.put(x)
        components, shares = pca(np.linalg, remote[:, :64])
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("training remotely", total=STEPS)
            weights, losses = train(
                remote[:TRAIN],
                device.put(y[:TRAIN]),
                device.put(start),
                lambda _: progress.advance(bar),
            )
            session.synchronize()
        predicted = np.argmax(remote[TRAIN:] @ weights, axis=1)
        got = session.get_many([components, shares, weights, predicted, *losses])
        took = time.perf_counter() - began
        explanation, stats = session.transport.explain(), session.stats()

    began = time.perf_counter()
    local_components, local_shares = pca(np.linalg, x[:, :64])
    local_weights, _ = train(x[:TRAIN], y[:TRAIN], start, lambda _: None)
    local_predicted = np.argmax(x[TRAIN:] @ local_weights, axis=1)
    local_took = time.perf_counter() - began

    components, shares, weights, predicted = got[:4]
    # The sign of an eigenvector is free.
    np.testing.assert_allclose(np.abs(components), np.abs(local_components), atol=1e-8)
    np.testing.assert_allclose(shares, local_shares, rtol=1e-8)
    np.testing.assert_allclose(weights, local_weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(predicted, local_predicted)
    accuracy = float((predicted == digits.target[TRAIN:]).mean())
    draw(picture, digits, components, shares, [float(loss) for loss in got[4:]], accuracy)

    report(console, explanation, stats, took, local_took)
    console.print(
        f"two components hold [bold]{shares.sum():.1%}[/] of the variance; held-out accuracy "
        f"[bold]{accuracy:.1%}[/]; components, weights and predictions equal local NumPy's"
    )
    console.print(f"picture: {picture}")
    return 0


def report(
    console: Console,
    explanation: gpuremote.Explanation,
    stats: gpuremote.SessionStats,
    took: float,
    local_took: float,
) -> None:
    table = Table(show_header=False, box=None)
    trips = ", ".join(f"{count} {kind}" for kind, count in stats.round_trips.items())
    for name, value in (
        ("transport", f"{explanation.chosen}: {explanation.reason}"),
        ("bytes", f"{stats.bytes_sent:,} sent, {stats.bytes_received:,} received"),
        ("messages", f"{stats.messages_sent} sent, {stats.messages_received} received"),
        ("ops", f"{stats.ops:,}, in {stats.batches} batches"),
        ("round trips", trips),
        ("time", f"{took:.2f} s remote, {local_took:.2f} s local NumPy"),
    ):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


def draw(
    path: Path,
    digits: Any,
    components: Array,
    shares: Array,
    losses: list[float],
    accuracy: float,
) -> None:
    """Some digits, the two components, the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1, 1.4, 1])
    for index, axes in enumerate(left.subplots(4, 4).flat):
        axes.imshow(digits.images[index], cmap="gray_r")
        axes.set_axis_off()
    left.suptitle("handwritten digits")
    axes = middle.subplots()
    points = axes.scatter(
        components[:, 1], components[:, 0], c=digits.target, cmap="tab10", s=8, alpha=0.8
    )
    middle.colorbar(points, ax=axes, ticks=range(10), label="digit")
    axes.set_xlabel(f"component 1 ({shares[1]:.0%} of the variance)")
    axes.set_ylabel(f"component 2 ({shares[0]:.0%})")
    middle.suptitle("PCA on the remote device")
    axes = right.subplots()
    axes.plot(np.linspace(0, STEPS, len(losses)), losses)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy")
    axes.grid(alpha=0.3)
    axes.set_title(f"{accuracy:.1%} right on held-out digits", fontsize="medium")
    right.suptitle("logistic regression")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    default = Path(__file__).parent / "output" / "digits.png"
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
