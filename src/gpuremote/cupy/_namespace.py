"""The same namespace for another device: ``device.xp``."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from gpuremote.client.blocking import BlockingDevice
from gpuremote.cupy import _home
from gpuremote.cupy._array import ndarray

__all__ = ["Namespace", "namespace_of"]

_VERSIONS = ("2021.12", "2022.12", "2023.12", "2024.12")
_MODULES = ("fft", "linalg", "random")


class Namespace(ModuleType):
    """The functions of ``gpuremote.cupy``; what they make is made on one device.

    Attributes
    ----------
    device : Device
    """

    def __init__(self, module: ModuleType, device: BlockingDevice) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module = module
        self.device = device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not name.startswith("__array"):
            raise AttributeError(name)
        found = getattr(self._module, name)
        if name in _MODULES:
            found = Namespace(found, self.device)
        elif callable(found) and not isinstance(found, type):
            found = self._here(found)
        setattr(self, name, found)
        return found

    def _here(self, function: Any) -> Any:
        device = self.device

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _home.using(device):
                return function(*args, **kwargs)

        return call

    def __repr__(self) -> str:
        return f"<namespace {self.__name__!r} on {self.device}>"


def namespace_of(device: Any, version: str | None = None) -> ModuleType:
    """The namespace for arrays of a device: the module itself for the default one.

    Raises
    ------
    ValueError
        A version of the standard that is not offered.
    """
    if version is not None and version not in _VERSIONS:
        raise ValueError(f"version {version!r} of the array API is not one of {_VERSIONS}")
    module = importlib.import_module("gpuremote.cupy")
    device._array_type = ndarray
    default = _home._default
    if default is not None and not default.closed and device is default.devices[0]:
        return module
    found = getattr(device, "_namespace", None)
    if found is None:
        found = device._namespace = Namespace(module, device)
    return found
