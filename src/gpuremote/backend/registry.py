"""Backends by name. Others register in the entry point group ``gpuremote.backends``."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import entry_points

from gpuremote.backend.base import Backend
from gpuremote.errors import ConfigError

__all__ = ["GROUP", "Probe", "check", "create", "find", "names", "probe_all"]

GROUP = "gpuremote.backends"

# Also known without an installed distribution (a source tree on the path).
_BUILT_IN = {
    "numpy": "gpuremote.backend.numpy_backend:NumpyBackend",
    "cupy": "gpuremote.backend.cupy_backend:CupyBackend",
    "torch": "gpuremote.backend.torch_backend:TorchBackend",
    "torch-cpu": "gpuremote.backend.torch_host:HostTorchBackend",
}


_BUILDS_ON = {"torch": "torch", "torch-cpu": "torch"}
"""What takes seconds to load, which is left to the processes that execute."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a backend works here.

    Attributes
    ----------
    name : str
    available : bool
    reason : str
        What was found, or what is missing.
    """

    name: str
    available: bool
    reason: str


def names() -> list[str]:
    """Names of all registered backends."""
    return sorted(_BUILT_IN.keys() | {point.name for point in entry_points(group=GROUP)})


def find(name: str) -> type[Backend]:
    """The class of a backend; nothing else is imported for it.

    Raises
    ------
    ConfigError
        No such backend, or it can't be imported.
    """
    target = _BUILT_IN.get(name)
    if target is None:
        points = [point.value for point in entry_points(group=GROUP) if point.name == name]
        if not points:
            raise ConfigError(f"no backend named {name!r}; there are {', '.join(names())}")
        target = points[0]
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend {name!r} can't be loaded: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Backend):
        raise ConfigError(f"backend {name!r} is {target}, which is not a Backend")
    return found


def check(name: str) -> None:
    """Find out whether there is such a backend, as far as that goes without loading it.

    Raises
    ------
    ConfigError
        There is none, or what it builds on is not installed.
    """
    needed = _BUILDS_ON.get(name)
    if needed is None:
        find(name)
    elif importlib.util.find_spec(needed) is None:
        raise ConfigError(f"backend {name!r} can't be loaded: No module named {needed!r}")


def create(name: str, devices: int = 0) -> Backend:
    """A backend that offers so many devices (0: as many as it has).

    Raises
    ------
    ConfigError
        No such backend, or it does not work on this machine.
    """
    backend = find(name)
    available, reason = backend.probe()
    if not available:
        raise ConfigError(f"backend {name!r} does not work here: {reason}")
    return backend(devices)


def probe_all() -> list[Probe]:
    """What each registered backend finds on this machine; never raises."""
    found = []
    for name in names():
        try:
            available, reason = find(name).probe()
        except Exception as error:  # Somebody else's backend must not break the list.
            available, reason = False, f"{type(error).__name__}: {error}"
        found.append(Probe(name, available, reason))
    return found
