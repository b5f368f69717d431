"""Streams and events: work that is not ordered, and how to order it.

Prints, among other things::

    meanwhile: 10
    after the event: (600, 600) True
"""

from __future__ import annotations

import gpuremote


def main() -> None:
    with gpuremote.connect_sync() as session:
        device = session.devices[0]
        slow, fast = device.stream(), device.stream()
        with slow:
            begin = slow.record()
            big = device.random_uniform((600, 600), seed=1)
            for _ in range(5):
                big = big @ big / 600.0
            done = slow.record()
        with fast:
            print("meanwhile:", device.arange(5).sum().item())
        fast.wait(done)
        with fast:
            print("after the event:", big.shape, bool((big >= 0).all()))
        print(f"the slow stream took {begin.elapsed_time(done):.1f} ms")


if __name__ == "__main__":
    main()
