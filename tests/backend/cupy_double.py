"""A double of CuPy for machines without a CUDA device: NumPy behind CuPy's manners.

It keeps what code written for NumPy trips over: arrays that are no NumPy arrays and never turn
into one by themselves, host arrays refused as operands, results that are always arrays, fewer
functions and keywords than NumPy has (as of CuPy 14), devices that don't see each other's
arrays, uploads that happen when the stream gets there and read the host memory only then.
It says nothing about speed, and nothing about rounding on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np

from gpuremote.testing.fake_cuda import FakeCuda

__all__ = ["CupyDouble"]

# Functions that CuPy lacks, and keywords that its functions lack.
ABSENT = {"vecdot", "cumulative_sum", "cumulative_prod", "unique_values", "matrix_norm"}
ABSENT_LINALG = {"svdvals", "vector_norm", "matrix_norm"}
KEYWORDS: dict[str, set[str]] = {
    "count_nonzero": {"axis"},
    "sort": {"axis", "kind"},
    "argsort": {"axis", "kind"},
    "unique": {"return_index", "return_inverse", "return_counts", "axis", "equal_nan"},
    "cholesky": set(),
    "pinv": {"rcond"},
    "svd": {"full_matrices", "compute_uv"},
    "norm": {"ord", "axis", "keepdims"},
    "take": {"axis", "out"},
    "clip": {"out"},
}


class Memory:
    """One allocation."""


class Array:
    """CuPy's ndarray, as far as the backend may know it."""

    def __init__(self, cupy: CupyDouble, host: Any, memory: Memory, device: int) -> None:
        self.cupy = cupy
        self.host: Any = host
        self.data = SimpleNamespace(mem=memory, ptr=cupy.told_of(host, device))
        self.device = Device(cupy, device)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "ndim", "size", "nbytes", "flags"):
            return getattr(self.host, name)
        if name in ("real", "imag"):
            return self.cupy.adopt(getattr(self.host, name), self)
        if name in ("astype", "copy", "conj", "swapaxes", "reshape", "view"):
            method = getattr(self.host, name)
            return lambda *args, **kwargs: self.cupy.run(lambda: method(*args, **kwargs), [self])
        raise AttributeError(name)

    @property
    def base(self) -> Any:
        return None if self.host.base is None else self.data.mem

    def __getitem__(self, index: Any) -> Array:
        found = self.cupy.run(lambda: self.host[self.cupy.host_index(index)], [self])
        assert isinstance(found, Array)
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        self.cupy.run(
            lambda: self.host.__setitem__(self.cupy.host_index(index), self.cupy.host(value)),
            [self],
        )

    def __mul__(self, other: Any) -> Any:
        return self.cupy.multiply(self, other)

    def __add__(self, other: Any) -> Any:
        return self.cupy.add(self, other)

    def __mod__(self, other: Any) -> Any:
        return self.cupy.remainder(self, other)

    def __sub__(self, other: Any) -> Any:
        return self.cupy.subtract(self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.cupy.subtract(other, self)

    def set(self, host: Any, stream: Stream) -> None:
        assert isinstance(host, np.ndarray)
        assert host.shape == self.shape
        stream.give(lambda: np.copyto(self.host, host))

    def get(self, stream: Stream, out: Any) -> Any:
        assert self.host.flags.c_contiguous
        assert out.shape == self.shape
        stream.give(lambda: np.copyto(out, self.host))
        return out


class Device:
    """The current one inside ``with``."""

    def __init__(self, cupy: CupyDouble, index: int) -> None:
        self.cupy = cupy
        self.id = index

    def __enter__(self) -> Self:
        self.cupy.current.append(self.id)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cupy.current.pop()


class Event:
    """Passed when its stream gets there."""

    done = False
    when = 0.0
    synchronized = 0

    def synchronize(self) -> None:
        self.synchronized += 1
        self.done = True


class Stream:
    """A queue that runs when somebody waits for it."""

    null: Stream

    def __init__(self, cupy: CupyDouble, non_blocking: bool = False) -> None:
        self.cupy = cupy
        self.non_blocking = non_blocking
        self.ptr = 0
        self.queue: list[Callable[[], Any]] = []
        self.waited: list[Event] = []

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        self.give(lambda: self._pass(event))
        return event

    @property
    def done(self) -> bool:
        return not self.queue

    def give(self, step: Callable[[], Any]) -> None:
        self.queue.append(step)
        if self.cupy.prompt:
            self.synchronize()

    def _pass(self, event: Event) -> None:
        self.cupy.clock += 1.5
        event.when = self.cupy.clock
        event.done = True

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def __enter__(self) -> Self:
        self.cupy.streams.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cupy.streams.pop()


class CupyDouble:
    """Stands where the module ``cupy`` would.

    Parameters
    ----------
    devices : int
        CUDA devices that it pretends to find.
    driver : FakeCuda, optional
        Is told of every array's memory.
    prompt : bool
        Streams do at once what they are given.
    """

    __version__ = "double"

    def __init__(
        self, devices: int = 1, driver: FakeCuda | None = None, *, prompt: bool = False
    ) -> None:
        self.driver = driver
        self.prompt = prompt
        self.current = [0]
        self.clock = 0.0
        self.pinned: list[bytearray] = []
        null = Stream(self)
        self.streams = [null]
        names = [f"double {i}".encode() for i in range(devices)]
        self.cuda = SimpleNamespace(
            Device=lambda index: Device(self, index),
            Event=Event,
            Stream=_StreamClass(self, null),
            alloc_pinned_memory=self._pin,
            get_current_stream=lambda: self.streams[-1],
            get_elapsed_time=lambda start, end: end.when - start.when,
            runtime=SimpleNamespace(
                getDeviceCount=lambda: devices,
                getDeviceProperties=lambda i: {"name": names[i], "totalGlobalMem": 1 << 30},
            ),
        )
        self.linalg = _Functions(self, np.linalg, ABSENT_LINALG)
        self.random = SimpleNamespace(
            Philox4x3210=np.random.Philox,
            Generator=_GeneratorClass(self),
            RandomState=_StateClass(self),
        )
        self._functions = _Functions(self, np, ABSENT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def _pin(self, nbytes: int) -> bytearray:
        # CuPy's allocation is rounded up too.
        self.pinned.append(bytearray(max(512, 1 << math.ceil(math.log2(nbytes)))))
        return self.pinned[-1]

    def adopt(self, found: Any, source: Array | None = None) -> Array:
        """A result as an array: of the source's memory if it is a view of it."""
        host = np.asarray(found)
        if source is not None and np.shares_memory(host, source.host):
            return Array(self, host, source.data.mem, source.device.id)
        return Array(self, host, Memory(), self.current[-1])

    def told_of(self, host: Any, device: int) -> int:
        """The address of an array, which from here on is a device's."""
        address = int(host.ctypes.data)
        if self.driver is not None and host.nbytes and not self.driver.owns(address):
            self.driver.adopt(address, host.nbytes, host, device=device)
        return address

    def upload(self, host: Any, device: int = 0) -> Array:
        return Array(self, np.array(host), Memory(), device)

    def host(self, value: Any) -> Any:
        """An operand for NumPy; refused if CuPy would."""
        if isinstance(value, Array):
            if value.device.id != self.current[-1]:
                raise ValueError(f"array of device {value.device.id} used on {self.current[-1]}")
            return value.host
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if isinstance(value, tuple | list):
            return type(value)(map(self.host, value))
        return value

    def host_index(self, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        return tuple(map(self.host, items))

    def run(self, function: Callable[[], Any], operands: list[Any]) -> Any:
        """Run on the current stream, behind what it has queued."""
        self.streams[-1].synchronize()
        arrays = [x for x in operands if isinstance(x, Array)]
        for x in arrays:
            self.host(x)
        found = function()
        source = arrays[0] if arrays else None
        if isinstance(found, tuple):
            return tuple(self.adopt(x, source) for x in found)
        return None if found is None else self.adopt(found, source)

    def array(self, x: Array) -> Array:
        """A copy on the current device, from any device."""
        return Array(self, x.host.copy(), Memory(), self.current[-1])

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        if isinstance(x, Array):
            return x if dtype is None or x.dtype == dtype else x.astype(dtype)
        return self.adopt(np.asarray(x, dtype))


class _StreamClass:
    def __init__(self, cupy: CupyDouble, null: Stream) -> None:
        self._cupy = cupy
        self.null = null

    def __call__(self, non_blocking: bool = False) -> Stream:
        return Stream(self._cupy, non_blocking)


class _Generator:
    """CuPy's, which takes less than NumPy's: no NumPy scalars, and arrays of 8 bytes an element.

    The counts of integers that it can't draw are those which it passes on as something else.
    """

    def __init__(self, cupy: CupyDouble, source: Any) -> None:
        self._cupy = cupy
        self._source = source

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._source, name)

        def call(*args: Any, **kwargs: Any) -> Array:
            for value in args:
                wide = isinstance(value, Array) and value.dtype.itemsize == 8
                assert wide or type(value) in (int, float, tuple, str, np.dtype), value
            return self._cupy.adopt(method(*map(self._cupy.host, args), **kwargs))

        return call

    def integers(self, low: int, high: int, size: Any, dtype: Any, endpoint: bool) -> Array:
        assert type(low) is type(high) is int
        last = high - low
        assert last < 1 << 31 or 1 << 32 <= last < 1 << 63
        return self._cupy.adopt(self._source.integers(low, high, size, dtype, endpoint))


class _GeneratorClass:
    def __init__(self, cupy: CupyDouble) -> None:
        self._cupy = cupy

    def __call__(self, bits: Any) -> _Generator:
        return _Generator(self._cupy, np.random.Generator(bits))

    def __getattr__(self, name: str) -> Any:
        if name in ("vonmises", "zipf"):
            raise AttributeError(name)
        return getattr(np.random.Generator, name)


class _StateClass:
    def __init__(self, cupy: CupyDouble) -> None:
        self._cupy = cupy

    def __call__(self, seed: int) -> _Generator:
        return _Generator(self._cupy, np.random.RandomState(seed % (1 << 32)))

    def __getattr__(self, name: str) -> Any:
        return getattr(np.random.RandomState, name)


class _Functions:
    """Functions of a NumPy namespace that take and give the double's arrays."""

    def __init__(self, cupy: CupyDouble, namespace: Any, absent: set[str]) -> None:
        self._cupy = cupy
        self._namespace = namespace
        self._absent = absent

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        function = getattr(self._namespace, name)
        if isinstance(function, type):
            return function
        cupy, allowed = self._cupy, KEYWORDS.get(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if allowed is not None and not kwargs.keys() <= allowed:
                raise TypeError(f"{name}() got an unexpected keyword argument")
            operands = [*args, *(args[0] if args and isinstance(args[0], tuple) else ())]
            return cupy.run(
                lambda: function(
                    *map(cupy.host, args), **{k: cupy.host(v) for k, v in kwargs.items()}
                ),
                operands,
            )

        return call


@contextmanager
def on_device(cupy: CupyDouble, index: int) -> Iterator[None]:
    """Work on a device for a while."""
    with Device(cupy, index):
        yield
