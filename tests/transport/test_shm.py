"""What is particular to shared memory: blocks and who has them, what is copied, strangers."""

from __future__ import annotations

import array
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from gpuremote import _clock
from gpuremote.errors import ConnectionLost, GpuRemoteError, ProtocolError, TransportUnavailable
from gpuremote.memory import shared
from gpuremote.memory.shared import Arena, Loans, Place, SegmentInfo
from gpuremote.memory.shelves import SWEEP
from gpuremote.testing.driving import Ends, place
from gpuremote.transport import shm
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.setup import Setup, upgrade
from gpuremote.transport.shm import ShmConnection
from gpuremote.transport.shm_setup import Shm
from gpuremote.transport.tcp import TcpConnection
from gpuremote.transport.tcp import pair as tcp_pair

MIB = 1 << 20


class Side:
    """An arena, and the loans of its other end."""

    def __init__(self, limit: int = 64 * MIB) -> None:
        self.loans = Loans()
        self.passed: list[SegmentInfo] = []
        self.dropped: list[int] = []
        self.arena = Arena(limit, self._pass, self._drop)

    def _pass(self, info: SegmentInfo, fd: int) -> bool:
        self.loans.add(info, fd)
        self.passed.append(info)
        return True

    def _drop(self, ident: int) -> None:
        self.loans.drop(ident)
        self.dropped.append(ident)

    def lend(self, view: memoryview) -> Place:
        place = self.arena.find(view)
        assert place is not None
        self.arena.lend(place, given=self.arena.whole(place))
        return place


def block(side: Side, nbytes: int) -> memoryview:
    found = side.arena.allocate(nbytes)
    assert found is not None
    assert found.nbytes == nbytes
    return found


def test_both_ends_see_the_same_bytes() -> None:
    side = Side()
    here = block(side, 3 * MIB)
    here[:4] = b"abcd"
    there = side.loans.view(side.lend(here))
    assert bytes(there[:4]) == b"abcd"
    there[:4] = b"wxyz"
    assert bytes(here[:4]) == b"wxyz"


@pytest.mark.parametrize("nbytes", [1, 65536, 65537, MIB, MIB + 1, 5 * MIB])
def test_a_block_is_used_again_when_both_ends_have_dropped_it(nbytes: int) -> None:
    side = Side()
    first = block(side, nbytes)
    place = side.lend(first)
    there = side.loans.view(place)
    del first
    second = block(side, nbytes)
    assert side.arena.find(second) != place  # the other end still has it
    del there
    third = block(side, nbytes)
    assert side.arena.find(third) == place
    del second, third
    assert len(side.passed) <= 2


def test_a_block_stays_with_whoever_has_a_slice_of_it() -> None:
    side = Side()
    place = side.lend(block(side, MIB))
    part = np.frombuffer(side.loans.view(place), np.float32).reshape(512, 512)[3:5, ::2]
    other = block(side, MIB)
    assert side.arena.find(other) != place
    del part
    assert side.arena.find(block(side, MIB)) == place
    del other


def test_each_loan_has_to_come_back() -> None:
    side = Side()
    here = block(side, MIB)
    place = side.lend(here)
    views = [side.loans.view(place), side.loans.view(side.lend(here))]
    del here
    views.pop()
    other = block(side, MIB)
    assert side.arena.find(other) != place
    views.pop()
    assert side.arena.find(block(side, MIB)) == place
    del other


def test_the_block_that_was_left_last_is_taken_first() -> None:
    side = Side()
    blocks: list[memoryview | None] = [block(side, MIB) for _ in range(6)]
    places = [side.arena.find(view) for view in blocks if view is not None]
    for k in (2, 5, 0):
        blocks[k] = None
    assert [side.arena.find(view) for view in [block(side, MIB), block(side, MIB)]] == [
        places[0],
        places[5],
    ]
    del blocks


def test_loans_come_back_from_many_threads() -> None:
    side = Side()
    here = block(side, MIB)
    places = [side.lend(here) for _ in range(400)]
    expected = places[0]
    views = [[side.loans.view(place) for place in places[k::4]] for k in range(4)]
    threads = [threading.Thread(target=part.clear) for part in views]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del here
    assert side.arena.find(block(side, MIB)) == expected


def test_the_limit() -> None:
    side = Side(limit=9 * MIB)
    first = block(side, 5 * MIB)
    assert side.arena.allocate(5 * MIB) is None
    del first
    # Room is made by giving back what nobody uses.
    kept = block(side, 6 * MIB)
    assert side.dropped == [0]
    assert side.arena.nbytes <= 9 * MIB
    del kept


def test_a_block_that_nobody_uses_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side()
    there = side.loans.view(side.lend(block(side, 5 * MIB)))
    block(side, 10 * MIB)
    now = _clock.now()
    monkeypatch.setattr(_clock, "now", lambda: now + 2 * shared.KEPT)
    side.arena.collect()  # noticed only now that they were dropped
    monkeypatch.setattr(_clock, "now", lambda: now + 4 * shared.KEPT)
    side.arena.trim()
    assert side.dropped == [1]  # the other end has the first one
    del there
    side.arena.trim()
    assert side.dropped == [1, 0]
    assert side.arena.nbytes == 0


@pytest.mark.parametrize(
    "where",
    [
        Place(7, 0, 0, 1),
        Place(0, 4, 0, 1),
        Place(0, 0, 0, 2 * MIB),
        Place(0, 3, MIB, 1),
        Place(0, 0, 0, 0),
    ],
)
def test_places_that_do_not_exist(where: Place) -> None:
    side = Side()
    kept = block(side, MIB)
    assert side.passed == [SegmentInfo(0, MIB, 4)]
    with pytest.raises(ProtocolError):
        side.loans.view(where)
    del kept


@pytest.mark.parametrize(
    ("info", "size", "sealed"),
    [
        (SegmentInfo(0, MIB, 1), shared.PAGE + MIB, False),
        (SegmentInfo(0, MIB, 1), shared.PAGE + MIB - 1, True),
        (SegmentInfo(0, MIB + 1, 1), shared.PAGE + MIB + 1, True),
        (SegmentInfo(0, MIB, 0), shared.PAGE, True),
        (SegmentInfo(0, shared.PAGE, shared.MAX_BLOCKS + 1), shared.PAGE * 514, True),
        (SegmentInfo(0, 1 << 50, 1), shared.PAGE, True),
    ],
)
def test_segments_that_can_not_be_trusted(info: SegmentInfo, size: int, sealed: bool) -> None:
    """One that could shrink under its reader would end it with SIGBUS."""
    if sealed:
        fd = shared._new_segment(size)
    else:
        fd = os.memfd_create("gpuremote-test", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
    try:
        with pytest.raises(ProtocolError):
            Loans().add(info, fd)
    finally:
        os.close(fd)


def test_a_pipe_is_no_segment() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(ProtocolError):
            Loans().add(SegmentInfo(0, MIB, 1), read)
    finally:
        os.close(read)
        os.close(write)


# -- connections --------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[ShmConnection, ShmConnection]]:
    here, there = shm.pair(blocking=False)
    yield here, there
    here.abort()
    there.abort()


def allocated(connection: ShmConnection, nbytes: int) -> memoryview:
    found = connection.allocate(nbytes)
    assert found is not None
    return found


def test_what_is_given_away_is_not_copied(pair: tuple[ShmConnection, ShmConnection]) -> None:
    here, there = pair
    ends = Ends(here, there)
    given = allocated(here, 5 * MIB)
    given[:3] = b"abc"
    assert here.gives(given)
    here.send(b"", [here.register(given)])
    assert not here.gives(given)
    incoming = ends.receive(there)
    (adopted,) = incoming.adopt() or [memoryview(b"")]
    done: list[object] = []
    incoming.into([adopted], done.append)
    ends.until(lambda: done)
    assert bytes(adopted[:3]) == b"abc"
    for side in pair:
        assert side.stats.extra["copied_in"] == side.stats.extra["copied_out"] == 0
        assert side.stats.payload_copied == 0
    assert here.stats.payload_sent == there.stats.payload_received == 5 * MIB
    assert here.stats.sends == 1


def adopted_there(pair: tuple[ShmConnection, ShmConnection], ends: Ends) -> memoryview:
    """Memory of the first end that the second one has been given."""
    here, there = pair
    given = allocated(here, 5 * MIB)
    given[:3] = b"abc"
    here.send(b"", [here.register(given)])
    incoming = ends.receive(there)
    (adopted,) = incoming.adopt() or [memoryview(b"")]
    incoming.into([adopted])
    return adopted


def test_what_was_given_comes_back_by_one_copy(pair: tuple[ShmConnection, ShmConnection]) -> None:
    here, there = pair
    ends = Ends(here, there)
    adopted = adopted_there(pair, ends)
    there.send(b"", [Region(adopted[1:], steady=True), Region(b"", steady=True)])
    incoming = ends.receive(here)
    assert incoming.adopt() is None  # only lent
    assert bytes(place(ends, incoming)[0][:2]) == b"bc"
    assert there.stats.extra["copied_in"] == here.stats.extra["copied_in"] == 0
    assert here.stats.extra["copied_out"] == 5 * MIB - 1
    assert here.stats.payload_received == there.stats.payload_sent == 5 * MIB - 1
    # The block is used again when the other end has dropped it: nothing more is counted for it.
    assert here._arena.nbytes < 10 * MIB
    del adopted, incoming
    for _ in range(5):
        adopted_there(pair, ends)
    assert here._arena.nbytes < 17 * MIB


def test_what_may_change_meanwhile_is_copied(pair: tuple[ShmConnection, ShmConnection]) -> None:
    here, there = pair
    ends = Ends(here, there)
    adopted = adopted_there(pair, ends)
    there.send(b"", [there.register(adopted)])
    adopted[:3] = b"xyz"
    assert bytes(place(ends, ends.receive(here))[0][:3]) == b"abc"


@pytest.mark.parametrize(
    "where",
    [
        (shm.YOURS, 1, 0),  # was never sent
        (shm.YOURS, 9, 0),
        (shm.YOURS | 7, 0, 0),
        (shm.YOURS, 0, MIB - 99),
    ],
)
def test_memory_that_the_other_end_does_not_have(where: tuple[int, int, int]) -> None:
    raw, ours = socket.socketpair()
    side, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = ShmConnection(ours, side, blocking=False)
    with raw, theirs:
        connection.send(b"", [Region(allocated(connection, MIB))])
        kept = allocated(connection, MIB)
        raw.sendall(frame(shm.SHARED, shared_body(100, where, 100)))
        with pytest.raises(ProtocolError, match="does not have"):
            Ends(connection).receive(connection)
        connection.abort()
        del kept


def test_an_abort_by_another_thread_is_no_breach(
    pair: tuple[ShmConnection, ShmConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena may be closed while the receiving thread is about to look something up."""
    here, there = pair
    ends = Ends(here, there)
    adopted = adopted_there(pair, ends)
    there.send(b"", [Region(adopted, steady=True)])
    look = here._arena.look

    def aborted(place: Place) -> memoryview:
        thread = threading.Thread(target=here.abort)
        thread.start()
        thread.join()
        return look(place)

    monkeypatch.setattr(here._arena, "look", aborted)
    with pytest.raises(ConnectionLost, match="closed on this side"):
        ends.receive(here)


def test_a_great_many_blocks_that_are_kept_there() -> None:
    """Not all of them are looked at each time, and each is found when it has come back."""
    side = Side(limit=1 << 30)
    views = [side.loans.view(side.lend(block(side, 64 << 10))) for _ in range(300)]
    shelf = side.arena.shelf(64 << 10)
    assert shelf is not None
    looks = shelf.looks
    kept = [block(side, 64 << 10) for _ in range(20)]
    assert 20 <= shelf.looks - looks <= 20 * (SWEEP + 2)
    before = side.arena.nbytes
    views.clear()
    kept += [block(side, 64 << 10) for _ in range(300)]
    assert side.arena.nbytes <= before + (4 << 20) + shared.PAGE
    del kept


def test_other_memory_is_copied_once_where_it_is_adopted(
    pair: tuple[ShmConnection, ShmConnection],
) -> None:
    here, there = pair
    ends = Ends(here, there)
    source = os.urandom(21 * MIB)
    here.send(b"", [here.register(source[: 20 * MIB]), here.register(source[20 * MIB :])])
    incoming = ends.receive(there)
    adopted = incoming.adopt()
    assert adopted is not None
    done: list[object] = []
    incoming.into(adopted, done.append)
    ends.until(lambda: done)
    assert b"".join(adopted) == source
    assert here.stats.extra["copied_in"] == 21 * MIB
    assert there.stats.extra["copied_out"] == 0
    assert here.stats.payload_copied == there.stats.payload_copied == 0


def test_a_part_of_a_block_and_one_that_was_given_are_copied(
    pair: tuple[ShmConnection, ShmConnection],
) -> None:
    here, there = pair
    ends = Ends(here, there)
    given = allocated(here, MIB)
    assert not here.gives(given[1:])
    here.send(b"", [here.register(given[1:])])
    assert here.stats.extra["copied_in"] == MIB - 1
    here.send(b"", [here.register(given)])
    here.send(b"", [here.register(given)])
    assert here.stats.extra["copied_in"] == 2 * MIB - 1
    for _ in range(3):
        ends.receive(there).discard()


def test_an_array_outlives_its_connection(pair: tuple[ShmConnection, ShmConnection]) -> None:
    here, there = pair
    ends = Ends(here, there)
    here.send(b"", [here.register(b"x" * MIB)])
    incoming = ends.receive(there)
    (adopted,) = incoming.adopt() or [memoryview(b"")]
    incoming.into([adopted])
    here.abort()
    there.abort()
    assert bytes(adopted) == b"x" * MIB
    assert there.allocate(MIB) is None


def test_blocks_are_used_again(pair: tuple[ShmConnection, ShmConnection]) -> None:
    """A thousand messages, as much memory as one or two of them take."""
    here, there = pair
    ends = Ends(here, there)
    source = b"x" * MIB
    for _ in range(1000):
        here.send(b"", [here.register(source)])
        ends.receive(there).discard()
    assert here._arena.nbytes <= 2 * (4 * MIB + shared.PAGE)


def frame(kind: int, body: bytes, channel: int = 0) -> bytes:
    return struct.pack("<IBBH", len(body), kind, 0, channel) + body


def shared_body(size: int, place: tuple[int, int, int], filled: int) -> bytes:
    return struct.pack("<HQIIQQ", 1, size, *place, filled)


@pytest.mark.parametrize(
    "said",
    [
        frame(shm.SHARED, shared_body(10, (0, 0, 0), 10)),
        frame(shm.SHARED, shared_body(10, (0, 0, 0), 10)[:-1]),
        frame(shm.SHARED, struct.pack("<H", 60000)),
        frame(shm.SHARED, b""),
        frame(shm.FILLED, struct.pack("<Q", 1)),
        frame(shm.FILLED, b"1234"),
        frame(shm.DROPPED, b"1"),
        frame(shm.DROPPED, bytes(5)),
        frame(19, b""),
    ],
)
def test_hostile_frames(said: bytes) -> None:
    raw, ours = socket.socketpair()
    side, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = ShmConnection(ours, side, blocking=False)
    with raw, theirs:
        raw.sendall(said)
        with pytest.raises(ProtocolError):
            Ends(connection).receive(connection)
        connection.abort()


def test_more_is_said_to_be_there_than_was_announced() -> None:
    raw, ours = socket.socketpair()
    side, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = ShmConnection(ours, side, blocking=False)
    with raw, theirs:
        fd = shared._new_segment(shared.PAGE + MIB)
        rights = array.array("i", [fd])
        theirs.sendmsg(
            [struct.pack("<IQI", 0, MIB, 1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        os.close(fd)
        raw.sendall(frame(shm.SHARED, shared_body(100, (0, 0, 0), 50), 3))
        incoming = connection.receive()
        assert incoming is not None
        incoming.into([memoryview(bytearray(100))])
        assert incoming.received == 50
        raw.sendall(frame(shm.FILLED, struct.pack("<Q", 101), 3))
        with pytest.raises(ProtocolError):
            Ends(connection).receive(connection)
        connection.abort()


def test_a_killed_owner_leaves_nothing_but_the_loan() -> None:
    """The memory is the kernel's: what was lent stays readable, the connection ends at once."""
    ours, theirs = socket.socketpair()
    our_side, their_side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = (
        "import socket, sys, time\n"
        "from gpuremote.transport.shm import ShmConnection\n"
        "a, b = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:])\n"
        "c = ShmConnection(a, b, blocking=True)\n"
        "c.send(b'', [c.register(b'x' * (1 << 20))])\n"
        "time.sleep(60)\n"
    )
    fds = [theirs.fileno(), their_side.fileno()]
    before = set(os.listdir("/dev/shm"))
    child = subprocess.Popen([sys.executable, "-c", program, *map(str, fds)], pass_fds=fds)
    theirs.close()
    their_side.close()
    connection = ShmConnection(ours, our_side, blocking=True)
    try:
        ends = Ends(connection)
        complete: list[Incoming] = []
        incoming = ends.receive(connection)
        (adopted,) = incoming.adopt() or [memoryview(b"")]
        incoming.into([adopted], complete.append)
        ends.until(lambda: complete)
    finally:
        child.kill()
        child.wait()
    with pytest.raises(ConnectionLost):
        Ends(connection).receive(connection)
    assert bytes(adopted) == b"x" * MIB
    assert set(os.listdir("/dev/shm")) == before
    connection.abort()


# -- setting it up ------------------------------------------------------------------------------


def set_up(
    secrets: tuple[bytes, bytes] = (b"secret", b"secret"),
    stranger: Callable[[bytes], None] | None = None,
    monkeypatch: pytest.MonkeyPatch | None = None,
) -> tuple[list[object], tuple[TcpConnection, TcpConnection]]:
    first = tcp_pair()
    deadline = _clock.now() + 10
    here, there = (
        Setup(end, blocking=True, deadline=deadline, secret=secret)
        for end, secret in zip(first, secrets, strict=True)
    )
    found: list[object] = [None, None]

    def accept() -> None:
        try:
            found[1] = upgrade(there, Shm, client=False)
        except GpuRemoteError as error:
            found[1] = error

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        found[0] = upgrade(here, Shm, client=True)
    except GpuRemoteError as error:
        found[0] = error
    thread.join()
    return found, first


def test_set_up_takes_the_place_of_the_first_connection() -> None:
    (here, there), first = set_up()
    assert isinstance(here, ShmConnection)
    assert isinstance(there, ShmConnection)
    assert all(end.closed for end in first)
    here.send(b"header", [here.register(b"x" * MIB)])
    incoming = Ends(there).receive(there)
    assert incoming.adopt() is not None
    incoming.discard()
    here.abort()
    there.abort()


def test_somebody_without_the_secret_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuremote.transport.shm_setup.PATIENCE", 0.2)
    found, first = set_up(secrets=(b"secret", b"another"))
    assert [type(error) for error in found] == [TransportUnavailable] * 2
    for end in first:
        assert not end.closed
        end.abort()


def test_another_network_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads nowhere there."""
    connect = socket.socket.connect

    class Elsewhere(socket.socket):
        def connect(self, address: object) -> None:
            connect(self, b"\0gpuremote-nobody-listens-here")

    monkeypatch.setattr("gpuremote.transport.shm_setup.socket.socket", Elsewhere)
    found, first = set_up()
    assert [type(error) for error in found] == [TransportUnavailable] * 2
    assert "network namespace" in str(found[0])
    assert "network namespace" in str(found[1])
    for end in first:
        assert not end.closed
        end.abort()
