"""The price of an Asian option by Monte Carlo: millions of random numbers that are drawn on the
remote device and never leave it. What comes back are three numbers, in one round trip.

The option pays by the geometric mean of the stock's price over a year, as that price is also known
in closed form.

Prints, among other things::

    within three standard errors of the closed form: True
    round trips: 1
"""

from __future__ import annotations

import math
import time
from statistics import NormalDist

from rich.console import Console
from rich.progress import track

import gpuremote.cupy as cp

PRICE, STRIKE, RATE, VOLATILITY = 100.0, 105.0, 0.04, 0.3
DAYS = 50
BATCH = 20_000
BATCHES = 5
console = Console(highlight=False)


def payoffs(rng: cp.random.Generator) -> cp.ndarray:
    """What the option pays on each of the paths of a batch, in money of today."""
    step = 1.0 / DAYS
    drift = (RATE - VOLATILITY**2 / 2) * step
    moves = drift + VOLATILITY * math.sqrt(step) * rng.standard_normal((BATCH, DAYS))
    means = PRICE * cp.exp(cp.cumsum(moves, axis=1).mean(axis=1))
    return math.exp(-RATE) * cp.maximum(means - STRIKE, 0.0)


def closed_form() -> float:
    """The same by a formula: the logarithm of the mean is normal."""
    mean = math.log(PRICE) + (RATE - VOLATILITY**2 / 2) * (DAYS + 1) / (2 * DAYS)
    variance = VOLATILITY**2 * (DAYS + 1) * (2 * DAYS + 1) / (6 * DAYS**2)
    normal, width = NormalDist().cdf, math.sqrt(variance)
    d = (mean - math.log(STRIKE) + variance) / width
    forward = math.exp(mean + variance / 2)
    return math.exp(-RATE) * (forward * normal(d) - STRIKE * normal(d - width))


def main() -> None:
    rng = cp.random.default_rng(2024)
    cp.session().synchronize()
    before = cp.session().stats()
    begin = time.perf_counter()
    total, squares, in_the_money = cp.zeros(()), cp.zeros(()), cp.zeros(())
    for _ in track(
        range(BATCHES), "issuing", console=console, disable=not console.is_terminal, transient=True
    ):
        paid = payoffs(rng)
        total += cp.sum(paid)
        squares += cp.sum(paid * paid)
        in_the_money += cp.mean(paid > 0.0) / BATCHES
    issued = time.perf_counter() - begin
    # The only line that waits.
    total_now, squares_now, chance = cp.stack([total, squares, in_the_money]).tolist()
    took = time.perf_counter() - begin
    trips = (cp.session().stats().round_trips - before.round_trips).total()

    paths = BATCH * BATCHES
    price = total_now / paths
    error = math.sqrt((squares_now / paths - price**2) / paths)
    print(f"{paths:,} paths of {DAYS} days: {paths * DAYS:,} random numbers")
    print(f"price {price:.3f} ± {error:.3f}, in closed form {closed_form():.3f}")
    print(f"it pays on {chance:.1%} of the paths")
    near = abs(price - closed_form()) < 3 * error
    print("within three standard errors of the closed form:", near)
    print("round trips:", trips)
    print(f"{issued * 1e3:.1f} ms until all was issued, {took * 1e3:.0f} ms until it was there")
    cp.close()


if __name__ == "__main__":
    main()
