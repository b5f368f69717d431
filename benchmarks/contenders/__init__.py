"""One module per contender; this one knows them by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Final

from benchmarks.contenders.base import Contender, Setup

__all__ = ["CONTENDERS", "Entry"]


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
    """

    name: str
    title: str
    module: str
    type_name: str
    needs: str = ""

    @property
    def server(self) -> bool:
        """Whether it needs device servers."""
        return self.module.startswith("device_")

    def missing(self) -> str:
        """Why it can't take part; "" if it can."""
        if self.needs:
            try:
                importlib.import_module(self.needs)
            except ImportError as error:
                return f"{self.needs} can't be imported ({error})"
        return ""

    def make(self, setup: Setup) -> Contender:
        """The contender, not opened yet."""
        module = importlib.import_module(f"benchmarks.contenders.{self.module}")
        found: type[Contender] = getattr(module, self.type_name)
        return found(setup)


CONTENDERS: Final = {
    entry.name: entry
    for entry in (
        Entry("gpuremote", "gpuremote, blocking", "device_blocking", "BlockingDevices"),
        Entry("gpuremote-uvloop", "gpuremote, uvloop", "device_async", "UvloopDevices", "uvloop"),
        Entry("gpuremote-asyncio", "gpuremote, asyncio", "device_async", "AsyncioDevices"),
        Entry("sockets", "blocking sockets", "sockets", "Sockets"),
        Entry("uvloop-echo", "raw uvloop echo, awaited", "uvloop_echo", "Awaited", "uvloop"),
        Entry("uvloop-callbacks", "raw uvloop echo", "uvloop_echo", "CalledBack", "uvloop"),
        Entry("streams", "asyncio streams", "streams", "Streams"),
        Entry("pyzmq", "pyzmq", "zeromq", "ZeroMQ", "zmq"),
        Entry("memcpy", "memcpy", "memcpy", "Memcpy"),
    )
}
