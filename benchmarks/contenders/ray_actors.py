"""ray: a put goes through the object store to an actor, a get back through it.

With two nodes on this machine every object is pulled from one node's store to the other's over
TCP; with one node both processes map the same store.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

import numpy as np

from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, now

__all__ = ["Ray"]

STORE: Final = 3 << 30
"""Bytes of a node's object store, which lie in shared memory where they are used."""
WAIT: Final = 45.0
"""Seconds that a call may take."""


class _Kept:
    """The other side."""

    def __init__(self) -> None:
        self.kept: Any = None

    def pid(self) -> int:
        return os.getpid()

    def echo(self, data: Any) -> Any:
        return data

    def put(self, data: Any) -> None:
        self.kept = data

    def get(self) -> Any:
        return self.kept


class Ray(Contender):
    """``ray.put``, and calls of an actor."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        # Its worker processes have to find this module.
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")])
        )
        ray = self._ray = importlib.import_module("ray")
        cluster = importlib.import_module("ray.cluster_utils").Cluster
        node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
        self._cluster = cluster(
            initialize_head=True, head_node_args={**node, "node_ip_address": "127.0.0.1"}
        )
        where = "head"
        if self.setup.option == "tcp":
            del node["include_dashboard"]
            self._cluster.add_node(**node, resources={"there": 1})
            where = "there"
        ray.init(address=self._cluster.address, log_to_driver=False)
        kept = ray.remote(_Kept)
        options = {"num_cpus": 0, "resources": {"there": 1} if where == "there" else {}}
        self._actor = kept.options(**options).remote()
        self._pid: int = self._wait(self._actor.pid.remote())

    def close(self) -> None:
        self._ray.shutdown()
        self._cluster.shutdown()

    @property
    def peer(self) -> int:
        return self._pid

    @property
    def processes(self) -> list[int]:
        nodes = self._cluster.list_all_nodes()
        daemons = [
            info.process.pid
            for node in nodes
            for all_ in node.all_processes.values()
            for info in all_
        ]
        return [os.getpid(), self._pid, *daemons]

    def round_trips(self, size: int, count: int) -> list[int]:
        data = bytes(size)
        times = []
        for _ in range(count):
            begin = now()
            self._wait(self._actor.echo.remote(data))
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._wait(self._actor.put.remote(self._ray.put(source)))
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            data = self._wait(self._actor.get.remote())
            self.handed.append(now() - begin)
            np.copyto(out, data)
            times.append(now() - begin)
            del data
        return times

    def forget(self) -> None:
        self._wait(self._actor.put.remote(None))

    def _wait(self, reference: Any) -> Any:
        return self._ray.get(reference, timeout=WAIT)
