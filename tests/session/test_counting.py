"""What costs a round trip is counted, and nothing comes to the host unasked."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuremote
from gpuremote.errors import ImplicitTransfer
from gpuremote.testing.servers import RunningServer
from tests.faults.sides import AsyncSide, BlockingSide, Side
from tests.session.comparing import case

OPS = 10_000


def growth(before: Any, after: Any) -> dict[str, Any]:
    """What was counted in between."""
    first, last = before.as_dict(), after.as_dict()
    found = {name: last[name] - first[name] for name in first if name != "round_trips"}
    trips = after.round_trips - before.round_trips
    return found | {"round_trips": dict(trips)}


@pytest.mark.parametrize("keep", [False, True], ids=["dropped", "kept"])
def test_ten_thousand_ops_are_one_round_trip(
    side: Side, session: Any, device: Any, keep: bool
) -> None:
    """And 64 bytes each at most, the first of each kind apart; arrays kept or dropped."""
    x, one = device.zeros((8, 8), "f4"), device.ones((8, 8), "f4")
    side.do((x + one * 2.0 - 1).get())
    side.do(session.synchronize())
    there = side.do(session.server_stats())["ops"]
    before = session.stats()
    kept = []
    for k in range(OPS // 4):
        x = x + one
        x = x * 0.5
        x = x - one[k % 8]
        if keep:
            kept.append(x)
    host = side.do(x.get())
    after = session.stats()
    found = growth(before, after)
    assert found["round_trips"] == {"get": 1}
    assert found["ops"] == OPS
    assert side.do(session.server_stats())["ops"] == there + OPS
    # What is sent: ops, and handles that are given back; the definition of one plan (indexing).
    assert found["bytes_sent"] / OPS <= 64
    assert found["messages_sent"] <= OPS / 40
    assert found["messages_received"] <= OPS / 40
    assert found["bytes_received"] < 64 * 1024
    assert found["payload_sent"] == found["payload_received"] == found["implicit_downloads"] == 0
    assert found["plans"] <= 2
    assert host.shape == (8, 8)


def test_scalars_that_change_share_a_plan(side: Side, session: Any, device: Any) -> None:
    x = device.zeros(100)
    side.do(x.wait())
    before = session.stats()
    for k in range(100):
        x = x + k * 0.5
        x = x + k
        x[k] = k
        x[k] += 1
    side.do(x.wait())
    assert growth(before, session.stats())["plans"] <= 6


def test_small_uploads_make_no_round_trip(side: Side, session: Any, device: Any) -> None:
    before = session.stats()
    arrays = [side.do(device.put(np.full(200, k))) for k in range(100)]
    assert growth(before, session.stats())["round_trips"] == {}
    total: Any = np.concatenate(arrays)
    assert side.do(total.sum().item()) == 200 * sum(range(100))
    found = growth(before, session.stats())
    assert found["round_trips"] == {"item": 1}
    assert found["payload_sent"] == 0
    assert found["payload_copied"] >= 100 * 1600


def test_what_makes_a_round_trip_is_counted_by_kind(side: Side, session: Any, device: Any) -> None:
    before = session.stats()
    x = side.do(device.put(np.zeros(50_000)))
    side.do(x.get())
    side.do(x.get())
    side.do(x[0].item())
    side.do(session.synchronize())
    side.do(x[:3].wait())
    side.do(session.get_many([x, x, x]))
    side.do(device.put_many([np.zeros(50_000)] * 3))
    event = device.stream().record()
    side.do(event.synchronize())
    side.do(event.query())
    found = growth(before, session.stats())
    # What lies in memory of this process is asked for once.
    known = isinstance(side, BlockingSide) and session.transport.name == "shm"
    assert found["round_trips"] == {
        "put": 1 + (session.transport.name == "tcp"),  # into shared memory waits for nothing
        "get": 3 - known,
        "item": 1,
        "synchronize": 1,
        "shape": 1,
        "event": 2,
    }
    assert found["payload_sent"] == 4 * 400_000
    assert found["payload_received"] == (5 - known) * 400_000
    before = session.stats()
    y = (x.copy_to(session.devices[1]) * 2).reshape(-1, 2).T.sum(0)
    with device.stream():
        y += 1
    session.flush()
    assert growth(before, session.stats())["round_trips"] == {}
    plain = session.stats().as_dict()
    assert plain["round_trips"]["get"] >= 3 - known
    assert all(isinstance(v, int) for name, v in plain.items() if name != "round_trips")


def test_metadata_is_free(side: Side, session: Any, device: Any) -> None:
    x = device.zeros((3, 4), "f4")
    gc.collect()  # what earlier tests left in circles would be given back, and counted, below
    records = session.stats().records
    assert (x.shape, x.ndim, x.size, x.nbytes, x.itemsize) == ((3, 4), 2, 12, 48, 4)
    assert x.dtype == np.float32
    assert len(x) == 3
    assert x.device is device
    assert "(3, 4)" in repr(x)
    assert "float32" in repr(x)
    assert str(device) in repr(x)
    with pytest.raises(TypeError, match="0-d"):
        len(device.zeros(()))
    assert session.stats().records == records + 2


# -- nothing comes by itself --------------------------------------------------------------------

REFUSED: list[tuple[str, Callable[[Any], Any]]] = [
    ("np.asarray", np.asarray),
    ("np.array", lambda x: np.array(x)),
    ("nested", lambda x: np.array([x, x])),
    ("iter", iter),
    ("for", lambda x: {float(item) for item in x}),
    ("list", list),
    ("unpack", lambda x: (lambda a, b, c: a)(*x)),
    ("max", max),
    ("sum", sum),
    ("in", lambda x: 3 in x),
    ("pickle", pickle.dumps),
    ("copy", copy.copy),
    ("deepcopy", copy.deepcopy),
]


def test_what_would_fetch_unasked_is_refused(side: Side, session: Any, device: Any) -> None:
    x = device.arange(3)
    side.do(session.synchronize())
    before = session.stats()
    for name, use in REFUSED:
        with case(name), pytest.raises(ImplicitTransfer):
            use(x)
    found = growth(before, session.stats())
    assert found["round_trips"] == {}
    assert found["implicit_downloads"] == 0
    with pytest.raises(TypeError):
        hash(x)
    with pytest.raises(ImplicitTransfer):
        side.do(device.put([x, x]))


def test_python_scalars(side: Side, session: Any, device: Any) -> None:
    """Asking for one waits, and is counted; in an asyncio session it would block the loop."""
    uses: list[tuple[Callable[[Any], Any], Any]] = [
        (bool, True),
        (int, 2),
        (float, 2.0),
        (complex, 2 + 0j),
        (lambda x: [10, 20, 30][x], 30),
        (lambda x: list(range(x)), [0, 1]),
        (lambda x: "yes" if x > 1 else "no", "yes"),
    ]
    x = device.full((), 2)
    for k, (use, expected) in enumerate(uses):
        before = session.stats()
        with case(k):
            if isinstance(side, AsyncSide):
                with pytest.raises(ImplicitTransfer, match=r"await x\.item"):
                    use(x)
                assert growth(before, session.stats())["round_trips"] == {}
            else:
                assert use(x) == expected
                assert growth(before, session.stats())["round_trips"] == {"item": 1}
    if isinstance(side, BlockingSide):
        with pytest.raises(ValueError, match="one element"):
            bool(device.ones(2))
        with pytest.raises(TypeError, match="index"):
            range(device.full((), 2.0))


def test_implicit_downloads_follow_the_setting(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocking = BlockingSide()
    monkeypatch.setenv("GPUREMOTE_DOWNLOAD", "warn")
    with blocking.session(server.url) as session:
        x = session.devices[0].arange(4)
        with pytest.warns(RuntimeWarning, match="implicit download of 32 bytes") as caught:
            assert np.asarray(x).tolist() == [0, 1, 2, 3]
        assert caught[0].filename == __file__
        assert session.stats().implicit_downloads == 1
    monkeypatch.setenv("GPUREMOTE_DOWNLOAD", "allow")
    with blocking.session(server.url) as session:
        x = session.devices[0].arange(4)
        assert np.asarray(x).tolist() == [0, 1, 2, 3]
        assert np.asarray(x, "f4").dtype == np.float32
        assert np.array([x, x]).shape == (2, 4)
        assert session.stats().implicit_downloads >= 4
        with pytest.raises(ImplicitTransfer):
            np.asarray(x, copy=False)  # there is no way without one
        with pytest.raises(ImplicitTransfer):
            iter(x)
        count = session.stats().implicit_downloads
        x.get()
        assert session.stats().implicit_downloads == count


async def test_implicit_downloads_would_block_a_loop(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the setting: there they are refused, and not counted."""
    monkeypatch.setenv("GPUREMOTE_DOWNLOAD", "allow")
    async with gpuremote.connect(server.url) as session:
        x = session.devices[0].arange(4)
        with pytest.raises(ImplicitTransfer, match="await"):
            np.asarray(x)
        assert session.stats().implicit_downloads == 0
        assert (await x.get()).tolist() == [0, 1, 2, 3]
