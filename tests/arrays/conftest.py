"""The namespace for the tests of a file, on a server of its own.

``GPUREMOTE_TEST_BACKEND=cupy`` runs them on a GPU, where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import gpuremote.cupy
from gpuremote.testing.servers import device_server
from tests.conftest import LOOP


@pytest.fixture(scope="module", autouse=True)
def xp(pytestconfig: pytest.Config) -> Iterator[Any]:
    uvloop = pytestconfig.stash[LOOP][0].startswith("uvloop")
    backend = os.environ.get("GPUREMOTE_TEST_BACKEND", "numpy")
    options = ("--backend", backend, "--warm", "1", "--devices", "2")
    with device_server(*options) as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GPUREMOTE_URL", running.url)
            patch.setenv("GPUREMOTE_TRANSPORT", "shm" if uvloop else "tcp")
            gpuremote.cupy.session()  # now, or its sockets were the first test's
        yield gpuremote.cupy
        gpuremote.cupy.close()
