"""ucxx by its core API: tag messages, and a thread that polls while it waits.

That is the fastest way to use it from Python; its asyncio API takes several times as long for a
small message.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.contenders._control import accept, connect
from benchmarks.contenders._requests import ACK, ECHO, FORGET, GET, PUT, REQUEST
from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now

__all__ = ["UCX", "Ucxx", "serve"]

UCX: Final = {
    # Segments of 8 KiB, the default, make it 4 to 5 times slower.
    "tcp": {
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": "lo",
        "UCX_TCP_TX_SEG_SIZE": "256k",
        "UCX_TCP_RX_SEG_SIZE": "256k",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    },
    # Shared memory for what is small, copies between the processes' memory (CMA) for the rest.
    "shm": {"UCX_TLS": "sm,self", "UCX_WARN_UNUSED_ENV_VARS": "n"},
}
"""Environment by option."""


class _Line:
    """Messages over one endpoint, each waited for by polling."""

    def __init__(self) -> None:
        ucx = self._ucx = importlib.import_module("ucxx._lib.libucxx")
        self._array = importlib.import_module("ucxx._lib.arr").Array
        context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
        self._worker = ucx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()

    def address(self) -> bytes:
        return bytes(self._worker.address)

    def reach(self, address: bytes, to: int, of: int) -> None:
        """Connect to the worker of this address, with the tags of either direction."""
        ucx = self._ucx
        self._endpoint = ucx.UCXEndpoint.create_from_worker_address(
            self._worker, ucx.UCXAddress.create_from_buffer(address), endpoint_error_handling=False
        )
        self._to, self._of = ucx.UCXXTag(to), ucx.UCXXTag(of)

    def send(self, data: Bytes) -> None:
        self._wait(self._endpoint.tag_send(self._array(data), tag=self._to))

    def receive(self, out: Bytes) -> None:
        self._wait(self._endpoint.tag_recv(self._array(out), tag=self._of))

    def _wait(self, request: Any) -> None:
        progress = self._worker.progress
        while not request.completed:
            progress()
        request.check_error()


class Ucxx(Contender):
    """``tag_send`` and ``tag_recv``."""

    kinds = TRANSFERS | {"round_trip"}
    restless = True

    def open(self) -> None:
        os.environ.update(UCX[self.setup.option])
        self._peer = Peer("ucx", self.setup.congestion)
        line = self._line = _Line()
        self._control = connect(self._peer.port)
        self._control.send(line.address())
        line.reach(self._control.receive(), 1, 2)
        self._done = np.zeros(len(ACK), np.uint8)

    def close(self) -> None:
        self._control.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        line = self._line
        data, back = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self._request(ECHO, count, size)
        times = []
        for _ in range(count):
            begin = now()
            line.send(data)
            line.receive(back)
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        line = self._line
        times = []
        for _ in range(count):
            begin = now()
            self._request(PUT, 1, source.nbytes)
            line.send(source)
            line.receive(self._done)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._request(GET, 1, out.nbytes)
            self._line.receive(out)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._request(FORGET, 0, 0)
        self._line.receive(self._done)

    def _request(self, what: int, count: int, size: int) -> None:
        self._line.send(np.frombuffer(bytearray(REQUEST.pack(what, count, size)), np.uint8))


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    control = accept(ready)
    line = _Line()
    line.reach(control.receive(), 2, 1)
    control.send(line.address())
    request, done = np.zeros(REQUEST.size, np.uint8), np.frombuffer(bytearray(ACK), np.uint8)
    kept: Bytes = np.empty(0, np.uint8)
    while True:
        line.receive(request)
        what, count, size = REQUEST.unpack(request.data)
        if what == ECHO:
            buffer = np.zeros(size, np.uint8)
            for _ in range(count):
                line.receive(buffer)
                line.send(buffer)
        elif what == PUT:
            if kept.nbytes != size:
                kept = np.empty(size, np.uint8)
            line.receive(kept)
            line.send(done)
        elif what == GET:
            line.send(kept)
        elif what == FORGET:
            kept = np.empty(0, np.uint8)
            line.send(done)
