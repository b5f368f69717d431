"""What every transport has to do: a suite for pytest, to be subclassed.

::

    from gpuremote.testing.conformance import TransportConformance

    class TestMine(TransportConformance):
        def connection_pair(self):
            return mine.pair()
"""

from __future__ import annotations

import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

from gpuremote.errors import ConnectionLost, InvalidBuffer, LimitExceeded
from gpuremote.testing.driving import Ends, place, random_parts
from gpuremote.transport.base import Connection, Incoming, Region

__all__ = ["TransportConformance"]

Pair = tuple[Connection, Connection]

MIB = 1 << 20


class TransportConformance:
    """The contract of ``gpuremote.transport.base``, test by test.

    Both ends are driven in the thread of the test, which has ``limit`` seconds; a second
    thread appears only where waiting itself is tested.

    Attributes
    ----------
    limit : float
        Seconds for the driving in one test.
    overtaking : int
        Payload bytes that may arrive between a message being sent and its arrival, if the line
        was empty before: one chunk of the transport.
    max_header : int
        Largest header in bytes.
    bulk : int
        Bytes of a payload that is more than the path between the two ends holds.
    """

    limit: ClassVar[float] = 20.0
    overtaking: ClassVar[int] = 4 * MIB
    max_header: ClassVar[int] = 4 * MIB
    bulk: ClassVar[int] = 24 * MIB

    def connection_pair(self) -> Pair:
        """Two connections that are connected to each other; a new pair at each call."""
        raise NotImplementedError

    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        here, there = self.connection_pair()
        yield here, there
        here.abort()
        there.abort()

    @pytest.fixture
    def ends(self, pair: Pair) -> Ends:
        return Ends(*pair, limit=self.limit)

    # -- messages ------------------------------------------------------------------------------

    def test_messages_arrive_in_order(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        chance = random.Random(1)
        sent = {
            here: [chance.randbytes(chance.choice((1, 8, 100, 5000, 70_000))) for _ in range(300)],
            there: [chance.randbytes(chance.randrange(2000)) for _ in range(300)],
        }
        got: dict[Connection, list[bytes]] = {here: [], there: []}
        ends.take = lambda end, incoming: got[end].append(bytes(incoming.header))
        for one, other in zip(sent[here], sent[there], strict=True):
            here.send(one)
            there.send(other)
        ends.until(lambda: len(got[here]) == len(got[there]) == 300)
        assert got[there] == sent[here]
        assert got[here] == sent[there]
        assert here.stats.messages_sent == there.stats.messages_received == 300

    def test_empty_header(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"")
        incoming = ends.receive(there)
        assert len(incoming.header) == 0
        assert incoming.sizes == ()
        here.send(b"", [Region(b"abc")])
        incoming = ends.receive(there)
        assert (len(incoming.header), incoming.sizes) == (0, (3,))
        incoming.discard()

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_header_types(
        self, pair: Pair, ends: Ends, kind: Callable[[bytes], bytes | bytearray | memoryview]
    ) -> None:
        here, there = pair
        here.send(kind(b"header"))
        assert bytes(ends.receive(there).header) == b"header"

    def test_largest_header(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        header = random.Random(2).randbytes(self.max_header)
        here.send(header)
        here.send(header, [Region(b"payload")])
        here.send(b"after")
        assert ends.receive(there).header == header
        incoming = ends.receive(there)
        assert incoming.header == header
        incoming.discard()
        assert bytes(ends.receive(there).header) == b"after"

    def test_too_large_header_is_refused(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        with pytest.raises(LimitExceeded):
            self._send_now(here, ends, bytes(self.max_header + 1))
        here.send(b"the connection goes on")
        assert bytes(ends.receive(there).header) == b"the connection goes on"

    # -- payload -------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "sizes",
        [(0,), (1,), (0, 0), (1, 0, 7), (8192, 1), (3 * MIB + 1,), (5 * MIB, 0, 3, 2 * MIB)],
        ids=str,
    )
    def test_payload(self, pair: Pair, ends: Ends, sizes: tuple[int, ...]) -> None:
        here, there = pair
        sources = random_parts(sizes)
        here.send(b"before")
        here.send(b"header", [here.register(source) for source in sources])
        here.send(b"after")
        assert bytes(ends.receive(there).header) == b"before"
        incoming = ends.receive(there)
        assert bytes(incoming.header) == b"header"
        assert incoming.sizes == sizes
        targets = place(ends, incoming)
        assert targets == sources
        assert incoming.received == sum(sizes)
        assert bytes(ends.receive(there).header) == b"after"
        ends.flush(here)
        assert here.stats.payload_sent == there.stats.payload_received == sum(sizes)

    def test_many_regions(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        chance = random.Random(3)
        sources = random_parts([chance.choice((0, 1, 77, 4096, 9000)) for _ in range(700)])
        here.send(b"many", [here.register(source) for source in sources])
        incoming = ends.receive(there)
        assert len(incoming.sizes) == 700
        assert place(ends, incoming) == sources

    def test_payload_is_not_copied_on_the_way(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        source = bytearray(16 * MIB)
        here.send(b"header", [here.register(source)])
        incoming = ends.receive(there)
        target = bytearray(16 * MIB)
        done: list[Incoming] = []
        tracemalloc.start()
        incoming.into([memoryview(target)], done.append)
        ends.until(lambda: done)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * MIB
        assert there.stats.payload_copied <= MIB

    def test_payloads_take_turns(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        first, second = random_parts([self.bulk, self.bulk // 8])
        here.send(b"first", [here.register(first)])
        incoming_first = ends.receive(there)
        done: list[str] = []
        into_first, into_second = bytearray(len(first)), bytearray(len(second))
        incoming_first.into([memoryview(into_first)], lambda _: done.append("first"))
        here.send(b"second", [here.register(second)])
        incoming_second = ends.receive(there)
        incoming_second.into([memoryview(into_second)], lambda _: done.append("second"))
        ends.until(lambda: len(done) == 2)
        # The second began later, is much shorter, and so ends first.
        assert done == ["second", "first"]
        assert into_first + into_second == first + second

    def test_message_overtakes_payload(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"bulk", [here.register(bytes(self.bulk))])
        bulk = ends.receive(there)
        bulk.into([memoryview(bytearray(self.bulk))])
        ends.quiet(there)
        assert here.pending_output, "a path that holds the whole payload: make `bulk` larger"
        passed = self.bulk
        while passed > self.overtaking and here.pending_output:  # more does if this process stalls
            before = bulk.received
            here.send(b"urgent")
            assert bytes(ends.receive(there).header) == b"urgent"
            passed = bulk.received - before
        assert passed <= self.overtaking
        assert bulk.received < self.bulk

    def test_region_needs_contiguous_memory(self, pair: Pair) -> None:
        here, _ = pair
        for wrong in (memoryview(bytes(100))[::2], object()):
            with pytest.raises(InvalidBuffer):
                here.register(wrong)

    def test_region_keeps_memory_alive(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"", [here.register(bytearray(b"x" * 5 * MIB))])
        assert place(ends, ends.receive(there)) == [b"x" * 5 * MIB]

    # -- where the payload goes ----------------------------------------------------------------

    def test_wrong_buffers_are_refused(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"", [Region(b"abc"), Region(b"de")])
        incoming = ends.receive(there)
        first, second = bytearray(3), bytearray(2)
        wrong: list[list[memoryview]] = [
            [],
            [memoryview(first)],
            [memoryview(first), memoryview(second), memoryview(bytearray(1))],
            [memoryview(second), memoryview(first)],
            [memoryview(first), memoryview(bytearray(3))],
            [memoryview(first), memoryview(bytes(2))],
            [memoryview(first), memoryview(bytearray(4))[::2]],
        ]
        for buffers in wrong:
            with pytest.raises(InvalidBuffer):
                incoming.into(buffers)
        assert first == bytes(3)
        done: list[Incoming] = []
        incoming.into([memoryview(first), memoryview(second)], done.append)
        ends.until(lambda: done)
        assert first == b"abc"
        assert second == b"de"

    def test_discard_at_start(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"dropped", [here.register(bytes(9 * MIB)), here.register(b"x")])
        here.send(b"after", [here.register(b"kept")])
        done: list[Incoming] = []
        dropped = ends.receive(there)
        dropped.discard(done.append)
        assert place(ends, ends.receive(there)) == [b"kept"]
        ends.until(lambda: done)
        assert done == [dropped]

    def test_discard_in_the_middle(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        source = b"\x55" * self.bulk
        here.send(b"dropped", [here.register(source)])
        dropped = ends.receive(there)
        target = bytearray(self.bulk)
        called: list[str] = []
        dropped.into([memoryview(target)], lambda _: called.append("into"))
        ends.until(lambda: dropped.received > 0)
        assert dropped.received < self.bulk
        dropped.discard(lambda _: called.append("discard"))
        kept = dropped.received
        target[:] = bytes(self.bulk)
        ends.until(lambda: called)
        assert called == ["discard"]
        assert 0 < kept <= dropped.received == self.bulk
        assert not any(target), "written to after discard"
        here.send(b"after", [here.register(b"kept")])
        assert place(ends, ends.receive(there)) == [b"kept"]

    # -- callbacks -----------------------------------------------------------------------------

    def test_done_at_once_when_nothing_is_to_come(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"no payload")
        here.send(b"empty payload", [Region(b"")])
        for buffers in ([], [memoryview(bytearray(0))]):
            incoming = ends.receive(there)
            done: list[Incoming] = []
            incoming.into(buffers, done.append)
            assert done == [incoming]

    def test_sender_says_when_memory_is_free(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        source = bytearray(b"a" * self.bulk)
        freed: list[str] = []
        here.send(b"one", (), lambda: freed.append("one"))
        here.send(b"two", [here.register(source)], lambda: freed.append("two"))
        assert "two" not in freed
        assert bytes(ends.receive(there).header) == b"one"
        incoming = ends.receive(there)
        target = bytearray(self.bulk)
        done: list[Incoming] = []
        incoming.into([memoryview(target)], done.append)
        ends.until(lambda: "two" in freed)
        source[:] = b"b" * self.bulk
        ends.until(lambda: done)
        assert freed == ["one", "two"]
        assert target == b"a" * self.bulk

    def test_sending_from_a_callback(self, pair: Pair, ends: Ends) -> None:
        here, _ = pair
        left = list(range(500))

        def send_next() -> None:
            if left:
                number = left.pop(0)
                regions = [Region(b"xyz")] if number % 3 == 0 else []
                here.send(str(number).encode(), regions, send_next)

        got: list[int] = []

        def take(_: Connection, incoming: Incoming) -> None:
            got.append(int(bytes(incoming.header)))
            incoming.discard()

        ends.take = take
        send_next()
        ends.until(lambda: len(got) == 500)
        assert got == list(range(500))

    # -- pressure ------------------------------------------------------------------------------

    def test_slow_reader_costs_no_copies(self, pair: Pair, ends: Ends) -> None:
        here, _ = pair
        payload = bytes(4 * MIB)
        bodies = [bytes([number % 256]) * 4096 for number in range(5000)]
        tracemalloc.start()
        for _ in range(20):
            here.send(b"bulk", [here.register(payload)])
        for body in bodies:
            here.send(body)
        here.flush()
        current, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert here.pending_output
        # Some bookkeeping for each message, and nothing of the 20 MB of headers.
        assert current < 5 * MIB
        assert peak < 8 * MIB
        got: list[bytes] = []
        done: list[Incoming] = []

        def take(_: Connection, incoming: Incoming) -> None:
            if incoming.sizes:
                incoming.discard(done.append)
            else:
                got.append(bytes(incoming.header))

        ends.take = take
        ends.until(lambda: len(got) == len(bodies) and len(done) == 20)
        assert got == bodies
        assert here.flush()
        assert not here.pending_output

    def test_both_ways_in_two_threads(self, pair: Pair) -> None:
        """One thread sends while another receives, on both ends."""
        here, there = pair
        failures: list[BaseException] = []
        payloads = random_parts([3 * MIB + 1, 17, 500_000])
        rounds = 6

        def send(end: Connection) -> None:
            for number in range(rounds):
                end.send(b"small")
                end.send(bytes([number]), [Region(part) for part in payloads])
            while not end.flush():
                time.sleep(end.due() or 0.0005)

        def receive(end: Connection) -> None:
            done: list[Incoming] = []
            targets: list[list[bytearray]] = []
            deadline = time.monotonic() + self.limit
            while len(done) < rounds:
                assert time.monotonic() < deadline
                incoming = end.receive(0.1)
                if incoming is not None and incoming.sizes:
                    targets.append([bytearray(size) for size in incoming.sizes])
                    incoming.into([memoryview(t) for t in targets[-1]], done.append)
            assert targets == [payloads] * rounds

        def guarded(step: Callable[[Connection], None], end: Connection) -> None:
            try:
                step(end)
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=guarded, args=(step, end), daemon=True)
            for step in (send, receive)
            for end in (here, there)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.limit)
        assert not failures
        assert not any(thread.is_alive() for thread in threads)

    # -- waiting -------------------------------------------------------------------------------

    def test_receive_does_not_wait_unasked(self, pair: Pair) -> None:
        here, _ = pair
        begin = time.monotonic()
        for _ in range(100):
            assert here.receive() is None
        assert time.monotonic() - begin < 0.5

    def test_receive_waits(self, pair: Pair) -> None:
        here, there = pair
        begin = time.monotonic()
        assert here.receive(0.05) is None
        assert 0.04 < time.monotonic() - begin < 2.0
        sender = threading.Timer(0.1, lambda: there.send(b"now"))
        sender.start()
        incoming = None
        while incoming is None and time.monotonic() - begin < self.limit:
            if there.pending_output:
                there.flush()
            incoming = here.receive(1.0)
        sender.join()
        assert incoming is not None
        assert bytes(incoming.header) == b"now"

    # -- the end -------------------------------------------------------------------------------

    def test_close_delivers_what_was_sent(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        source = random.Random(4).randbytes(self.bulk)
        for number in range(100):
            here.send(str(number).encode())
        here.send(b"bulk", [here.register(source)])
        there.send(b"unread")
        closing = threading.Thread(target=here.close, args=(self.limit,))
        closing.start()
        try:
            only = Ends(there, limit=self.limit)
            for number in range(100):
                assert bytes(only.receive(there).header) == str(number).encode()
            incoming = only.receive(there)
            assert place(only, incoming) == [source]
        finally:
            there.abort()
            closing.join()
        assert here.closed
        assert not here.pending_output

    def test_close_ends_the_other_side(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        here.send(b"last")
        here.close()
        here.close()
        assert here.closed
        assert bytes(ends.receive(there).header) == b"last"
        self._expect_lost(there.receive)
        self._expect_lost(there.receive)
        there.close()
        assert there.closed

    def test_close_does_not_wait_for_ever(self, pair: Pair) -> None:
        here, _ = pair
        here.send(b"", [here.register(bytes(self.bulk))])
        begin = time.monotonic()
        here.close(0.2)
        assert time.monotonic() - begin < 2.0
        assert here.closed

    def test_nothing_works_after_the_end(self, pair: Pair) -> None:
        pair[0].close()
        pair[1].abort()
        pair[1].abort()
        for end in pair:
            assert end.closed
            for step in (lambda e=end: e.send(b"x"), end.flush, end.receive, end.fileno):
                with pytest.raises(ConnectionLost):
                    step()
            end.close()
            end.abort()

    def test_loss_in_the_middle_of_a_payload(self, pair: Pair, ends: Ends) -> None:
        here, there = pair
        freed: list[str] = []
        here.send(b"", [here.register(bytes(self.bulk))], lambda: freed.append("sent"))
        incoming = ends.receive(there)
        done: list[Incoming] = []
        incoming.into([memoryview(bytearray(self.bulk))], done.append)
        here.abort()
        self._expect_lost(there.receive)
        assert incoming.received < self.bulk
        assert not done
        assert not freed

    def test_a_place_for_what_will_not_come(self, pair: Pair, ends: Ends) -> None:
        """Another thread may end the connection between a message and the word where it goes."""
        done: list[Incoming] = []
        pair[0].send(b"", [pair[0].register(bytes(300_000))])
        incoming = ends.receive(pair[1])
        pair[1].abort()
        incoming.into([memoryview(bytearray(300_000))], done.append)
        self._expect_lost(pair[1].receive)
        assert not done or incoming.received == 300_000  # all of it had come before

    def test_sender_learns_of_the_loss(self, pair: Pair) -> None:
        here, there = pair
        there.abort()

        def step() -> None:
            # The first bytes may still go into the void.
            here.send(bytes(1000))
            here.flush()

        self._expect_lost(step)

    @pytest.mark.parametrize("wait", [5.0, 0.3])
    def test_abort_wakes_a_receiver(self, pair: Pair, wait: float) -> None:
        here, _ = pair
        raised: list[BaseException] = []

        def receive() -> None:
            try:
                while True:
                    here.receive(wait)
            except ConnectionLost as error:
                raised.append(error)

        waiting = threading.Thread(target=receive)
        waiting.start()
        time.sleep(0.05)
        begin = time.monotonic()
        here.abort()
        waiting.join(5)
        assert not waiting.is_alive()
        assert time.monotonic() - begin < 0.9
        assert len(raised) == 1

    def test_abort_gives_memory_back(self, pair: Pair, ends: Ends) -> None:
        """After abort nothing is written to the receiver's memory, whoever is receiving."""
        here, there = pair
        source = b"\x55" * self.bulk
        here.send(b"", [here.register(source)])
        incoming = ends.receive(there)
        target = bytearray(self.bulk)
        incoming.into([memoryview(target)])
        stop = threading.Event()

        def drive(step: Callable[[], object], end: Connection) -> None:
            try:
                while not stop.is_set():
                    step()
                    time.sleep(end.due() or 0)
            except ConnectionLost:
                pass

        threads = [
            threading.Thread(target=drive, args=(lambda: there.receive(0.2), there)),
            threading.Thread(target=drive, args=(here.flush, here)),
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + self.limit
        while not incoming.received and time.monotonic() < deadline:
            time.sleep(0.0005)
        there.abort()
        target[:] = bytes(self.bulk)
        stop.set()
        for thread in threads:
            thread.join()
        assert not any(target)

    # -- what it says --------------------------------------------------------------------------

    def test_describes_itself(self, pair: Pair) -> None:
        for end in pair:
            said = end.describe()
            assert said["transport"] == end.name
            assert said["local"] == end.local_address
            assert said["peer"] == end.peer_address
            assert end.fileno() >= 0

    # -- what the tests share ------------------------------------------------------------------

    def _send_now(self, end: Connection, ends: Ends, header: bytes) -> None:
        """Send, and go on until a transport that holds messages back has looked at it."""
        end.send(header)
        ends.flush(end)

    def _expect_lost(self, step: Callable[[], object]) -> None:
        deadline = time.monotonic() + self.limit
        while time.monotonic() < deadline:
            try:
                step()
            except ConnectionLost:
                return
        pytest.fail("the loss was not noticed")
