"""Failures: raised at the next wait, with the op's name and the program's line, once."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import (
    ConfigError,
    DeadlineExceeded,
    DeviceMismatch,
    GpuRemoteError,
    IndexOutOfBounds,
    InvalidURL,
    LinearAlgebraError,
    OpFailed,
    OutOfDeviceMemory,
    SessionClosed,
    ShapeError,
)
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import AsyncSide, Side
from tests.session.comparing import case


def here() -> int:
    """The line of the caller."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def at(error: GpuRemoteError, line: int) -> None:
    """The error names this file and that line, and not our own files."""
    assert error.origin is not None
    assert f'File "{__file__}", line {line}, in ' in error.origin
    assert "gpuremote/client" not in error.origin
    assert str(error).endswith(error.origin)


def failing(device: Any) -> Any:
    """An op that only the server can see the mistake of."""
    return device.arange(3) ** -1


def test_the_op_and_the_line(side: Side, device: Any) -> None:
    x = device.arange(3)
    y, line = x**-1, here()
    with pytest.raises(OpFailed, match="negative integer powers") as caught:
        side.do(y.get())
    assert caught.value.op == "power"
    assert caught.value.peer
    at(caught.value, line)
    side.do(device.synchronize())  # told once
    assert side.do(x.tolist()) == [0, 1, 2]


def test_the_line_of_every_kind_of_op(side: Side, session: Any) -> None:
    device = session.devices[0]
    zero, huge = device.zeros((2, 2)), 1 << 50
    x = device.arange(3)
    wide: Any = np.broadcast_to(x, (huge, 3))
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("power", lambda: x**-1),
        ("power", lambda: 2 ** (x - 5)),
        ("power", lambda: np.power(x, -1)),
        ("add", lambda: x.astype("i1") + 1000),
        ("zeros", lambda: device.zeros(huge)),
        ("full", lambda: device.full(huge, 1.5)),
        ("inv", lambda: np.linalg.inv(zero)),
        ("solve", lambda: np.linalg.solve(zero, zero)),
        ("cholesky", lambda: np.linalg.cholesky(zero - 1)),
        ("svd", lambda: np.linalg.svd(zero * np.nan)[1]),
        ("getitem_advanced", lambda: x[[7]]),
        ("take", lambda: np.take(x, [9])),
        ("copy_to", lambda: wide.copy_to(session.devices[1])),
    ]
    for op, make in cases:
        with case(op):
            made, line = make(), make.__code__.co_firstlineno
            with pytest.raises(GpuRemoteError) as caught:
                side.do(made.wait())
            assert caught.value.op == op
            at(caught.value, line)

    def in_place() -> Any:
        z = device.arange(3)
        z **= -1
        return z

    def assigned() -> Any:
        z = device.arange(3, dtype="i1")
        z[0] = 1000
        return z

    for op, make, offset in (("power_", in_place, 2), ("setitem", assigned, 2)):
        with case(op):
            made = make()
            with pytest.raises(OpFailed) as caught:
                side.do(made.wait())
            assert caught.value.op == op
            at(caught.value, make.__code__.co_firstlineno + offset)


def test_the_stack_shows_who_called(side: Side, server: RunningServer, monkeypatch: Any) -> None:
    monkeypatch.setenv("GPUREMOTE_STACK", "8")
    with side.session(server.url) as session:

        def library(x: Any) -> Any:
            return np.power(x, -1)

        y, line = library(session.devices[0].arange(3)), here()
        with pytest.raises(OpFailed) as caught:
            side.do(y.get())
        at(caught.value, line)
        at(caught.value, library.__code__.co_firstlineno + 1)
    monkeypatch.setenv("GPUREMOTE_STACK", "0")
    with side.session(server.url) as session:
        y = failing(session.devices[0])
        with pytest.raises(OpFailed) as caught:
            side.do(y.get())
        assert not caught.value.origin
        assert caught.value.op == "power"


def test_what_depends_on_it_gets_the_original_error(side: Side, session: Any) -> None:
    device = session.devices[0]
    fine = device.ones(3)
    x, line = failing(device), here()
    y = x
    for _ in range(5):
        y = (y * 2)[::-1] + fine
    z = fine.copy()
    z += x  # may have been written to in part
    later = [y, z, z[1:], np.concatenate([fine, x]), x.copy_to(session.devices[1]), (x == x).all()]
    for k, dependant in enumerate(later):
        with case(k):
            for wait in (dependant.wait, dependant.get):
                with pytest.raises(OpFailed, match="negative integer powers") as caught:
                    side.do(wait())
                assert caught.value.op == "power"
                at(caught.value, line)
    assert side.do(fine.tolist()) == [1, 1, 1]
    assert side.do((fine + 1).tolist()) == [2, 2, 2]
    side.do(session.synchronize())


def test_every_result_of_an_op_fails(side: Side, session: Any) -> None:
    device = session.devices[0]
    parts: Any = np.linalg.svd(device.full((3, 3), np.nan))
    for part in parts:
        with pytest.raises(LinearAlgebraError):
            side.do(part.get())
    side.do(session.synchronize())


def test_synchronize_raises_the_first(side: Side, session: Any) -> None:
    device = session.devices[0]
    x, line = failing(device), here()
    others = [device.zeros(1 << 50), x + 1, device.arange(3)[[5]]]
    with pytest.raises(OpFailed) as caught:
        side.do(session.synchronize())
    at(caught.value, line)
    (note,) = caught.value.__notes__
    assert note.startswith("2 more ops failed")
    assert "zeros" in note
    assert "getitem_advanced" in note
    side.do(session.synchronize())
    # Who asks for the values is told again.
    with pytest.raises(OutOfDeviceMemory):
        side.do(others[0].wait())
    with pytest.raises(OpFailed):
        side.do(others[1].get())
    with pytest.raises(IndexOutOfBounds):
        side.do(others[2].get())
    side.do(device.synchronize())


def test_other_waits_do_not_raise_what_is_not_theirs(side: Side, session: Any) -> None:
    device = session.devices[0]
    bad = failing(device)
    assert side.do(device.arange(4).sum().item()) == 6
    assert side.do(side.do(device.put(np.ones(100_000))).sum().item()) == 100_000
    assert len(side.do(session.get_many([device.zeros(2), device.ones(2)]))) == 2
    stream = device.stream()
    with stream:
        worse = failing(device)
    with pytest.raises(OpFailed):
        side.do(session.get_many([device.zeros(2), bad]))
    with pytest.raises(OpFailed):
        side.do(stream.synchronize())
    del worse
    side.do(session.synchronize())


def test_more_failures_than_are_kept(side: Side, session: Any) -> None:
    x = session.devices[0].arange(3)
    for _ in range(1000):
        x**-1
    with pytest.raises(OpFailed) as caught:
        side.do(session.synchronize())
    assert caught.value.__notes__ == ["999 more ops failed since the last wait (power)"]


def test_a_clean_exit_raises_what_nobody_was_told(side: Side, server: RunningServer) -> None:
    session = side.do(side.connect(server.url))
    _, line = failing(session.devices[0]), here()
    with pytest.raises(OpFailed) as caught:
        side.do(session.close())
    at(caught.value, line)
    assert session.closed
    side.do(session.close())

    session = side.do(side.connect(server.url))
    failing(session.devices[0])
    side.do(session.close(raise_failures=False))

    session = side.do(side.connect(server.url))
    with pytest.raises(OpFailed):
        side.do(failing(session.devices[0]).get())
    side.do(session.close())


def test_leaving_with_an_exception_raises_only_that(side: Side, server: RunningServer) -> None:
    class OursError(Exception):
        pass

    if isinstance(side, AsyncSide):

        async def program() -> None:
            async with side.connect(server.url) as session:
                failing(session.devices[0])
                raise OursError

        async def clean() -> None:
            async with side.connect(server.url) as session:
                failing(session.devices[0])

        with pytest.raises(OursError):
            side.do(program())
        with pytest.raises(OpFailed):
            side.do(clean())
    else:

        def blocking(error: Exception | None = None) -> None:
            with side.connect(server.url) as session:
                failing(session.devices[0])
                if error is not None:
                    raise error

        with pytest.raises(OursError):
            blocking(OursError())
        with pytest.raises(OpFailed):
            blocking()


def test_debugging_raises_at_the_line_itself(
    side: Side, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPUREMOTE_DEBUG", "sync")
    with side.session(server.url) as session:
        device = session.devices[0]
        x = device.arange(3)
        line = here() + 2
        with pytest.raises(OpFailed, match="negative integer powers") as caught:
            x**-1
        at(caught.value, line)
        assert caught.traceback[0].lineno + 1 == line
        assert side.do((x + 1).tolist()) == [1, 2, 3]
        x += 1
        with pytest.raises(OutOfDeviceMemory):
            device.zeros(1 << 50)
        with pytest.raises(IndexOutOfBounds):
            x[[8]]
        side.do(session.synchronize())
        assert session.stats().round_trips["debug"] >= 5


def test_operands_of_different_places(side: Side, session: Any, server: RunningServer) -> None:
    first, second = session.devices
    x, y = first.ones(3), second.ones(3)
    with side.session(server.url) as other:
        z = other.devices[0].ones(3)
        mixtures: list[Callable[[], Any]] = [
            lambda: x + y,
            lambda: y * x,
            lambda: x + z,
            lambda: z < x,
            lambda: x @ y,
            lambda: x.__iadd__(z),
            lambda: x.__setitem__(0, y[0]),
            lambda: x[y.astype(int)],
            lambda: np.where(x > 0, x, y),
            lambda: np.concatenate([x, z]),
            lambda: np.add(x, y),
        ]
        for k, mixed in enumerate(mixtures):
            with case(k), pytest.raises(DeviceMismatch, match="copy_to") as caught:
                mixed()
            assert caught.value.op
            assert str(first) in str(caught.value)
    same = x + y.copy_to(first)
    assert side.do(same.tolist()) == [2, 2, 2]


def test_after_close_nothing_can_be_used(side: Side, server: RunningServer) -> None:
    with side.session(server.url) as session:
        device = session.devices[0]
        x = device.arange(3)
        stream = device.stream()
        event = stream.record()
    records = session.stats().records
    uses: list[Callable[[], Any]] = [
        lambda: x + 1,
        lambda: x * x,
        lambda: -x,
        lambda: x.sum(),
        lambda: x[0],
        lambda: x.__setitem__(0, 1),
        lambda: device.zeros(3),
        lambda: side.do(device.put(np.zeros(3))),
        lambda: side.do(device.put(np.zeros(100_000))),
        lambda: side.do(device.put_many([np.zeros(3)])),
        lambda: side.do(x.get()),
        lambda: side.do(x.wait()),
        lambda: side.do(session.get_many([x])),
        lambda: side.do(session.synchronize()),
        lambda: side.do(session.server_stats()),
        lambda: device.stream(),
        lambda: stream.record(),
        lambda: side.do(stream.synchronize()),
        lambda: side.do(event.synchronize()),
        lambda: x.copy_to(device),
    ]
    for k, use in enumerate(uses):
        with case(k), pytest.raises(SessionClosed, match="closed"):
            use()
    assert session.closed
    assert "closed" in repr(session)
    assert session.stats().records == records
    assert x.shape == (3,)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("gpu://", "no host"),
        ("gpu://host:99999", "port"),
        ("gpu://host?transprot=tcp", "transport"),
        ("gpu://host?memory=8G", "8GiB"),
        ("http://host", "scheme"),
        ("host:7700", "://"),
        ("pool://host", "pool"),
        ("gpu://host/path", "path"),
    ],
)
def test_bad_urls_are_refused_by_the_call_itself(side: Side, url: str, text: str) -> None:
    with pytest.raises(InvalidURL, match=text) as caught:
        side.connect(url)
    assert isinstance(caught.value, ValueError)


def test_a_bad_environment(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GPUREMOTE_DOWNLOAD", "sometimes"), ("GPUREMOTE_DEBUG", "yes")):
        with monkeypatch.context() as patch, case(name):
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=name):
                side.do(side.connect("gpu://127.0.0.1:1"))
    monkeypatch.setenv("GPUREMOTE_URL", "ftp://x")
    with pytest.raises(InvalidURL, match="GPUREMOTE_URL"):
        gpuremote.connect() if isinstance(side, AsyncSide) else gpuremote.connect_sync()


def test_a_wait_that_takes_too_long(side: Side, session: Any) -> None:
    device = session.devices[0]
    x = device.random_uniform(8_000_000, 1)
    with pytest.raises(DeadlineExceeded) as caught:
        side.do(x.get(timeout=0.01))
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(TimeoutError):
        side.do(session.synchronize(timeout=0.001))
    with pytest.raises(TimeoutError):
        side.do(session.get_many([x[:1], x[:2]], timeout=0.001))
    assert side.do((x[:3] < 1).tolist()) == [True, True, True]


def test_mistakes_seen_here_are_not_sent(side: Side, session: Any, device: Any) -> None:
    side.do(session.synchronize())
    x = device.zeros((2, 3))
    row = x[0]
    side.do(row.wait())
    gc.collect()  # what earlier tests left in circles would be given back, and counted, below
    records = session.stats().records
    mistakes: list[Callable[[], Any]] = [
        lambda: x + device._array_type,
        lambda: x.reshape(5),
        lambda: x.transpose(0, 0),
        lambda: x @ x,
        lambda: x.astype("O"),
        lambda: x << 1,
        lambda: x[9],
        lambda: x.squeeze(0),
        lambda: np.concatenate([x, row]),
    ]
    for mistake in mistakes:
        with pytest.raises((GpuRemoteError, TypeError)):
            mistake()
    assert session.stats().records == records
    with pytest.raises(ShapeError) as caught:
        x.reshape(7)
    assert caught.value.op == "reshape"
