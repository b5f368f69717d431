"""gpuremote, blocking, over emulated long ways."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.contenders.base import Bytes, Contender, RelayProcess
from benchmarks.contenders.device_blocking import BlockingDevices
from benchmarks.workloads import DISTANCES

__all__ = ["FarDevices", "FarLanes"]


class FarDevices(Contender):
    """A session per distance, each with one connection."""

    kinds = frozenset({"put", "get", "intact", "round_trip"})
    query = "&lanes=1"

    def open(self) -> None:
        server, _, options = self.setup.url.partition("?")
        host, _, port = server.rpartition(":")
        self._relays = {d: RelayProcess(int(port), d) for d in DISTANCES}
        self._sessions = {}
        for distance, relay in self._relays.items():
            url = f"{host}:{relay.port}?{options}{self.query}"
            self._sessions[distance] = BlockingDevices(replace(self.setup, url=url))
            self._sessions[distance].open()
        self.move_to(DISTANCES[0])

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        for relay in self._relays.values():
            relay.close()

    @property
    def peer(self) -> int:
        return self._here.peer

    def facts(self) -> dict[str, object]:
        return {f"{d} ms": session.facts() for d, session in self._sessions.items()}

    def move_to(self, distance: int) -> None:
        self._here = self._sessions[distance]

    def round_trips(self, size: int, count: int) -> list[int]:
        return self._here.round_trips(size, count)

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._here.puts(source, count)

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._here.gets(out, count)

    def forget(self) -> None:
        self._here.forget()


class FarLanes(FarDevices):
    """As many connections as the way needs, found by the library itself."""

    query = "&lanes=auto"
