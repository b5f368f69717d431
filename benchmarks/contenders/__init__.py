"""One module per contender; this one knows them by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from benchmarks.contenders.base import Contender, Setup
from benchmarks.machine import allowed_congestion
from benchmarks.workloads import FamilyName
from gpuremote.transport.select import probe

__all__ = ["CONTENDERS", "Entry", "Path", "Traits"]

Path: TypeAlias = Literal["TCP", "same-host memory", "one process"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a contender does with memory; figures mean little without it.

    Attributes
    ----------
    path : str
        What the bytes go through.
    one_sided : bool
        Whether a transfer needs no code of the other side's for each one.
    reuse : str
        Which memory is registered or kept from one transfer to the next.
    put_into, get_into : str
        Where the bytes of a put lie on the other side, and those of a get on this one.
    """

    path: Path
    one_sided: bool
    reuse: str
    put_into: str
    get_into: str


KEPT: Final = "the receiver's buffer is kept"
REGISTERED: Final = "both buffers are registered once and kept"
NONE: Final = "nothing"
CALLERS: Final = "the caller's array"
FROM_HERE: Final = "the caller's array, from where its put left it: the server is not asked again"
WITHDRAWN: Final = "pooled memory: that of the put before the last one, as no op has used it"
REUSED: Final = "a buffer that is reused"
FRESH: Final = "fresh memory"
FRESH_COPIED: Final = "fresh memory, then copied to the caller's array"
VIEW_COPIED: Final = "a view of reused memory, then copied to the caller's array"

_SOCKETS: Final = Traits("TCP", False, KEPT, REUSED, CALLERS)
_OURS: Final = Traits("TCP", False, "the server's memory pool", "pooled memory", CALLERS)
_RPC: Final = Traits("TCP", False, NONE, FRESH, FRESH_COPIED)
_RDMA_LIKE: Final = Traits("TCP", True, REGISTERED, REUSED, CALLERS)


def _shared(traits: Traits) -> Traits:
    return Traits(
        "same-host memory", traits.one_sided, traits.reuse, traits.put_into, traits.get_into
    )


def _no_shm() -> str:
    found = next(candidate for candidate in probe() if candidate.name == "shm")
    return "" if found.available else found.reason


def _no_bbr() -> str:
    return "" if "bbr" in allowed_congestion() else "bbr may not be set on this system"


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender that may take part.

    Attributes
    ----------
    name : str
        In the results.
    title : str
        For people.
    module, type_name : str
        Where its class is.
    needs : str
        Package that has to be there; a contender without it is left out, and named.
    extra : str
        Optional dependencies of this project that bring the package.
    families : tuple of str
        Runs that it takes part in.
    traits : Traits or None
        None where no transfer is measured.
    option : str
        Tells contenders of one class apart (:attr:`~benchmarks.contenders.base.Setup.option`).
    lacks : callable
        Why it can't take part, other than for want of a package.
    """

    name: str
    title: str
    module: str
    type_name: str
    needs: str = ""
    extra: str = ""
    families: tuple[FamilyName, ...] = ("core",)
    traits: Traits | None = None
    option: str = ""
    lacks: Callable[[], str] = lambda: ""

    @property
    def server(self) -> bool:
        """Whether it needs device servers."""
        return self.module.startswith("device_")

    def missing(self) -> str:
        """Why it can't take part; "" if it can.

        Packages of an extra are only looked for, not loaded: what is wrong with one that is
        there shows in the process that loads it, and is said of it in the results.
        """
        if self.extra:
            if importlib.util.find_spec(self.needs.partition(".")[0]) is None:
                return f"{self.needs} is not installed (pip install 'gpuremote[{self.extra}]')"
        elif self.needs:
            try:
                importlib.import_module(self.needs)
            except ImportError as error:
                return f"{self.needs} can't be imported ({error})"
        return self.lacks()

    def make(self, setup: Setup) -> Contender:
        """The contender, not opened yet."""
        module = importlib.import_module(f"benchmarks.contenders.{self.module}")
        found: type[Contender] = getattr(module, self.type_name)
        return found(replace(setup, option=self.option))


_ALL: Final[tuple[FamilyName, ...]] = ("core", "peers")
_PEERS: Final[tuple[FamilyName, ...]] = ("peers",)
_DISTANCE: Final[tuple[FamilyName, ...]] = ("distance",)


def _peer(
    name: str, title: str, module: str, type_name: str, needs: str, extra: str, traits: Traits
) -> Entry:
    """Another library; what follows the last hyphen of its name is its option."""
    option = name.rpartition("-")[2] if "-" in name else ""
    return Entry(name, title, module, type_name, needs, extra, _PEERS, traits, option)


CONTENDERS: Final = {
    entry.name: entry
    for entry in (
        Entry(
            "gpuremote",
            "gpuremote, blocking",
            "device_blocking",
            "BlockingDevices",
            families=_ALL,
            traits=_OURS,
        ),
        Entry(
            "gpuremote-uvloop",
            "gpuremote, uvloop",
            "device_async",
            "UvloopDevices",
            "uvloop",
            families=_ALL,
            traits=_OURS,
        ),
        Entry("gpuremote-asyncio", "gpuremote, asyncio", "device_async", "AsyncioDevices"),
        Entry(
            "gpuremote-bbr",
            "gpuremote, blocking, made to use bbr",
            "device_paths",
            "OtherCongestion",
            families=_PEERS,
            traits=_OURS,
            option="bbr",
            lacks=_no_bbr,
        ),
        Entry("sockets", "blocking sockets", "sockets", "Sockets", families=_ALL, traits=_SOCKETS),
        Entry("uvloop-echo", "raw uvloop echo, awaited", "uvloop_echo", "Awaited", "uvloop"),
        Entry("uvloop-callbacks", "raw uvloop echo", "uvloop_echo", "CalledBack", "uvloop"),
        Entry("streams", "asyncio streams", "streams", "Streams"),
        Entry(
            "pyzmq",
            "pyzmq",
            "zeromq",
            "ZeroMQ",
            "zmq",
            families=_ALL,
            traits=Traits("TCP", False, NONE, FRESH, FRESH_COPIED),
        ),
        _peer("gloo", "gloo (torch.distributed)", "gloo", "Gloo", "torch", "bench-gloo", _SOCKETS),
        _peer("ucxx-tcp", "ucxx, core API, tcp", "ucx", "Ucxx", "ucxx", "bench-ucxx", _SOCKETS),
        _peer(
            "nixl-tcp", "nixl (UCX), tcp", "nixl_agents", "Nixl", "nixl", "bench-nixl", _RDMA_LIKE
        ),
        _peer(
            "mooncake",
            "mooncake-transfer-engine",
            "mooncake_engine",
            "Mooncake",
            "mooncake.engine",
            "bench-mooncake",
            _RDMA_LIKE,
        ),
        _peer(
            "grpc",
            "grpcio, streams of 4 MiB",
            "grpc_calls",
            "Grpc",
            "grpc",
            "bench-grpc",
            Traits("TCP", False, NONE, FRESH, "fresh pieces, joined in the caller's array"),
        ),
        _peer(
            "flight", "pyarrow Flight", "arrow_flight", "Flight", "pyarrow", "bench-flight", _RPC
        ),
        _peer(
            "ray-tcp",
            "ray, two nodes",
            "ray_actors",
            "Ray",
            "ray",
            "bench-ray",
            Traits("TCP", False, "each node's object store", "the object store", VIEW_COPIED),
        ),
        _peer(
            "dask", "dask distributed, comm", "dask_comm", "Dask", "distributed", "bench-dask", _RPC
        ),
        Entry(
            "gpuremote-shm",
            "gpuremote, shared memory",
            "device_paths",
            "SharedMemory",
            families=_PEERS,
            traits=_shared(replace(_OURS, put_into=WITHDRAWN, get_into=FROM_HERE)),
            lacks=_no_shm,
        ),
        Entry(
            "gpuremote-shm-results",
            "gpuremote, shared memory, arrays of ops",
            "device_paths",
            "SharedResults",
            families=_PEERS,
            traits=_shared(_OURS),
            lacks=_no_shm,
        ),
        Entry(
            "gpuremote-shm-empty",
            "gpuremote, shared memory, arrays of session.empty",
            "device_paths",
            "SharedArrays",
            families=_PEERS,
            traits=Traits(
                "same-host memory", False, "the arena", "the arena, nothing is moved", FROM_HERE
            ),
            lacks=_no_shm,
        ),
        _peer(
            "ucxx-shm",
            "ucxx, core API, shared memory",
            "ucx",
            "Ucxx",
            "ucxx",
            "bench-ucxx",
            _shared(_SOCKETS),
        ),
        _peer(
            "nixl-shm",
            "nixl (UCX), shared memory",
            "nixl_agents",
            "Nixl",
            "nixl",
            "bench-nixl",
            _shared(_RDMA_LIKE),
        ),
        _peer(
            "ray-shm",
            "ray, one node",
            "ray_actors",
            "Ray",
            "ray",
            "bench-ray",
            Traits("same-host memory", False, "the object store", "the object store", VIEW_COPIED),
        ),
        Entry(
            "memfd",
            "memfd and a message, by hand",
            "memfd",
            "Memfd",
            families=_PEERS,
            traits=Traits(
                "same-host memory", False, "one warm mapping on both sides", "the mapping", CALLERS
            ),
        ),
        Entry(
            "memcpy",
            "memcpy",
            "memcpy",
            "Memcpy",
            families=_ALL,
            traits=Traits("one process", True, "warm memory", REUSED, CALLERS),
        ),
        Entry(
            "far-gpuremote",
            "gpuremote, one connection",
            "device_distance",
            "FarDevices",
            families=_DISTANCE,
            traits=_OURS,
        ),
        Entry(
            "far-gpuremote-lanes",
            "gpuremote, lanes",
            "device_distance",
            "FarLanes",
            families=_DISTANCE,
            traits=_OURS,
        ),
        Entry(
            "far-sockets",
            "blocking sockets, 1 connection",
            "distance",
            "FarSockets",
            families=_DISTANCE,
            traits=_SOCKETS,
            option="1",
        ),
        Entry(
            "far-sockets-8",
            "blocking sockets, 8 connections",
            "distance",
            "FarSockets",
            families=_DISTANCE,
            traits=_SOCKETS,
            option="8",
        ),
    )
}
