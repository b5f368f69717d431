"""Blocks of host memory that are used again."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuremote.backend.blocks import LINE, SMALLEST, BlockPool, aligned

F8 = np.dtype("f8")


def address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def test_a_freed_block_is_used_again() -> None:
    pool = BlockPool()
    first = pool.empty((1 << 17,), F8, 1 << 20)
    first[:] = 1
    where = address(first)
    del first
    again = pool.empty((2, 1 << 16), F8, 1 << 20)
    assert address(again) == where
    assert again.shape == (2, 1 << 16)
    assert again.flags.writeable
    assert again.flags.c_contiguous


def test_a_block_in_use_by_a_view_or_an_export_is_not() -> None:
    pool = BlockPool()
    array = pool.empty((1 << 17,), F8, 1 << 20)
    view = array[10:20]
    export = array.data
    where = address(array)
    del array
    other = pool.empty((1 << 17,), F8, 1 << 20)
    assert address(other) != where
    del view
    assert not pool.spare
    export.release()
    del export
    gc.collect()
    assert [memory.address for memory in pool.spare] == [where]


def test_a_request_that_none_fits_drops_the_spare_ones() -> None:
    pool = BlockPool()
    pool.empty((1 << 17,), F8, 1 << 20)
    assert len(pool.spare) == 1
    large = pool.empty((1 << 20,), F8, 1 << 23)
    assert pool.spare == []
    assert large.nbytes == 1 << 23


def test_small_and_empty_arrays_are_numpys_own() -> None:
    pool = BlockPool()
    for shape in ((0,), (3,), (SMALLEST // 8 - 1,)):
        pool.empty(shape, F8, int(np.prod(shape)) * 8)
    assert pool.spare == []


def test_it_keeps_no_more_than_it_was_told() -> None:
    pool = BlockPool(keep=2)
    arrays = [pool.empty((1 << 17,), F8, 1 << 20) for _ in range(5)]
    del arrays
    assert len(pool.spare) == 2


def test_threads_never_share_a_block() -> None:
    pool = BlockPool(keep=8)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(200):
            array = pool.empty((1 << 17,), F8, 1 << 20)
            array[::4096] = mark
            if (array[::4096] != mark).any():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_blocks_begin_with_a_line_of_the_cache() -> None:
    pool = BlockPool()
    for nbytes in (SMALLEST, SMALLEST + 4096, (3 << 20) + 8):
        made = pool.empty((nbytes,), np.dtype("u1"), nbytes)
        assert made.nbytes == nbytes
        assert made.ctypes.data % LINE == 0
    for nbytes in (1, 100, 512 << 10):
        memory = aligned(nbytes)
        assert (memory.nbytes, memory.ctypes.data % LINE) == (nbytes, 0)
