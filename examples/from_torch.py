"""PyTorch tensors in and out, through DLPack: the memory is shared, not converted.

Prints, among other things::

    equal: True
"""

from __future__ import annotations

import sys

import gpuremote

try:
    import torch
except ImportError:
    sys.exit("this example needs PyTorch: pip install torch")


def main() -> None:
    weights = torch.linspace(-1.0, 1.0, 1_000_000).reshape(1000, 1000)
    with gpuremote.connect_sync() as session:
        device = session.devices[0]
        x = device.put(weights)
        y = x @ x.T
        result = torch.empty(1000, 1000)
        y.get(out=result)
        print("equal:", torch.allclose(result, weights @ weights.T, rtol=1e-4))
        print(f"bytes copied on this side: {session.stats().payload_copied:,} of {x.nbytes:,}")


if __name__ == "__main__":
    main()
