"""Who waits for whom between CUDA streams, and how long memory is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpuremote.backend import cupy_order
from gpuremote.backend.cupy_order import Order


class Event:
    done = False


class Stream:
    """Remembers what it was told to wait for."""

    def __init__(self) -> None:
        self.waited: list[Event] = []
        self.events: list[Event] = []

    def record(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


class Cuda:
    """As much of ``cupy.cuda`` as is asked for."""

    def __init__(self) -> None:
        null = self.current = Stream()
        self.Stream = SimpleNamespace(null=null)

    def get_current_stream(self) -> Stream:
        return self.current


class Memory:
    """One allocation."""


def array() -> Any:
    return SimpleNamespace(data=SimpleNamespace(mem=Memory()))


@pytest.fixture
def cuda() -> Cuda:
    return Cuda()


def run(order: Order, cuda: Cuda, stream: Stream, *used: Any) -> Any:
    """An op in a stream, which makes an array."""
    cuda.current = stream
    (made,) = order.run(lambda _: [array()], [*used, 3.5])
    return made


def test_nothing_with_one_stream(cuda: Cuda) -> None:
    order = Order(cuda)
    run(order, cuda, cuda.Stream.null, array())
    assert not cuda.Stream.null.events


def test_an_op_comes_behind_what_makes_its_operands(cuda: Cuda) -> None:
    order, null = Order(cuda), cuda.Stream.null
    first, second = Stream(), Stream()
    for stream in (first, second):
        order.begin(stream)
        assert stream.waited == [null.events[-1]]  # behind all that was before
    x = run(order, cuda, first)
    y = run(order, cuda, first, x)
    assert len(first.waited) == 1  # a stream is in order by itself
    run(order, cuda, second, y)
    assert second.waited[1:] == [first.events[1]]
    run(order, cuda, first, y)  # which may write to what the other one reads
    assert first.waited[1:] == [second.events[0]]


def test_memory_is_kept_for_a_stream_that_did_not_allocate_it(cuda: Cuda) -> None:
    order, null, stream = Order(cuda), cuda.Stream.null, Stream()
    order.begin(stream)
    mine, theirs = run(order, cuda, stream), array()
    run(order, cuda, stream, mine)
    assert not order._lent
    run(order, cuda, stream, theirs)  # of the default stream, as far as is known
    run(order, cuda, null, mine)
    lent = [memory for _, kept in order._lent for memory in kept]
    assert lent == [theirs.data.mem, mine.data.mem]
    for done in (*stream.events, *null.events):
        done.done = True
    run(order, cuda, stream)
    assert not order._lent


def test_what_is_over_is_forgotten(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_order, "MOST", 10)
    order, stream = Order(cuda), Stream()
    order.begin(stream)
    kept = [run(order, cuda, stream) for _ in range(10)]
    for event in stream.events[:5]:
        event.done = True
    kept.append(run(order, cuda, stream))
    assert len(order._uses) == 6
