"""dask.distributed's comm layer over TCP: messages whose arrays travel as frames of their own."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.contenders._requests import ECHO, FORGET, GET, PUT
from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now

__all__ = ["Dask", "serve"]

_comm: Final[Any] = importlib.import_module("distributed.comm")
_to_serialize: Final[Any] = importlib.import_module("distributed.protocol").to_serialize


class Dask(Contender):
    """``write`` and ``read`` of one connection."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        self._peer = Peer("dask_comm", self.setup.congestion)
        self._runner = asyncio.Runner()
        self._line = self._runner.run(_connect(self._peer.port))

    def close(self) -> None:
        self._line.abort()
        self._runner.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        return self._runner.run(self._times({"what": ECHO, "data": bytes(size)}, count))

    def puts(self, source: Bytes, count: int) -> list[int]:
        return self._runner.run(self._times({"what": PUT, "data": _to_serialize(source)}, count))

    def gets(self, out: Bytes, count: int) -> list[int]:
        return self._runner.run(self._times({"what": GET}, count, out))

    def forget(self) -> None:
        self._runner.run(self._times({"what": FORGET}, 1))

    async def _times(self, message: dict[str, Any], count: int, out: Bytes | None = None) -> Any:
        line = self._line
        times = []
        for _ in range(count):
            begin = now()
            await line.write(message)
            answer = await line.read()
            if out is not None:
                self.handed.append(now() - begin)
                np.copyto(out, answer)
            times.append(now() - begin)
        return times


async def _connect(port: int) -> Any:
    return await _comm.connect(f"tcp://127.0.0.1:{port}")


async def _answer(line: Any) -> None:
    kept: Any = None
    try:
        while True:
            message = await line.read()
            answer: Any = "done"
            if message["what"] == ECHO:
                answer = message["data"]
            elif message["what"] == PUT:
                kept = message["data"]
            elif message["what"] == GET:
                answer = _to_serialize(kept)
            elif message["what"] == FORGET:
                kept = None
            await line.write(answer)
    except (_comm.CommClosedError, OSError):
        pass  # the client is done


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    async def listen() -> None:
        async with _comm.listen("tcp://127.0.0.1:0", _answer) as listener:
            ready(int(listener.contact_address.rpartition(":")[2]))
            await asyncio.Event().wait()

    asyncio.run(listen())
