"""The fixtures that programs use in their own tests, in a test run of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpuremote.testing

CONFTEST = 'pytest_plugins = ["gpuremote.testing.fixtures"]\n'
TESTS = """
import gpuremote
import pytest
from gpuremote.errors import OutOfDeviceMemory


def test_values(gpuremote_session):
    x = gpuremote_session.devices[0].arange(4)
    assert (x * 2).tolist() == [0, 2, 4, 6]


def test_the_server_has_the_options(gpuremote_session):
    assert len(gpuremote_session.devices) == 3
    with pytest.raises(OutOfDeviceMemory):
        gpuremote_session.devices[0].zeros(1 << 20).get()


def test_a_network_that_breaks(gpuremote_network):
    with gpuremote.connect_sync(gpuremote_network.url) as session:
        x = session.devices[0].arange(4)
        gpuremote_network.cut()
        assert x.sum().item() == 6
        assert session.stats().reconnects == 1


def test_what_nobody_waited_for(gpuremote_session):
    gpuremote_session.devices[0].arange(3) ** -1
"""


def test_fixtures(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_program.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\ngpuremote_server_options = --devices 3 --memory-limit 1MiB\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert "4 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "ERROR test_program.py::test_what_nobody_waited_for" in done.stdout
    assert "negative integer" in done.stdout


def test_what_there_is_to_test_with() -> None:
    assert set(gpuremote.testing.__all__) == {
        "CuttingProxy",
        "EmulatedConnection",
        "RunningServer",
        "device_server",
    }
