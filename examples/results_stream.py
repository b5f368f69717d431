"""Results one after the other, while later ones are still being computed.

``session.results`` takes a generator that issues ops as it goes, keeps some answers on their
way, and gives the values in order. Here: a power iteration that stops once it has converged.

Prints, among other things::

    as numpy.linalg.eigvalsh says: True
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np

import gpuremote


def estimates(matrix: gpuremote.AsyncArray) -> Iterator[gpuremote.AsyncArray]:
    """Better and better estimates of the largest eigenvalue. Nothing is waited for in here."""
    vector = matrix.sum(axis=0)
    while True:
        vector = vector / (vector * vector).sum() ** 0.5
        image = matrix @ vector
        yield vector @ image
        vector = image


async def main() -> None:
    half = np.random.default_rng(3).random((200, 200))
    symmetric = half + half.T
    async with gpuremote.connect() as session:
        matrix = await session.devices[0].put(symmetric)
        previous = 0.0
        # Leaving the block early takes back what was asked for ahead.
        async with aclosing(session.results(estimates(matrix), ahead=4)) as results:
            async for estimate in results:
                print(f"largest eigenvalue: {float(estimate):.9f}")
                if abs(estimate - previous) < 1e-9:
                    break
                previous = float(estimate)
        truth = np.linalg.eigvalsh(symmetric)[-1]
        print("as numpy.linalg.eigvalsh says:", bool(np.isclose(previous, truth, rtol=1e-9)))
        stats = session.stats()
        print(f"{stats.ops} ops, {stats.round_trips['results']} results asked for")


if __name__ == "__main__":
    asyncio.run(main())
