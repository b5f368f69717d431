"""A first session with asyncio: ops return at once, only values are awaited.

Prints, among other things::

    (2, 2) float64, known before anything was computed
    [[ 6. 15.]
     [15. 51.]]
"""

from __future__ import annotations

import asyncio

import numpy as np

import gpuremote


async def main() -> None:
    async with gpuremote.connect() as session:
        device = session.devices[0]
        x = await device.put(np.arange(6.0).reshape(2, 3))
        y = x @ x.T + 1.0
        print(f"{y.shape} {y.dtype}, known before anything was computed")
        print(await y.get())

        # Results one after the other, some of them asked for ahead of time.
        powers = (x**k for k in range(4))
        async for values in session.results(powers):
            print(values.sum())
        print(session.transport.explain())


if __name__ == "__main__":
    asyncio.run(main())
