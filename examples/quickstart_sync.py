"""A first session for code that blocks.

Prints, among other things::

    [10.  4.]
    LinearAlgebraError: Singular matrix
"""

from __future__ import annotations

import numpy as np

import gpuremote


def main() -> None:
    with gpuremote.connect_sync() as session:
        device = session.devices[0]
        x = device.put(np.arange(6.0).reshape(2, 3))
        x[0] *= 10.0
        mean = np.mean(x, axis=1)
        print(mean.get())
        buffer = np.empty(x.shape)
        x.get(out=buffer)
        print(buffer)
        try:
            np.linalg.inv(device.zeros((2, 2))).get()
        except gpuremote.GpuRemoteError as error:
            print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
