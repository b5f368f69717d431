"""A session's part in what is kept of uploads: it holds no memory for it, and bounds what it does.

The daemon is a socket that answers when the test says so.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest

from gpuremote.backend.numpy_backend import NumpyBackend
from gpuremote.server import control
from gpuremote.server.session import WorkerSession
from gpuremote.server.storage import Storage
from gpuremote.wire import caps
from gpuremote.wire.batch import PREFIX, Op, blob_record, fixed_record, free_record
from gpuremote.wire.frames import Kind, pack_info

MiB: Final = 1 << 20


class Staged(NumpyBackend):
    """As a GPU: what comes lies in other memory first."""

    exports_memory = False

    def receive_view(self, array: Any) -> memoryview:
        return memoryview(bytearray(array.nbytes))

    def received(self, array: Any, target: Any) -> None:
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(target, np.uint8)


class Client:
    """Says to a session what a client says, without a connection."""

    def __init__(self, backend: NumpyBackend, memory: int) -> None:
        self.session = WorkerSession(backend, memory)
        self.daemon, self.session.sharing.channel = control.pair()
        self.daemon.settimeout(10)
        self.number = 1
        self.answers: dict[int, Any] = {}
        self.session.answers.info = self._heard  # type: ignore[method-assign]

    def _heard(self, number: int, value: Any) -> None:
        self.answers[number] = value

    def say(self, *records: bytes) -> int:
        """The number of the first."""
        first = self.number
        self.number += len(records)
        with self.session.lock:
            body = PREFIX.pack(first) + b"".join(records)
            self.session.on_message(Kind.BATCH, 0, memoryview(body))
        return first

    def put(self, nbytes: int) -> int:
        """Upload what may be kept."""
        session = self.session
        number = self.say(blob_record(Op.PUT, blob=pack_info([[nbytes], "u1", 0, True])))
        with session.lock:
            if (arrival := session.arriving(number)) is None:
                return 0
            session.place(number, arrival, "put")
            arrival.view[:] = bytes([number]) * nbytes
            del arrival
            session.peer_copy_done(number, None)
        return number

    def free(self, number: int) -> None:
        self.say(free_record([number]))

    def hear(self) -> dict[str, Any]:
        """What the session asks the daemon."""
        return control.receive_file(self.daemon)[0]

    def end(self) -> None:
        """The daemon is gone."""
        self.daemon.close()
        until(lambda: not self.session.sharing.active)

    def close(self) -> None:
        self.end()
        self.session.sharing.close()
        assert self.session.sharing.channel is not None
        self.session.sharing.channel.close()


@pytest.fixture(params=[NumpyBackend, Staged])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    made = Client(request.param(), 6 * MiB)
    yield made
    made.close()
    assert made.session.sharing.asked == 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_waits_to_be_copied_gives_way(client: Client) -> None:
    first = client.put(2 * MiB)
    second = client.put(3 * MiB)
    assert client.hear()["nbytes"] == 2 * MiB  # its thread waits for the answer
    client.free(first)
    client.free(second)
    third = client.put(4 * MiB)
    assert third
    assert not client.put(4 * MiB)  # the program has that itself
    Storage(client.session.quota, 2 * MiB)  # what an op makes
    client.free(third)
    assert client.put(5 * MiB)


def test_what_fits_lets_it_be(client: Client) -> None:
    client.free(client.put(2 * MiB))
    assert client.hear()["nbytes"] == 2 * MiB
    assert client.put(4 * MiB)
    control.send_file(client.daemon, {"ticket": 1})
    brought, descriptor = control.receive_file(client.daemon)
    assert brought == {"bring": 1}
    with open(descriptor, "rb") as file:
        assert file.read() == bytes([1]) * 2 * MiB


@pytest.mark.parametrize("client", [NumpyBackend], indirect=True)
def test_what_was_dropped_is_not_brought(client: Client) -> None:
    client.free(client.put(4 * MiB))
    client.hear()
    assert client.put(4 * MiB)
    control.send_file(client.daemon, {"ticket": 1})
    assert control.receive_file(client.daemon) == ({"bring": 1}, -1)
    assert client.hear()["nbytes"] == 4 * MiB  # the next


def test_what_is_staged_is_bounded() -> None:
    client = Client(Staged(), 6 * MiB)
    for _ in range(10):
        client.free(client.put(2 * MiB))
    assert client.session.sharing.active == 3
    client.end()
    client.free(client.put(2 * MiB))
    assert client.session.sharing.active <= 1
    client.close()


def offer(nbytes: int) -> bytes:
    digest = hashlib.sha256(bytes(nbytes)).digest()
    return blob_record(Op.OFFER, blob=pack_info([[nbytes], "u1", 0, digest]))


def test_an_offer_that_is_taken_back_holds_nothing(client: Client) -> None:
    number = client.say(offer(4 * MiB))
    assert "want" in client.hear()
    client.say(fixed_record(Op.CANCEL, number), free_record([number]))
    assert client.session.quota.used == 0
    assert client.put(4 * MiB)
    control.send_file(client.daemon, {"nbytes": -1})
    until(lambda: number in client.answers)
    assert client.answers[number] is False


def test_questions_are_bounded(client: Client) -> None:
    sharing, peer = client.session.sharing, client.session.peer
    first = client.say(fixed_record(Op.CONTENTS))
    assert client.hear() == {"list": 1}
    for _ in range(20):
        client.say(*[fixed_record(Op.CONTENTS)] * 500)
    assert sharing.active == 1
    assert client.answers == dict.fromkeys(range(first + 1, client.number))
    for _ in range(caps.MAX_QUESTIONS):
        number = client.say(offer(MiB))
        client.say(fixed_record(Op.CANCEL, number), free_record([number]))
    assert peer.held
    control.send_file(client.daemon, {"sketches": b"12345678"})
    until(lambda: first in client.answers)
    assert client.answers[first] == b"12345678"
    client.end()
    client.session.run_default()
    assert not peer.held
    again = client.say(fixed_record(Op.CONTENTS))
    until(lambda: again in client.answers)
    assert client.answers[again] is None  # nobody has looked
