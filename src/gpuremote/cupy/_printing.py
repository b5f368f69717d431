"""Arrays as text, as host arrays and in files of this host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.client.array import RemoteArray
from gpuremote.cupy._array import ndarray, single
from gpuremote.cupy._creation import asarray

__all__ = [
    "array2string",
    "array_repr",
    "array_str",
    "asnumpy",
    "disp",
    "frombuffer",
    "fromfile",
    "fromiter",
    "fromstring",
    "genfromtxt",
    "load",
    "loadtxt",
    "save",
    "savetxt",
    "savez",
    "savez_compressed",
]


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> npt.NDArray[Any]:
    """The values as a NumPy array (one round trip); a host array as it is."""
    if isinstance(a, ndarray):
        found: npt.NDArray[Any] = a.get(out, order=order)
        return found
    host = np.asarray(a)
    if out is None:
        return host
    out[...] = host
    return np.asarray(out)


def _shown(x: RemoteArray) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    """What is printed of an array, and options that make NumPy print the same as of the whole:
    of a large one, only the edges are fetched."""
    options = np.get_printoptions()
    edge = options["edgeitems"]
    if x.size <= options["threshold"]:
        return asnumpy(x), {}
    found: Any = x
    for axis, length in enumerate(x.shape):
        if length > 2 * edge:
            # One more than is shown, for which NumPy puts the dots.
            places = np.r_[0 : edge + 1, length - edge : length]
            found = single("take", found, asarray(places, device=x.device), axis=axis)
    return asnumpy(found), {"threshold": 0, "edgeitems": edge}


def array2string(a: Any, *args: Any, **kwargs: Any) -> str:
    if not isinstance(a, RemoteArray):
        return np.array2string(a, *args, **kwargs)
    if "threshold" in kwargs or "edgeitems" in kwargs:
        return np.array2string(asnumpy(a), *args, **kwargs)
    host, options = _shown(a)
    return np.array2string(host, *args, **{**options, **kwargs})


def array_repr(
    arr: Any,
    max_line_width: int | None = None,
    precision: int | None = None,
    suppress_small: bool | None = None,
) -> str:
    if not isinstance(arr, RemoteArray):
        return np.array_repr(arr, max_line_width, precision, suppress_small)
    host, options = _shown(arr)
    with np.printoptions(**options):
        text = np.array_repr(host, max_line_width, precision, suppress_small)
    if options and host.shape != arr.shape:  # NumPy adds the shape of what is not shown whole
        text = text.replace(f"shape={host.shape}", f"shape={arr.shape}")
    return text


def array_str(
    a: Any,
    max_line_width: int | None = None,
    precision: int | None = None,
    suppress_small: bool | None = None,
) -> str:
    if not isinstance(a, RemoteArray):
        return np.array_str(a, max_line_width, precision, suppress_small)
    host, options = _shown(a)
    with np.printoptions(**options):
        return np.array_str(host, max_line_width, precision, suppress_small)


def disp(mesg: Any, device: Any = None, linefeed: bool = True) -> None:
    text = str(mesg) + ("\n" if linefeed else "")
    if device is None:
        print(text, end="")
    else:
        device.write(text)


def save(file: Any, arr: Any, allow_pickle: bool | None = None) -> None:
    np.save(file, asnumpy(arr), allow_pickle=False)


def savez(file: Any, *args: Any, **kwds: Any) -> None:
    named: dict[str, Any] = {name: asnumpy(x) for name, x in kwds.items()}
    np.savez(file, *map(asnumpy, args), **named)


def savez_compressed(file: Any, *args: Any, **kwds: Any) -> None:
    named: dict[str, Any] = {name: asnumpy(x) for name, x in kwds.items()}
    np.savez_compressed(file, *map(asnumpy, args), **named)


def savetxt(fname: Any, X: Any, *args: Any, **kwargs: Any) -> None:
    np.savetxt(fname, asnumpy(X), *args, **kwargs)


def load(file: Any, mmap_mode: Any = None, allow_pickle: bool | None = None) -> Any:
    """Arrays of an ``.npy`` or ``.npz`` file of this host, uploaded; never unpickled."""
    found = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return asarray(found)
    with found:
        return {name: asarray(found[name]) for name in found.files}


def frombuffer(*args: Any, **kwargs: Any) -> ndarray:
    return asarray(np.frombuffer(*args, **kwargs))


def fromfile(*args: Any, **kwargs: Any) -> ndarray:
    return asarray(np.fromfile(*args, **kwargs))


def fromiter(*args: Any, **kwargs: Any) -> ndarray:
    return asarray(np.fromiter(*args, **kwargs))


def fromstring(*args: Any, **kwargs: Any) -> ndarray:
    return asarray(np.fromstring(*args, **kwargs))


def genfromtxt(*args: Any, **kwargs: Any) -> ndarray:
    return asarray(np.genfromtxt(*args, **kwargs))


def loadtxt(*args: Any, **kwargs: Any) -> ndarray:
    return asarray(np.loadtxt(*args, **kwargs))
