"""A copy from one server to another: the bytes do not pass through this process.

Prints, among other things::

    equal: True
    bytes of arrays through here: 0
"""

from __future__ import annotations

import numpy as np

import gpuremote
from gpuremote.testing.servers import device_server


def main() -> None:
    with (
        device_server() as first,
        device_server() as second,
        gpuremote.connect_sync(first.url) as one,
        gpuremote.connect_sync(second.url) as two,
    ):
        x = one.devices[0].random_uniform((1000, 1000), seed=7)
        y = x.copy_to(two.devices[0])
        print(f"{y.nbytes:,} bytes from {x.device} to {y.device}")
        print("equal:", bool(np.isclose(float(x.sum()), float(y.sum()))))
        print(f"bytes of arrays through here: {two.stats().payload_received:,}")


if __name__ == "__main__":
    main()
