"""The two drivers behind one interface, so that a test of faults is written once for both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

import gpuremote

__all__ = ["AsyncSide", "BlockingSide", "Side", "slow"]


LIMIT = 20.0


class Side:
    """One of the drivers.

    ``do(x.get())`` gives the answer on either: here the call itself has waited, there it made
    something to await.
    """

    name = ""

    def connect(self, url: str) -> Any:
        raise NotImplementedError

    def do(self, answer: Any) -> Any:
        raise NotImplementedError

    @contextmanager
    def session(self, url: str) -> Iterator[Any]:
        """A session that is closed in the end, whatever it went through."""
        session = self.do(self.connect(url))
        try:
            yield session
        finally:
            self.do(session.close(raise_failures=False))

    def close(self) -> None:
        """Give back what the side itself needs."""


class BlockingSide(Side):
    """Waits in this thread."""

    name = "blocking"

    def connect(self, url: str) -> Any:
        return gpuremote.connect_sync(url)

    def do(self, answer: Any) -> Any:
        return answer


class AsyncSide(Side):
    """Waits in an event loop, which turns only meanwhile."""

    name = "asyncio"

    def __init__(self, make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = make_loop()

    def connect(self, url: str) -> Any:
        return gpuremote.connect(url)

    def do(self, answer: Any) -> Any:
        return self.loop.run_until_complete(_awaited(answer))

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


async def _awaited(answer: Awaitable[Any]) -> Any:
    # The timeout of pytest comes as a signal, which not every loop passes on.
    task = asyncio.ensure_future(_await(answer))
    await asyncio.wait([task], timeout=LIMIT)
    assert task.done(), f"nothing came within {LIMIT:.0f} s"
    try:
        return task.result()
    finally:
        del task  # it has the error, the error this frame: a circle that would hold buffers


async def _await(answer: Awaitable[Any]) -> Any:
    return await answer


def slow(device: Any, elements: int = 6_000_000) -> Any:
    """Numbers that take long to sort."""
    return device.random_uniform(elements, 1)


def in_order(numbers: Any) -> Any:
    """Sorted; for 6 million numbers an op of half a second."""
    return np.sort(numbers)


def counted(session: Any, side: Side) -> tuple[dict[str, Any], int]:
    """What the server counted, and the records that this side had issued before it asked."""
    answer = side.do(session.server_stats())
    return answer, session.stats().records


def pattern(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Bytes that are the same each time and nowhere periodic."""
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)
