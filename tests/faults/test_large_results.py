"""Large results of several threads while connections break: every byte, and no other error."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import DeadlineExceeded
from gpuremote.testing.servers import RunningServer

MIB = 1 << 20
SIZES = (100_000, 300_000, MIB, 3_000_001, 9 * MIB)
GETS = 80


class Getter(threading.Thread):
    """Uploads, computes, downloads and compares, with a deadline that is too short now and then."""

    def __init__(self, device: Any, seed: int) -> None:
        super().__init__()
        self.device = device
        self.chance = random.Random(seed)
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(GETS):
                self._one()
        except BaseException as error:
            self.failure = error

    def _one(self) -> None:
        chance = self.chance
        host = np.full(chance.choice(SIZES), chance.randrange(250), np.uint8)
        host[::4097] = np.arange(len(host[::4097])) % 251
        array = self.device.put(host)
        result, out = array + np.uint8(1), np.zeros_like(host)
        if chance.random() < 0.2:
            try:
                result.get(out=out, timeout=0.002)
            except DeadlineExceeded:
                before = out.copy()
                time.sleep(0.002)
                assert np.array_equal(out, before), "it is written to after the deadline"
        result.get(out=out)
        assert np.array_equal(out, host + np.uint8(1))
        assert np.array_equal(array.get(), host)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_large_results_while_connections_break(server: RunningServer, transport: str) -> None:
    chance = random.Random(1)
    with gpuremote.connect_sync(f"{server.url}?transport={transport}") as session:
        getters = [Getter(session.devices[0], seed) for seed in range(3)]
        for getter in getters:
            getter.start()
        while any(getter.is_alive() for getter in getters):
            time.sleep(chance.uniform(0.01, 0.1))
            connection = session._core.peer.connection
            if connection is not None:
                connection.abort()
        for getter in getters:
            getter.join()
            if getter.failure is not None:
                raise getter.failure
        assert session.stats().reconnects > 0
