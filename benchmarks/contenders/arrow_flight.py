"""pyarrow Flight: ``do_put`` and ``do_get`` of one record batch with one column of bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.contenders.base import TRANSFERS, Bytes, Contender, Peer, now

__all__ = ["Flight", "serve"]

_arrow: Final[Any] = importlib.import_module("pyarrow")
_flight: Final[Any] = importlib.import_module("pyarrow.flight")
_SCHEMA: Final = _arrow.schema([("bytes", _arrow.uint8())])
_WHERE: Final = "grpc://127.0.0.1:"


class Flight(Contender):
    """Neither side copies in Python, but for the copy into the caller's array."""

    kinds = TRANSFERS | {"round_trip"}

    def open(self) -> None:
        self._peer = Peer("arrow_flight", self.setup.congestion)
        self._client = _flight.FlightClient(f"{_WHERE}{self._peer.port}")

    def close(self) -> None:
        self._client.close()
        self._peer.close()

    @property
    def peer(self) -> int:
        return self._peer.pid

    def round_trips(self, size: int, count: int) -> list[int]:
        action = _flight.Action("echo", bytes(size))
        times = []
        for _ in range(count):
            begin = now()
            list(self._client.do_action(action))
            times.append(now() - begin)
        return times

    def puts(self, source: Bytes, count: int) -> list[int]:
        column = _arrow.Array.from_buffers(
            _arrow.uint8(), source.nbytes, [None, _arrow.py_buffer(source)]
        )
        batch = _arrow.RecordBatch.from_arrays([column], schema=_SCHEMA)
        descriptor = _flight.FlightDescriptor.for_path("kept")
        times = []
        for _ in range(count):
            begin = now()
            writer, _ = self._client.do_put(descriptor, _SCHEMA)
            writer.write_batch(batch)
            writer.close()
            times.append(now() - begin)
        return times

    def gets(self, out: Bytes, count: int) -> list[int]:
        ticket = _flight.Ticket(b"kept")
        times = []
        for _ in range(count):
            begin = now()
            batch = self._client.do_get(ticket).read_chunk().data
            data = np.frombuffer(batch.column(0).buffers()[1], np.uint8, out.nbytes)
            self.handed.append(now() - begin)
            np.copyto(out, data)
            times.append(now() - begin)
        return times

    def forget(self) -> None:
        list(self._client.do_action(_flight.Action("forget", b"")))


class _Server(_flight.FlightServerBase):  # type: ignore[misc]  # the package has no types
    def __init__(self) -> None:
        super().__init__(f"{_WHERE}0")
        self._kept: Any = None

    def do_put(self, _context: Any, _descriptor: Any, reader: Any, _writer: Any) -> None:
        self._kept = reader.read_chunk().data

    def do_get(self, _context: Any, _ticket: Any) -> Any:
        return _flight.GeneratorStream(_SCHEMA, iter([self._kept]))

    def do_action(self, _context: Any, action: Any) -> list[bytes]:
        if action.type == "forget":
            self._kept = None
        return [action.body.to_pybytes()]


def serve(_congestion: str, ready: Callable[[int], None]) -> None:
    server = _Server()
    ready(server.port)
    server.serve()
