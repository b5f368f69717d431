"""What both kinds of session have in common."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gpuremote._dtypes import check_dtype
from gpuremote._types import Shape
from gpuremote.client.array import RemoteArray
from gpuremote.client.core import Core
from gpuremote.client.device import Device
from gpuremote.client.link import Link
from gpuremote.client.stats import SessionStats
from gpuremote.client.waits import Wait
from gpuremote.config import Settings, Target
from gpuremote.memory.host import output_view
from gpuremote.rpc.transports import Explanation
from gpuremote.transport.certificates import TlsClient
from gpuremote.transport.lanes.offer import LanePolicy
from gpuremote.wire.caps import INLINE_PAYLOAD

__all__ = ["SessionBase", "TransportView", "make_core", "make_link"]

D = TypeVar("D", bound=Device[Any])


class TransportView:
    """The transport of a session, for people and programs."""

    def __init__(self, link: Link, core: Core) -> None:
        self._link = link
        self._core = core

    @property
    def name(self) -> str:
        """The one in use."""
        return self._link.explanation.chosen

    def explain(self) -> Explanation:
        """Which transport is in use, every candidate, and why (not). Prints well."""
        known, connection = self._link.explanation, self._core.peer.connection
        if connection is None or connection.name != known.chosen:
            return known
        # What a connection says of itself may change while it is in use.
        return dataclasses.replace(known, connection=dict(connection.describe()))

    def subscribe(self, told: Callable[[Explanation], None]) -> Callable[[], None]:
        """Have ``told`` called with the new explanation whenever the transport changes: a hook
        for metrics. It may come from any thread and must not block.

        Returns
        -------
        callable
            Ends it.
        """
        self._link.on_transport.append(told)
        return lambda: self._link.on_transport.remove(told)

    def __repr__(self) -> str:
        return f"<transport {self.name}>"


class SessionBase(Generic[D]):
    """A session, without a way to wait.

    Attributes
    ----------
    devices : tuple of Device
    transport : TransportView
    """

    devices: tuple[D, ...]

    def __init__(self, link: Link, core: Core, on_close: Callable[[], None] | None) -> None:
        self._core = core
        self._link = link
        self._on_close = on_close
        self._closed = False
        self.transport = TransportView(link, core)
        core.owner = self

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._core.state.value.value
        return f"<{type(self).__name__} {self._link.name} {state}>"

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def backend(self) -> str:
        """Name of the server's backend."""
        return self._link.welcome.backend

    @property
    def memory_limit(self) -> int:
        """Bytes of device memory that this session may hold."""
        return self._link.welcome.memory_limit

    @property
    def worker_pid(self) -> int:
        """Process that executes this session, on the server's host."""
        return self._link.welcome.worker

    @property
    def draining(self) -> bool:
        """Whether the server has said that it is shutting down."""
        return self._core.draining

    def empty(self, shape: int | Shape, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
        """A local array to be filled and uploaded, in memory that the transport sends from without
        copying where there is such memory (``shm``: the server sees it too, and putting the array
        whole moves no bytes). Its values are whatever lies there.

        Returns
        -------
        numpy.ndarray
            C-contiguous, writable; after ``put`` read-only.
        """
        kind = check_dtype(dtype)
        count = math.prod(shape) if isinstance(shape, tuple) else operator.index(shape)
        nbytes = count * kind.itemsize
        core = self._core
        if nbytes > INLINE_PAYLOAD and core.peer.bulk_in_flight > 1:
            core.poll()  # the memory of earlier ones may be back
        block = core.allocate(nbytes) if nbytes > INLINE_PAYLOAD else None
        if block is None:
            return np.empty(shape, kind)
        array = np.frombuffer(block, kind).reshape(shape)
        core.note_made(array, block)
        return array

    def flush(self) -> None:
        """Send what was issued, without waiting for anything."""
        self._core.flush()

    def stats(self) -> SessionStats:
        """A copy of this session's counters."""
        return self._core.snapshot()

    def _set_devices(self, device_type: Any, array_type: Any) -> None:
        welcome = self._link.welcome
        self.devices = tuple(
            device_type(self._core, array_type, index, facts, self._link.name)
            for index, facts in enumerate(welcome.devices)
        )
        self._core.devices = list(self.devices)

    def _ask_many(
        self, arrays: Sequence[RemoteArray], out: Sequence[Any] | None
    ) -> tuple[list[Any], list[Wait]]:
        """Ask for several arrays; only the first one counts as a round trip."""
        if out is not None and len(out) != len(arrays):
            raise ValueError(f"{len(arrays)} arrays and {len(out)} places to put them")
        targets = (
            [array._host_target(place) for array, place in zip(arrays, out, strict=True)]
            if out is not None
            else [(h := np.empty(a.shape, a.dtype), output_view(h)) for a in arrays]
        )
        waits = []
        for array, (_, view) in zip(arrays, targets, strict=True):
            waits.append(array._ask_bytes(view))
        if len(waits) > 1:
            # They were all asked for before the first was waited for.
            self._core.trips["get"] -= len(waits) - 1
        return [host for host, _ in targets], waits

    def _raise_failures(self) -> None:
        failure = self._core.take_failures()
        if failure is not None:
            raise failure

    def _finish_close(self) -> None:
        self._closed = True
        self._core.close()


def make_core(link: Link) -> Core:
    """A core with the settings of the environment."""
    settings = Settings.from_env(os.environ)
    return Core(
        link.name,
        stack_depth=settings.stack,
        sync=settings.debug == "sync",
        download_policy=settings.download,
        dedupe=link.dedupe,
    )


def make_link(target: Target, host: str, port: int) -> Link:
    """The link that a URL asks for, with the token of the environment (not to a server that this
    process has started itself, which needs no TLS either)."""
    settings = Settings.from_env(os.environ)
    cafile = target.cafile or settings.cafile
    tls = None
    if target.scheme != "local" and (
        target.tls or (target.tls is None and (cafile or target.certfile))
    ):
        tls = TlsClient(cafile, target.certfile or "", target.keyfile or "")
    return Link(
        host,
        port,
        connect_timeout=target.connect_timeout,
        transport=target.transport or (None if target.require else settings.transport or None),
        require=target.require,
        memory_limit=target.memory or 0,
        grace=target.grace,
        token=settings.token if target.scheme != "local" else b"",
        tls=tls,
        lanes=LanePolicy(target.lanes, target.compression),
        dedupe=target.dedupe,
    )
