"""gloo by way of ``torch.distributed``: two ranks, blocking ``send`` and ``recv`` of tensors."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import numpy as np
import torch

from benchmarks.contenders._requests import ECHO, FORGET, GET, PUT
from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now

__all__ = ["Gloo", "serve"]

# Not all that it documents is declared as its own.
ranks: Final[Any] = importlib.import_module("torch.distributed")
CLIENT: Final = 1
SERVER: Final = 0


class Gloo(Contender):
    """Whatever is received fills a tensor that the receiver keeps."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        self._peer = Peer("gloo", self.setup.congestion)
        _join(ranks.TCPStore("127.0.0.1", self._peer.port, is_master=False), CLIENT)
        self._done = torch.zeros(1, dtype=torch.int64)

    def close(self) -> None:
        # Not destroy_process_group: it waits for the other side.
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        data, back = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        self._request(ECHO, count, size)
        times = []
        for _ in range(count):
            begin = now()
            ranks.send(data, SERVER)
            ranks.recv(back, SERVER)
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        tensor = torch.from_numpy(source)
        times = []
        for _ in range(count):
            begin = now()
            self._request(PUT, 1, source.nbytes)
            ranks.send(tensor, SERVER)
            ranks.recv(self._done, SERVER)
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        tensor = torch.from_numpy(out)
        times = []
        for _ in range(count):
            begin = now()
            self._request(GET, 1, out.nbytes)
            ranks.recv(tensor, SERVER)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        self._request(FORGET, 0, 0)
        ranks.recv(self._done, SERVER)

    def _request(self, what: int, count: int, size: int) -> None:
        ranks.send(torch.tensor([what, count, size], dtype=torch.int64), SERVER)


def _join(store: Any, rank: int) -> None:
    # It looks an interface up by the host's name otherwise.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=LONG)


LONG: Final = timedelta(hours=1)
"""The server's wait for the next request must not end before the run does."""


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    store = ranks.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ready(store.port)
    _join(store, SERVER)
    request, done = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    kept = torch.zeros(0, dtype=torch.uint8)
    while True:
        ranks.recv(request, CLIENT)
        what, count, size = request.tolist()
        if what == ECHO:
            buffer = torch.zeros(size, dtype=torch.uint8)
            for _ in range(count):
                ranks.recv(buffer, CLIENT)
                ranks.send(buffer, CLIENT)
        elif what == PUT:
            if kept.numel() != size:
                kept = torch.from_numpy(np.empty(size, np.uint8))
            ranks.recv(kept, CLIENT)
            ranks.send(done, CLIENT)
        elif what == GET:
            ranks.send(kept, CLIENT)
        elif what == FORGET:
            kept = torch.zeros(0, dtype=torch.uint8)
            ranks.send(done, CLIENT)
