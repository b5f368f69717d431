"""Uploads and downloads: what may go in, what comes out, into what, and how often it is copied."""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
from typing import Any

import numpy as np
import pytest

from gpuremote.errors import DTypeError, GpuRemoteError, InvalidBuffer
from gpuremote.testing.servers import RunningServer
from gpuremote.wire.caps import INLINE_PAYLOAD, MAX_INLINE
from tests.faults.sides import Side, pattern
from tests.session.comparing import DTYPES, case, numbers, same

torch: Any = importlib.import_module("torch")

SIZES = [
    1,
    INLINE_PAYLOAD - 1,
    INLINE_PAYLOAD,
    INLINE_PAYLOAD + 1,
    MAX_INLINE,
    MAX_INLINE + 1,
    1_000_003,
    9 << 20,
]


def copied(session: Any, side: Side, value: Any, **options: Any) -> tuple[Any, int]:
    """The array, and how many bytes its upload copied on this side."""
    before = session.stats().payload_copied
    made = side.do(session.devices[0].put(value, **options))
    return made, session.stats().payload_copied - before


def test_every_dtype_there_and_back(side: Side, device: Any) -> None:
    for dtype in DTYPES:
        for shape in ((), (0,), (1,), (3, 0, 2), (7, 5), (40, 30, 20)):
            with case(dtype, shape):
                host = numbers(shape, dtype)
                same(side, side.do(device.put(host)), host)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    assert side.do(side.do(device.put(special)).get()).tobytes() == special.tobytes()


def test_sizes(side: Side, device: Any) -> None:
    for size in SIZES:
        with case(size):
            host = pattern(size)
            remote = side.do(device.put(host))
            assert np.array_equal(side.do(remote.get()), host)
            out = np.zeros_like(host)
            assert side.do(remote.get(out=out)) is out
            assert np.array_equal(out, host)


def test_middling_arrays_travel_inside_messages(side: Side, server: RunningServer) -> None:
    """On a short way; not to a server that has not said so."""
    with side.session(f"{server.url}?transport=tcp&lanes=1") as session:
        assert session._core.inline == MAX_INLINE
        for size, inline, moved in (
            (40_000, MAX_INLINE, 0),
            (MAX_INLINE, MAX_INLINE, 0),
            (MAX_INLINE + 1, MAX_INLINE, MAX_INLINE + 1),
            (40_000, INLINE_PAYLOAD, 40_000),
        ):
            session._core.inline = inline
            host = pattern(size)
            before = session.stats()
            remote = side.do(session.devices[0].put(host))
            after = session.stats()
            assert after.payload_sent - before.payload_sent == moved
            assert after.round_trips["put"] - before.round_trips["put"] == bool(moved)
            assert np.array_equal(side.do(remote.get()), host)
            received = session.stats().payload_received - after.payload_received
            assert received == (0 if size <= MAX_INLINE else size)


def test_what_is_put_may_be_changed_at_once(side: Side, device: Any) -> None:
    """The memory is the program's own again when put returns, whatever the size."""
    for size in SIZES:
        host = pattern(size)
        kept = host.copy()
        remote = side.do(device.put(host))
        host[:] = 0
        assert np.array_equal(side.do(remote.get()), kept)


def test_large_input_is_not_copied(side: Side, session: Any) -> None:
    host = pattern(4 << 20)
    _, extra = copied(session, side, host)
    assert extra == 0
    side.do(session.synchronize())  # over shared memory the server is told of it by now
    before = session.stats()
    remote = side.do(session.devices[0].put(host))
    out = np.empty_like(host)
    side.do(remote.get(out=out))
    after = session.stats()
    assert after.payload_sent - before.payload_sent == host.nbytes
    assert after.payload_received - before.payload_received == host.nbytes
    # What arrives together with the header of its message.
    assert after.payload_copied - before.payload_copied <= 256 << 10


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_what_is_not_contiguous_is_copied_once(side: Side, session: Any, dtype: str) -> None:
    base = numbers((300, 400), dtype)
    views = [
        base[::2],
        base[:, ::3],
        base.T,
        base[::-1],
        np.asfortranarray(base),
        np.broadcast_to(base[0], (200, 400)),
        base[1:-1, 1:-1],
    ]
    for k, view in enumerate(views):
        with case(k):
            remote, extra = copied(session, side, view)
            inside = session._core.inlines(view.nbytes)  # copied once more, into its message
            assert extra == (2 * view.nbytes if inside else view.nbytes)
            same(side, remote, view)


def test_foreign_byte_order(side: Side, session: Any) -> None:
    for dtype in (">i2", ">f8", ">c16", ">u4"):
        host = numbers((300, 300), dtype)
        remote, extra = copied(session, side, host)
        assert extra == host.nbytes
        assert remote.dtype == host.dtype.newbyteorder("=")
        same(side, remote, host.astype(remote.dtype))


def test_cast_on_the_way(side: Side, session: Any) -> None:
    host = numbers((10, 10), "int64")
    remote, _ = copied(session, side, host, dtype="f4")
    same(side, remote, host.astype("f4"))
    same(side, side.do(session.devices[0].put([1, 2], "c8")), np.array([1, 2], "c8"))


def test_buffers_and_python_values(side: Side, session: Any, device: Any) -> None:
    data = bytes(range(200))
    grid = np.arange(12, dtype=np.int16).reshape(3, 4).data
    structure = (ctypes.c_double * 3)(1, 2, 3)
    cases: list[tuple[Any, Any]] = [
        (data, np.frombuffer(data, np.uint8)),
        (bytearray(data), np.frombuffer(data, np.uint8)),
        (memoryview(data), np.frombuffer(data, np.uint8)),
        (memoryview(data)[::2], np.frombuffer(data, np.uint8)[::2]),
        (grid, np.arange(12, dtype=np.int16).reshape(3, 4)),
        (b"", np.zeros(0, np.uint8)),
        (array.array("d", [1, 2.5]), np.array([1, 2.5])),
        (array.array("i", [1, -2]), np.array([1, -2], np.int32)),
        (structure, np.array([1.0, 2.0, 3.0])),
        ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]])),
        ([1, 2.5, 3], np.array([1, 2.5, 3])),
        ((True, False), np.array([True, False])),
        ([], np.array([])),
        ([[], []], np.zeros((2, 0))),
        (3, np.array(3)),
        (2.5, np.array(2.5)),
        (True, np.array(True)),
        (1j, np.array(1j)),
        (np.float32(1.5), np.array(1.5, np.float32)),
        (range(5), np.arange(5)),
        (np.ones((2, 3)).view(np.matrix), np.ones((2, 3))),
        (np.arange(6.0).reshape(2, 3).view(np.recarray), np.arange(6.0).reshape(2, 3)),
    ]
    for value, expected in cases:
        with case(type(value).__name__, value):
            same(side, side.do(device.put(value)), expected)


def test_torch_tensors(side: Side, session: Any, device: Any) -> None:
    """Through DLPack, so without a copy where the tensor is contiguous."""
    large = torch.arange(30_000, dtype=torch.float32).reshape(100, 300)
    remote, extra = copied(session, side, large)
    assert extra == 0
    same(side, remote, large.numpy())
    remote, extra = copied(session, side, large.T)
    assert extra == large.numel() * 4
    same(side, remote, large.T.numpy())
    learnt = torch.ones(3, 3, requires_grad=True)
    same(side, side.do(device.put(learnt)), np.ones((3, 3), np.float32))
    same(side, side.do(device.put(learnt * 2)), np.full((3, 3), 2, np.float32))
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.complex64):
        with case(dtype):
            tensor = torch.ones(5).to(dtype)
            same(side, side.do(device.put(tensor)), tensor.numpy())
    same(side, side.do(device.put(torch.tensor(3.5))), np.array(3.5, np.float32))
    same(side, side.do(device.put(torch.zeros(0, 4))), np.zeros((0, 4), np.float32))
    with pytest.raises(InvalidBuffer, match="DLPack"):
        side.do(device.put(torch.ones(3, dtype=torch.bfloat16)))
    with pytest.raises(InvalidBuffer, match="DLPack"):
        side.do(device.put(torch.ones(3).to_sparse()))


def test_get_fills_what_is_given(side: Side, device: Any) -> None:
    for size in (6, 60_000):
        host = np.arange(size, dtype=np.float32).reshape(2, -1)
        remote = side.do(device.put(host))
        out = np.zeros_like(host)
        assert side.do(remote.get(out=out)) is out
        assert np.array_equal(out, host)
        window = np.zeros((4, *host.shape), np.float32)
        side.do(remote.get(out=window[2]))
        assert np.array_equal(window[2], host)
        assert not window[[0, 1, 3]].any()
        flat = bytearray(host.nbytes)
        assert side.do(remote.get(out=flat)) is flat
        assert flat == host.tobytes()
        side.do(remote.get(out=memoryview(flat)[:]))
        words = array.array("f", bytes(host.nbytes))
        side.do(remote.get(out=words))
        assert words.tobytes() == host.tobytes()
        tensor = torch.zeros(2, size // 2)
        assert side.do(remote.get(out=tensor)) is tensor
        assert np.array_equal(tensor.numpy(), host)
    nothing = np.zeros((0, 2))
    assert side.do(device.zeros((0, 2)).get(out=nothing)) is nothing
    single = np.zeros(())
    side.do(device.full((), 2.5).get(out=single))
    assert single == 2.5


def read_only(host: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    host.flags.writeable = False
    return host


def test_what_cannot_be_filled_is_refused(side: Side, session: Any, device: Any) -> None:
    """Before anything is sent, and nothing is written."""
    remote = device.ones((2, 3), np.float32)
    trips = session.stats().round_trips.total()
    ours = np.zeros((2, 3), np.float32)
    bad: list[tuple[Any, str]] = [
        (read_only(np.zeros((2, 3), np.float32)), "read-only"),
        (bytes(24), "read-only"),
        (memoryview(bytes(24)), "read-only"),
        (np.zeros((3, 2), np.float32).T, "contiguous"),
        (np.zeros((2, 6), np.float32)[:, ::2], "contiguous"),
        (np.asfortranarray(ours), "contiguous"),
        (np.zeros((3, 2), np.float32), "must be equal"),
        (np.zeros(6, np.float32), "must be equal"),
        (np.zeros((2, 3), np.float64), "must be equal"),
        (np.zeros((2, 3), ">f4"), "must be equal"),
        (np.zeros((2, 3), np.int32), "must be equal"),
        (bytearray(23), "23 bytes"),
        (bytearray(25), "25 bytes"),
        (memoryview(bytearray(48))[::2], "contiguous"),
        (torch.zeros(3, 2), "must be equal"),
        (torch.zeros(3, 2).T, "contiguous"),
        (torch.zeros(2, 3, requires_grad=True), "DLPack"),
        ([0] * 6, "list"),
        ("text", "str"),
    ]
    for out, text in bad:
        with case(text), pytest.raises(InvalidBuffer, match=text):
            side.do(remote.get(out=out))
    assert session.stats().round_trips.total() == trips
    assert side.do(remote.get(out=ours)) is ours
    assert ours.all()


def test_what_cannot_live_on_a_device_is_refused(side: Side, session: Any, device: Any) -> None:
    gc.collect()  # what earlier tests left in circles would be given back, and counted, below
    records = session.stats().records
    bad: list[Any] = [
        np.array([object()]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array(["2026-01-01"], "M8[D]"),
        np.array([1], "m8[s]"),
        np.zeros(3, [("a", "i4"), ("b", "f4")]),
        np.zeros(3, np.longdouble),
        np.array([1, None]),
        np.ma.array([1, 2], mask=[True, False]),
        None,
        "text",
        object(),
        {1, 2},
        [1, "a"],
        [[1, 2], [3]],
    ]
    for value in bad:
        with case(repr(value)), pytest.raises(DTypeError):
            side.do(device.put(value))
    with pytest.raises(DTypeError):
        side.do(device.put([1, 2], dtype="S3"))
    with pytest.raises(GpuRemoteError):
        side.do(device.put_many([np.zeros(3), np.array(["x"])]))
    assert session.stats().records == records


def test_many_small_arrays_in_one_call(side: Side, session: Any, device: Any) -> None:
    hosts = [numbers(k % 50, DTYPES[k % len(DTYPES)], k) for k in range(700)]
    before = session.stats()
    remotes = side.do(device.put_many(hosts))
    after = session.stats()
    assert after.messages_sent - before.messages_sent <= 30
    assert after.round_trips["put"] - before.round_trips["put"] == 1
    got = side.do(session.get_many(remotes))
    last = session.stats()
    assert last.round_trips.total() - after.round_trips.total() == 1
    for host, remote, back in zip(hosts, remotes, got, strict=True):
        assert (remote.shape, remote.dtype) == (host.shape, host.dtype)
        np.testing.assert_array_equal(back, host, strict=True)
    outs = [np.zeros_like(host) for host in hosts]
    found = side.do(session.get_many(remotes, out=outs))
    assert all(a is b for a, b in zip(found, outs, strict=True))
    for host, out in zip(hosts, outs, strict=True):
        assert np.array_equal(out, host)


def test_many_arrays_of_all_sizes(side: Side, session: Any, device: Any) -> None:
    """Also more of them than one message takes."""
    hosts = [pattern(size, size) for size in (0, 1, 1 << 20, 17, 3 << 20, 16384, 16385)]
    for host, back in zip(
        hosts, side.do(session.get_many(side.do(device.put_many(hosts)))), strict=True
    ):
        assert np.array_equal(back, host)
    small = [np.full(3, k) for k in range(5000)]
    remotes = side.do(device.put_many(small))
    joined: Any = np.concatenate(remotes[:300])
    assert np.array_equal(side.do(joined.get()), np.concatenate(small[:300]))
    assert [a[0] for a in side.do(session.get_many(remotes))] == list(range(5000))
    assert side.do(device.put_many([])) == []
    assert side.do(session.get_many([])) == []
    with pytest.raises(ValueError, match="places"):
        side.do(session.get_many(remotes[:2], out=[np.zeros(3)]))


def test_a_download_keeps_what_was_asked_for(side: Side, device: Any) -> None:
    """An op in place after a get does not change what the get brings."""
    for size in (100, 30_000, 8 << 20):
        remote = side.do(device.put(np.zeros(size, np.uint8)))
        got, view = remote._host_target(None)
        asked = remote._ask_bytes(view)  # as get does before it waits
        remote += 1
        remote[:] = 7
        side.do(remote._core.wait(asked))
        assert not got.any()
        assert side.do(remote.get()).min() == 7


def test_results_are_the_callers_own(side: Side, device: Any) -> None:
    for size in (10, 1 << 20):
        remote = device.zeros(size)
        first, second = side.do(remote.get()), side.do(remote.get())
        first[:] = 1
        assert not second.any()
        assert first.flags.owndata
        assert not side.do(remote.get()).any()


def test_scalars(side: Side, device: Any) -> None:
    assert side.do(device.full((), 3).item()) == 3
    assert type(side.do(device.full(1, 3).item())) is int
    assert type(side.do(device.full((1, 1), 3.5, "f4").item())) is float
    assert side.do(device.full((), 1j).item()) == 1j
    assert side.do(device.full((), True).item()) is True
    assert side.do(device.arange(4).reshape(2, 2).tolist()) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="one element"):
        side.do(device.arange(2).item())
