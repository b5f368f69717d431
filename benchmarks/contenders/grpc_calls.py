"""grpcio: one call per transfer, bytes without a serializer, streamed in pieces.

Streams of 4 MiB are faster than single messages of the whole size, which it copies more often.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now
from benchmarks.workloads import MIB

__all__ = ["Grpc", "serve"]

grpc: Final[Any] = importlib.import_module("grpc")
PIECE: Final = 4 * MIB
OPTIONS: Final = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
NAME: Final = "benchmarks"


class Grpc(Contender):
    """``stream_unary`` for a put, ``unary_stream`` for a get, ``unary_unary`` for a round trip."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        self._peer = Peer("grpc_calls", self.setup.congestion)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self._peer.port}", OPTIONS)
        self._echo = self._channel.unary_unary(f"/{NAME}/echo")
        self._put = self._channel.stream_unary(f"/{NAME}/put")
        self._get = self._channel.unary_stream(f"/{NAME}/get")

    def close(self) -> None:
        self._channel.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        echo, data = self._echo, bytes(size)
        times = []
        for _ in range(count):
            begin = now()
            echo(data)
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        times = []
        for _ in range(count):
            begin = now()
            self._put(_pieces(source))
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        view = out.data
        times = []
        for _ in range(count):
            begin = now()
            got = 0
            for piece in self._get(b""):
                view[got : got + len(piece)] = piece
                got += len(piece)
            times.append(now() - begin)
            assert got == out.nbytes
        return times

    def forget(self) -> None:
        self._put(_pieces(np.empty(0, np.uint8)))


def _pieces(data: Bytes) -> Iterator[bytes]:
    """It takes bytes and nothing else."""
    for begin in range(0, data.nbytes, PIECE):
        yield data[begin : begin + PIECE].tobytes()


class _Kept:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def echo(self, data: bytes, _context: Any) -> bytes:
        return data

    def put(self, pieces: Iterator[bytes], _context: Any) -> bytes:
        self.pieces = list(pieces)
        return b""

    def get(self, _request: bytes, _context: Any) -> Iterator[bytes]:
        yield from self.pieces


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    kept = _Kept()
    server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                NAME,
                {
                    "echo": grpc.unary_unary_rpc_method_handler(kept.echo),
                    "put": grpc.stream_unary_rpc_method_handler(kept.put),
                    "get": grpc.unary_stream_rpc_method_handler(kept.get),
                },
            )
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ready(port)
    threading.Event().wait()
