"""Backends by name."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from gpuremote.backend import registry
from gpuremote.backend.cupy_kernels import CLIENT_KERNELS
from gpuremote.backend.kernels import MAKERS
from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.errors import ConfigError
from gpuremote.ops.catalogue import CATALOGUE


def test_built_in() -> None:
    assert {"numpy", "cupy"} <= set(registry.names())
    assert registry.find("numpy") is NumpyBackend
    backend = registry.create("numpy", devices=2)
    assert backend.name == "numpy"
    assert len(backend.devices()) == 2


def test_unknown() -> None:
    with pytest.raises(ConfigError, match=r"no backend named 'abacus'; there are .*numpy"):
        registry.find("abacus")


def test_probes_say_why() -> None:
    probes = {probe.name: probe for probe in registry.probe_all()}
    assert probes["numpy"].available
    assert probes["numpy"].reason.startswith("NumPy ")
    assert probes["cupy"].reason.startswith("CuPy")


def registered(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, registry.GROUP)

    def entry_points(**_: Any) -> list[EntryPoint]:
        return [point]

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_registered_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "other", "gpuremote.backend.numpy_backend:NumpyBackend")
    assert registry.names() == ["cupy", "numpy", "other", "torch", "torch-cpu"]
    assert registry.find("other") is NumpyBackend


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("no_such_module:X", "can't be loaded"),
        ("gpuremote.errors:NoSuchClass", "can't be loaded"),
        ("gpuremote.errors:OpError", "not a Backend"),
    ],
)
def test_broken_registrations(monkeypatch: pytest.MonkeyPatch, value: str, text: str) -> None:
    registered(monkeypatch, "broken", value)
    with pytest.raises(ConfigError, match=text):
        registry.find("broken")
    probe = next(p for p in registry.probe_all() if p.name == "broken")
    assert not probe.available
    assert text in probe.reason


def test_a_backend_that_does_not_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyBackend, "probe", classmethod(lambda _cls: (False, "no abacus")))
    with pytest.raises(ConfigError, match="does not work here: no abacus"):
        registry.create("numpy")


def test_every_op_has_a_kernel() -> None:
    without = {name for name, spec in CATALOGUE.items() if not spec.path}
    assert MAKERS.keys() | CLIENT_KERNELS.keys() == without
    assert MAKERS.keys().isdisjoint(CLIENT_KERNELS)


def test_the_numpy_backend_does_not_import_cupy_or_torch() -> None:
    code = (
        "import sys; from gpuremote.backend import registry; registry.create('numpy');"
        "sys.exit(bool({'cupy', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
