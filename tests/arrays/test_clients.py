"""scikit-learn and SciPy on arrays of the namespace: same results, few waits, no downloads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from gpuremote.cupy import _home

MOST_TRIPS = {
    "PCA.fit_transform": 1,
    "StandardScaler": 5,
    "LinearDiscriminantAnalysis.fit": 14,
    "fftconvolve": 0,
    "logsumexp": 0,
    "softmax": 0,
    "fft": 0,
    "rfftn": 0,
    "xlogy": 0,
}


def clients(**settings: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.arrays.clients"],
        env={**os.environ, "GPUREMOTE_URL": f"gpu://{_home.session()._link.name}", **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_clients_that_speak_the_standard(xp: Any) -> None:
    found = clients()
    assert len(found) >= 27
    for name, client in found.items():
        assert client["error"] < 1e-7, (name, client)
        assert client["ops"] > 0, (name, client)
        assert client["downloads"] == 0, (name, client)
        assert client["trips"] <= MOST_TRIPS.get(name, 40), (name, client)


def test_clients_that_want_host_arrays(xp: Any) -> None:
    for name, client in clients(GPUREMOTE_DOWNLOAD="allow").items():
        assert client["error"] < 1e-7, (name, client)
        assert client["downloads"] > 0, (name, client)


def test_ten_thousand_ops_and_one_wait(xp: Any) -> None:
    x = xp.zeros(8)
    xp.session().synchronize()
    before = xp.session().stats()
    ops = xp.session().server_stats()["ops"]
    for _ in range(10_000):
        x = x + 1
    assert float(x.sum()) == 80_000
    after = xp.session().stats()
    trips = after.round_trips - before.round_trips
    trips.subtract({"stats": trips["stats"]})
    assert sum(trips.values()) == 1
    assert xp.session().server_stats()["ops"] - ops == 10_001


def test_the_values_are_there_and_not_here(xp: Any) -> None:
    """Without its server, nothing that was computed can be had."""
    import signal

    import gpuremote
    from gpuremote.testing.servers import device_server

    with device_server() as running, gpuremote.connect_sync(running.url + "?grace=0.2") as session:
        there = session.devices[0].xp
        x = there.arange(100.0)
        y = there.sin(x) @ x
        session.synchronize()
        os.kill(session.worker_pid, signal.SIGKILL)
        with pytest.raises(gpuremote.GpuRemoteError):
            float(y)
