"""The namespace as such: names, what the array API standard asks, devices, text, files."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest

import gpuremote
from gpuremote.cupy import _names
from gpuremote.errors import GpuRemoteError, ImplicitTransfer, UnsupportedOp
from gpuremote.testing.servers import device_server
from tests.session.comparing import case

NOT_OF_THE_STANDARD = {
    "ArrayAPIStrictFlags",
    "Device",
    "get_array_api_strict_flags",
    "reset_array_api_strict_flags",
    "set_array_api_strict_flags",
    "__version__",
}


def standard(module: Any) -> Iterator[tuple[str, Any]]:
    for name in module.__all__:
        if name not in NOT_OF_THE_STANDARD:
            yield name, getattr(module, name)


def accepts(ours: inspect.Signature, standard: inspect.Signature) -> None:
    """Every call that the standard's signature allows."""
    mine = list(ours.parameters.values())
    for place, wanted in enumerate(standard.parameters.values()):
        if wanted.kind is wanted.KEYWORD_ONLY:
            found = ours.parameters[wanted.name]
            assert found.kind in (found.KEYWORD_ONLY, found.POSITIONAL_OR_KEYWORD)
        elif wanted.kind is wanted.VAR_POSITIONAL:
            assert mine[place].kind is wanted.VAR_POSITIONAL
        else:
            found = mine[place]
            assert found.kind in (found.POSITIONAL_ONLY, found.POSITIONAL_OR_KEYWORD)
            if wanted.kind is wanted.POSITIONAL_OR_KEYWORD and wanted.name not in ("x", "x1", "x2"):
                assert found.name == wanted.name
                assert found.kind is wanted.kind
        if wanted.default is not wanted.empty:
            assert ours.parameters.get(wanted.name, mine[place]).default is not wanted.empty


@pytest.mark.parametrize("part", ["", "linalg", "fft"])
def test_names_and_signatures_of_the_standard(xp: Any, part: str) -> None:
    ours = getattr(xp, part) if part else xp
    theirs = getattr(array_api_strict, part) if part else array_api_strict
    names = (
        [(n, getattr(theirs, n)) for n in ours.__all__ if hasattr(theirs, n)]
        if part
        else list(standard(theirs))
    )
    assert len(names) > 10
    for name, value in names:
        with case(name):
            assert hasattr(ours, name)
            if inspect.isfunction(value):
                accepts(inspect.signature(getattr(ours, name)), inspect.signature(value))


def test_methods_of_the_standard(xp: Any) -> None:
    for name in dir(array_api_strict.ones(1)):
        # A buffer is host memory; the others are what any object has.
        if name != "__buffer__" and (name[0] != "_" or name.startswith("__")):
            with case(name):
                assert hasattr(xp.ndarray, name) or name in ("__dict__", "__module__")


def test_namespace_info(xp: Any) -> None:
    info = xp.__array_namespace_info__()
    assert info.capabilities() == {
        "boolean indexing": True,
        "data-dependent shapes": True,
        "max dimensions": 64,
    }
    assert info.default_device() is xp.zeros(1).device
    assert info.default_device() in info.devices()
    assert info.default_dtypes()["real floating"] == xp.float64
    assert set(info.dtypes()) == set(array_api_strict.__array_namespace_info__().dtypes())
    assert set(info.dtypes(kind="integral")) == {
        f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)
    }
    assert info.dtypes(kind=("bool", "complex floating")).keys() == {
        "bool",
        "complex64",
        "complex128",
    }
    with pytest.raises(ValueError, match="imaginary"):
        info.dtypes(kind="imaginary")
    x = xp.ones(3)
    assert x.__array_namespace__() is xp
    assert x.__array_namespace__(api_version="2024.12") is xp
    with pytest.raises(ValueError, match="1999"):
        x.__array_namespace__(api_version="1999.12")


def test_nothing_has_to_be_configured() -> None:
    """In a process of its own: this one's default session is that of the tests."""
    code = (
        "import gpuremote.cupy as xp; xp.__array_namespace_info__(); "
        "print(xp.session().devices[0].kind, float(xp.arange(4).sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("cpu 6.0\n", "")


def test_importing_opens_nothing() -> None:
    code = (
        "import sys, gpuremote.cupy as xp; from gpuremote.cupy import _home; "
        "print([m for m in ('torch', 'cupy', 'scipy') if m in sys.modules], _home._default)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[] None\n", done.stderr


CUPY = json.loads((Path(__file__).parent / "cupy_names.json").read_text())
"""The names of CuPy 14.2, as it has them itself."""


@pytest.mark.parametrize("part", ["", "linalg", "fft", "random"])
def test_names_of_cupy(xp: Any, part: str) -> None:
    ours = _names.NAMES if not part else vars(getattr(xp, part))
    missing = [name for name in CUPY[part] if name not in ours]
    assert len(missing) <= 0.05 * len(CUPY[part])
    if not part:
        assert set(missing) == set(xp.missing())
        assert all(xp.missing().values())


def test_what_is_not_there_is_refused_by_name(xp: Any) -> None:
    with pytest.raises(AttributeError, match="'meshgird'; near it are meshgrid"):
        _ = xp.meshgird
    with pytest.raises(AttributeError, match=r"poly1d.*polyval"):
        _ = xp.poly1d
    with pytest.raises(AttributeError, match=r"shares_memory.*known on the device alone"):
        _ = xp.shares_memory
    with pytest.raises(UnsupportedOp, match="busday"):
        np.busday_count(xp.ones(1), xp.ones(1))
    with pytest.raises(UnsupportedOp, match="arctan2"):
        np.arctan2.reduce(xp.ones(2))


# -- values -------------------------------------------------------------------------------------


def test_numpy_functions_run_there(xp: Any) -> None:
    x = xp.asarray([[1.0, 2.0], [3.0, 4.0]])
    host = x.get()
    before = xp.session().stats()
    pairs = [
        (np.add(x, 1), host + 1),
        (np.add.reduce(x, axis=1), host.sum(1)),
        (np.add.accumulate(x), np.add.accumulate(host)),
        (np.concatenate([x, x]), np.concatenate([host, host])),
        (np.linalg.inv(x), np.linalg.inv(host)),
        (np.fft.fft(x), np.fft.fft(host)),
        (np.median(x), np.median(host)),
        (np.einsum("ij->ji", x), host.T),
        (np.multiply.outer(x, x), np.multiply.outer(host, host)),
        (np.where(x > 2, x, 0), np.where(host > 2, host, 0)),
    ]
    after = xp.session().stats()
    assert after.round_trips == before.round_trips
    assert after.implicit_downloads == 0
    for found, expected in pairs:
        assert isinstance(found, xp.ndarray)
        np.testing.assert_allclose(found.get(), expected, rtol=1e-12, atol=1e-12)
    out = xp.zeros((2, 2))
    assert np.add(x, x, out=out) is out
    np.testing.assert_array_equal(out.get(), 2 * host)


def test_host_arrays_are_no_operands(xp: Any) -> None:
    x, host = xp.ones(3), np.ones(3)
    for attempt in (
        lambda: x + host,
        lambda: host + x,
        lambda: xp.add(x, host),
        lambda: xp.sum(host),
        lambda: np.asarray(x),
        lambda: xp.concatenate([x, host]),
    ):
        with pytest.raises(ImplicitTransfer, match=r"upload|asarray|get\(\)"):
            attempt()
    assert (x + np.float32(2)).dtype == xp.float64
    assert (x.astype("f4") + np.float64(2)).dtype == xp.float64
    assert (x.astype("f4") + 2.0).dtype == xp.float32
    assert float((x + np.asarray(2.0)).sum()) == 9


def test_creation_from_whatever(xp: Any) -> None:
    x = xp.arange(3)
    nested = xp.asarray([x, x + 1, [7, 8, 9]])
    assert nested.shape == (3, 3)
    assert nested.get().tolist() == [[0, 1, 2], [1, 2, 3], [7, 8, 9]]
    assert xp.asarray([[x[0], 5], [1, x[2]]]).tolist() == [[0, 5], [1, 2]]
    assert xp.asarray(x) is x
    assert xp.asarray(x, copy=True) is not x
    assert xp.array(x) is not x
    assert xp.array(5, ndmin=2).shape == (1, 1)
    assert xp.asarray(x, dtype="f4").dtype == np.float32
    assert xp.from_dlpack(np.arange(4)).tolist() == [0, 1, 2, 3]
    assert xp.from_dlpack(x) is x
    assert xp.empty((2, 3), "f4").shape == xp.empty_like(xp.ones((2, 3))).shape == (2, 3)
    with pytest.raises(ValueError, match="copied"):
        xp.asarray(np.ones(3), copy=False)
    with pytest.raises(TypeError, match="DLPack"):
        xp.from_dlpack([1, 2])
    with pytest.raises(OverflowError):
        xp.asarray(1 << 70)
    torch = pytest.importorskip("torch")
    assert xp.asarray(torch.arange(3)).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(torch.from_dlpack(x).numpy(), [0, 1, 2])
    np.testing.assert_array_equal(np.from_dlpack(x), [0, 1, 2])
    assert x.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError):
        x.__dlpack__(copy=False)
    with pytest.raises(AttributeError, match="another machine"):
        _ = x.__cuda_array_interface__


def test_a_shape_can_be_assigned(xp: Any) -> None:
    x = same = xp.arange(6)
    x.shape = (2, 3)
    assert x is same
    assert x.shape == (2, 3)
    assert xp.asnumpy(x).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="shape"):
        x.shape = (4, 2)
    assert x.shape == (2, 3)


def test_dtype_questions(xp: Any) -> None:
    x, y = xp.ones(2, "f4"), xp.ones(2, "i4")
    assert xp.result_type(x, y) == np.float64
    assert xp.result_type(x, 1.0) == np.float32
    assert xp.can_cast(x, "f8")
    assert not xp.can_cast(x, "i4")
    assert xp.isdtype(x.dtype, "real floating")
    assert xp.isdtype(np.int8, ("bool", "signed integer"))
    assert xp.common_type(x, y) is np.float64
    assert xp.min_scalar_type(300) == np.uint16
    limits = xp.finfo(x)
    assert isinstance(limits.eps, float)
    assert limits.eps == float(np.finfo("f4").eps)
    assert limits.dtype == np.float32
    assert xp.iinfo(y).max == np.iinfo("i4").max
    assert type(xp.iinfo("i8").max) is int
    assert xp.get_array_module(x) is xp
    assert xp.get_array_module(np.ones(1)) is np


def test_text_fetches_what_it_shows(xp: Any) -> None:
    for host in (
        np.arange(6).reshape(2, 3),
        np.array(1.5),
        np.arange(20000.0),
        np.arange(40000.0).reshape(200, 200),
        np.ones((2, 3, 1000)),
        np.zeros(0),
        np.ones(3, "f4"),
    ):
        x = xp.asarray(host)
        received = xp.session().stats().bytes_received
        assert repr(x) == repr(host)
        assert str(x) == str(host)
        assert xp.session().stats().bytes_received - received < 40_000
    x = xp.asarray(2.5)
    assert f"{x:.3f}" == "2.500"
    assert f"{xp.arange(2)}" == "[0 1]"
    big = xp.arange(9000.0)
    assert xp.array2string(big) == np.array2string(big.get())
    assert xp.array_repr(big, precision=2) == np.array_repr(big.get(), precision=2)
    assert xp.array_str(big) == np.array_str(big.get())


def test_files(xp: Any, tmp_path: Path) -> None:
    x = xp.arange(6.0).reshape(2, 3)
    xp.save(tmp_path / "x.npy", x)
    assert xp.load(tmp_path / "x.npy").tolist() == x.tolist()
    xp.savez(tmp_path / "x.npz", x, second=x + 1)
    assert xp.load(tmp_path / "x.npz")["second"].tolist() == (x + 1).tolist()
    xp.savez_compressed(tmp_path / "y.npz", y=x)
    assert xp.load(tmp_path / "y.npz")["y"].tolist() == x.tolist()
    xp.savetxt(tmp_path / "x.txt", x)
    for read in (xp.loadtxt, xp.genfromtxt):
        assert read(tmp_path / "x.txt").tolist() == x.tolist()
    x.get().tofile(tmp_path / "x.bin")
    assert xp.fromfile(tmp_path / "x.bin").tolist() == x.ravel().tolist()
    assert xp.fromstring("1 2 3", sep=" ").tolist() == [1, 2, 3]
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        xp.load(tmp_path / "objects.npy")


def test_pickle_and_copies(xp: Any) -> None:
    x = xp.arange(6).reshape(2, 3)
    again = pickle.loads(pickle.dumps(x))
    assert isinstance(again, xp.ndarray)
    assert again.tolist() == x.tolist()
    for made in (copy.copy(x), copy.deepcopy(x)):
        made[0, 0] = 99
        assert int(x[0, 0]) == 0
    assert pickle.loads(pickle.dumps(xp.add)) is xp.add
    assert sys.getsizeof(x) < 200
    assert x.nbytes == 48


def test_ufuncs(xp: Any) -> None:
    x = xp.asarray([1.0, -2.0, 3.0])
    assert xp.add(x, 1, dtype="f4").dtype == np.float32
    assert xp.sqrt(xp.asarray([4, 9]), dtype="f4").tolist() == [2, 3]
    out = xp.full(3, 7.0)
    xp.multiply(x, 2, out=out, where=x > 0)
    assert out.tolist() == [2, 7, 6]
    assert xp.add(x, x, out=x) is x
    assert x.tolist() == [2, -4, 6]
    assert xp.negative(x, out) is out
    quotient, rest = xp.divmod(xp.asarray([7.0, 8.0]), 3)
    assert (quotient.tolist(), rest.tolist()) == ([2, 2], [1, 2])
    assert [p.tolist() for p in divmod(xp.asarray([7, 8]), 3)] == [[2, 2], [1, 2]]
    assert [p.tolist() for p in divmod(9, xp.asarray([2, 4]))] == [[4, 2], [1, 1]]
    counts = xp.zeros(4)
    xp.add.at(counts, xp.asarray([0, 0, 3]), 1)
    assert counts.tolist() == [2, 0, 0, 1]
    table = xp.zeros((2, 3))
    xp.maximum.at(table, (xp.asarray([0, 1, 1]), xp.asarray([2, 0, 0])), xp.asarray([5.0, 1, 4]))
    assert table.tolist() == [[0, 0, 5], [4, 0, 0]]
    assert xp.scatter_add(counts, xp.asarray([1]), 3) is None
    assert counts.tolist() == [2, 3, 0, 1]
    assert xp.sin(0.0).shape == ()
    assert xp.add([1, 2], xp.asarray([3, 4])).tolist() == [4, 6]
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: xp.add(x), "2 operands"),
        (lambda: xp.add(x, 1, out=np.zeros(3)), "remote"),
        (lambda: xp.add(x, 1, out=xp.zeros(3, "i4")), "int32"),
        (lambda: xp.add(x, 1, out=xp.zeros(4)), "shape"),
        (lambda: xp.sin.reduce(x), "reduce"),
        (lambda: xp.power.at(x, 0, 1), "at does not run"),
        (lambda: xp.add(x, 1, where=xp.ones(3)), "bools"),
    ]
    for bad, text in refusals:
        with pytest.raises((GpuRemoteError, TypeError), match=text):
            bad()


def test_objects_of_indices(xp: Any) -> None:
    x = xp.arange(3)
    assert xp.r_[0:3, 7, x].tolist() == [0, 1, 2, 7, 0, 1, 2]
    assert xp.r_[0:1:3j].tolist() == [0, 0.5, 1]
    assert xp.c_[x, x + 1].tolist() == np.c_[np.arange(3), np.arange(1, 4)].tolist()
    np.testing.assert_array_equal(xp.mgrid[0:2, 0:3].get(), np.mgrid[0:2, 0:3])
    for found, expected in zip(xp.ogrid[0:2, 0:3], np.ogrid[0:2, 0:3], strict=True):
        np.testing.assert_array_equal(found.get(), expected)
    with pytest.raises(UnsupportedOp):
        _ = xp.r_["0,2", x]


def test_small_tools(xp: Any) -> None:
    doubled = xp.vectorize(lambda v: v * 2, otypes=[np.float32])
    assert doubled([1, 2]).dtype == np.float32
    assert xp.fuse(lambda v: v + 1)(xp.ones(1)).tolist() == [2]
    assert xp.fuse(kernel_name="n")(lambda v: v + 1)(xp.ones(1)).tolist() == [2]
    calls: list[int] = []
    kept = xp.memoize()(lambda v: calls.append(v))
    kept(1), kept(1)
    xp.clear_memo()
    kept(1)
    assert calls == [1, 1]
    assert xp.broadcast(xp.ones((2, 1)), xp.ones(3)).shape == (2, 3)
    stream = io.StringIO()
    xp.disp(xp.arange(2), stream)
    assert stream.getvalue() == "[0 1]\n"
    assert xp.asnumpy(xp.ones(2)).tolist() == xp.asnumpy([1.0, 1.0]).tolist()
    xp.testing.assert_allclose(xp.ones(2), np.ones(2))
    with pytest.raises(AssertionError):
        xp.testing.assert_array_equal(xp.ones(2), [1, 2])


# -- devices ------------------------------------------------------------------------------------


def test_the_namespace_of_a_device(xp: Any) -> None:
    first, second = xp.session().devices
    here = second.xp
    assert here is second.xp
    x = here.ones(3)
    assert x.device is second
    assert x.__array_namespace__() is here
    assert here.add(x, 1).device is second
    assert here.random.default_rng(1).random(3).device is second
    assert here.linalg.inv(here.eye(2)).device is second
    assert here.float32 is xp.float32
    assert first.xp is xp
    moved = x.to_device(first)
    assert moved.device is first
    assert moved.tolist() == [1, 1, 1]
    assert xp.zeros(2, device=second).device is second
    assert xp.asarray(moved, device=second).device is second
    with pytest.raises(GpuRemoteError, match="different devices"):
        _ = x + moved
    with xp.cuda.Device(1) as device:
        assert device.id == 1
        assert xp.ones(1).device is second
        assert xp.cuda.Device().id == 1
    assert xp.ones(1).device is first
    assert xp.cuda.runtime.getDeviceCount() == 2
    with pytest.raises(GpuRemoteError, match="device 7 of 2"):
        xp.cuda.Device(7)


def test_two_servers(xp: Any) -> None:
    with device_server() as running, gpuremote.connect_sync(running.url) as session:
        there = session.devices[0].xp
        x = there.arange(3)
        assert x.device is session.devices[0]
        assert x.__array_namespace__() is there
        assert (x + x).to_device(xp.session().devices[0]).tolist() == [0, 2, 4]
        # Arrays that the device itself makes are this namespace's too from now on.
        assert isinstance(session.devices[0].put(np.ones(2)), xp.ndarray)


def test_streams_events_and_memory(xp: Any) -> None:
    stream, start, end = xp.cuda.Stream(), xp.cuda.Event(), xp.cuda.Event()
    start.record()
    with stream:
        x = xp.ones(1000) + 1
        end.record(stream)
    end.synchronize()
    assert end.done
    assert xp.cuda.get_elapsed_time(start, end) >= 0
    xp.cuda.Stream.null.wait_event(end)
    stream.synchronize()
    xp.cuda.Stream.null.synchronize()
    dropped = xp.cuda.Stream().use()
    assert xp.cuda.get_current_stream() is dropped
    del dropped, stream
    gc.collect()
    assert xp.ones(2).tolist() == [1, 1]
    xp.cuda.Stream.null.use()
    assert xp.cuda.get_current_stream() is xp.cuda.Stream.null
    pool = xp.get_default_memory_pool()
    assert pool.used_bytes() >= x.nbytes
    assert pool.get_limit() > pool.total_bytes() >= pool.used_bytes()
    pool.free_all_blocks()
    assert not xp.is_available()
    with pytest.raises(RuntimeError, match="recorded"):
        xp.cuda.Event().synchronize()


def test_awaiting_does_not_block_the_loop(xp: Any) -> None:
    x = xp.ones((600, 600))
    for _ in range(8):
        x = x @ x / 600
    corner, few, mask = x[0, 0], xp.arange(4), xp.arange(4) > 1

    async def program() -> list[Any]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        found = [
            (await x.get_async()).shape,
            await corner.item_async(),
            await few.tolist_async(),
            [(await i.get_async()).tolist() for i in await mask.nonzero_async()],
            (await (await few.compress_async([True, False, True])).get_async()).tolist(),
            (await (await few.wait_async()).get_async()).shape,
            await (await few.getitem_async(mask)).tolist_async(),
        ]
        ticking.cancel()
        assert ticks
        await asyncio.get_running_loop().shutdown_default_executor()
        return found

    assert asyncio.run(program()) == [
        (600, 600), 1.0, [0, 1, 2, 3], [[2, 3]], [0, 2], (4,), [2, 3],
    ]  # fmt: skip
