"""The same namespace for another device: ``device.xp``."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from gpuremote.client.blocking import BlockingDevice
from gpuremote.cupy import _home
from gpuremote.cupy._array import ndarray
from gpuremote.cupy._elementwise import ufunc

__all__ = ["Namespace", "namespace_of"]

_INDEXED = ("c_", "mgrid", "ogrid", "r_")
_VERSIONS = ("2021.12", "2022.12", "2023.12", "2024.12")
_MODULES = ("fft", "linalg", "random")
_CLASSES = ("RandomState", "broadcast", "vectorize")
"""What these make is made where they were."""


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
        elif isinstance(found, ufunc):
            found = _Ufunc(found, self.device)
        elif name in _INDEXED:
            found = _Indexed(found, self.device)
        elif name in _CLASSES or (callable(found) and not isinstance(found, type)):
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


class _Ufunc(ufunc):
    """A ufunc whose operands that are not on a device yet go to this one."""

    def __init__(self, inner: ufunc, device: BlockingDevice) -> None:
        self.__dict__.update(inner.__dict__)
        self._device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _home.using(self._device):
            return super().__call__(*args, **kwargs)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        with _home.using(self._device):
            return super().reduce(*args, **kwargs)

    def accumulate(self, *args: Any, **kwargs: Any) -> Any:
        with _home.using(self._device):
            return super().accumulate(*args, **kwargs)

    def outer(self, *args: Any, **kwargs: Any) -> Any:
        with _home.using(self._device):
            return super().outer(*args, **kwargs)

    def at(self, *args: Any, **kwargs: Any) -> None:
        with _home.using(self._device):
            super().at(*args, **kwargs)


class _Indexed:
    """``r_`` and its like, on this device."""

    def __init__(self, inner: Any, device: BlockingDevice) -> None:
        self._inner = inner
        self._device = device

    def __getitem__(self, key: Any) -> Any:
        with _home.using(self._device):
            return self._inner[key]


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
