"""The namespace for the tests of a file.

``GPUREMOTE_TEST_BACKEND=cupy`` runs them on a GPU, where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import gpuremote.cupy
from gpuremote.testing.servers import RunningServer, device_server
from tests.conftest import LOOP


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    backend = os.environ.get("GPUREMOTE_TEST_BACKEND", "numpy")
    if backend == "numpy":
        yield request.getfixturevalue("numpy_server")
        return
    with device_server("--backend", backend, "--devices", "2") as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def xp(pytestconfig: pytest.Config, server: RunningServer) -> Iterator[Any]:
    uvloop = pytestconfig.stash[LOOP][0].startswith("uvloop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUREMOTE_URL", server.url)
        patch.setenv("GPUREMOTE_TRANSPORT", "shm" if uvloop else "tcp")
        gpuremote.cupy.session()  # now, or its sockets were the first test's
    yield gpuremote.cupy
    gpuremote.cupy.close()
