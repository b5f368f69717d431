"""Uploads for which there is room only once the ops before them have run, and ops for which there
is none beside the uploads behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpuremote.client.issuing import NEVER
from gpuremote.errors import OutOfDeviceMemory
from gpuremote.testing.servers import RunningServer, device_server
from tests.faults.sides import Side

MIB = 1 << 20
LIMIT = 40 * MIB


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with device_server("--memory-limit", str(LIMIT)) as running:
        yield running


def busy(side: Side, device: Any, ops: int = 12) -> Any:
    """A number that takes a while, made of 10 MiB that were dropped when it was issued."""
    x = device.random_uniform(10 * MIB // 8, 7)
    for _ in range(ops):
        x = np.sort(-x)
    return x.sum()


def test_an_upload_waits_for_what_ops_hold(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        total = busy(side, device)
        values = np.arange(30 * MIB // 8)
        uploaded = side.do(device.put(values))
        assert side.do(uploaded[-1].get()) == values[-1]
        assert side.do(total.get()) != 0
        side.do(session.synchronize())


def test_a_small_one_too(side: Side, server: RunningServer) -> None:
    """It travels inside a batch."""
    with side.session(server.url) as session:
        device = session.devices[0]
        kept = device.zeros((LIMIT - 31 * MIB) // 8)
        total = busy(side, device)
        small = [side.do(device.put(np.full(1000, k))) for k in range(200)]
        assert side.do(small[-1].sum().get()) == 199_000
        assert side.do(total.get()) != 0
        side.do(session.synchronize())
        del kept


def test_a_small_one_behind_what_was_dropped_in_the_same_batch(
    side: Side, server: RunningServer
) -> None:
    """To make room for it the server runs the ops before it: they may have what was dropped."""
    with side.session(server.url) as session:
        device = session.devices[0]
        arrays = [device.zeros(10 * MIB // 8) for _ in range(3)]
        kept = device.zeros(9 * MIB // 8)
        side.do(session.synchronize())
        session._core.flush_after = NEVER  # all of it in one batch
        last = arrays.pop()
        arrays.clear()
        negative = -last
        small = side.do(device.put(np.arange(1000)))
        assert side.do(negative.sum().get()) == 0
        assert side.do(small[-1].get()) == 999
        del kept


def test_ops_of_another_stream(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        stream = device.stream()
        with stream:
            total = busy(side, device)
        session.flush()
        uploaded = side.do(device.put(np.ones(28 * MIB // 8)))
        assert side.do(uploaded.sum().get()) == 28 * MIB // 8
        assert side.do(total.get()) != 0


def test_what_never_fits_fails_at_once(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        total = busy(side, device)
        with pytest.raises(OutOfDeviceMemory):
            side.do(side.do(device.put(np.ones(LIMIT // 8 + 1))).get())
        assert side.do(total.get()) != 0


def test_what_is_held_by_name_is_not_waited_for(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        kept = device.zeros(20 * MIB // 8)
        side.do(kept.wait())
        with pytest.raises(OutOfDeviceMemory):
            side.do(side.do(device.put(np.ones(30 * MIB // 8))).get())
        assert side.do(kept.sum().get()) == 0
