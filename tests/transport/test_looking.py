"""A thread that looks for bytes before it sleeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gpuremote._speed import native
from gpuremote.errors import ConnectionLost
from gpuremote.transport._sockets import processors
from gpuremote.transport.base import Incoming, Region
from gpuremote.transport.tcp import TcpConnection, pair


@contextlib.contextmanager
def ends() -> Iterator[tuple[TcpConnection, TcpConnection]]:
    here, there = pair(blocking=True)
    try:
        yield here, there
    finally:
        here.abort()
        there.abort()


def test_with_one_processor_nobody_looks() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with ends() as (here, _):
            assert here.looks == 0
            assert not here._more_soon()
    finally:
        os.sched_setaffinity(0, allowed)
    with ends() as (here, _):
        assert (here.looks > 0) == (processors() > 1)


@pytest.mark.skipif(processors() < 2, reason="with one processor nobody looks")
def test_more_of_a_payload_is_found_while_looking() -> None:
    with ends() as (here, there):
        there.send(b"x" * 100)
        assert here._more_soon()
        assert here._more_soon()  # it is still there
        assert here.receive() is not None
        assert not here._more_soon()


@pytest.mark.skipif(native is None, reason="only the part in C goes to another processor")
@pytest.mark.skipif(processors() < 2, reason="there is no other one")
def test_a_thread_that_shares_its_processor_goes_to_another_one() -> None:
    """And may use all those afterwards that it could use before."""
    where = ctypes.CDLL(None).sched_getcpu
    allowed = os.sched_getaffinity(0)
    found: list[object] = []

    def look() -> None:
        try:
            os.sched_setaffinity(0, {first})
            os.sched_setaffinity(0, allowed)
            deadline = time.monotonic() + 10
            while where() == first and time.monotonic() < deadline:
                with ends() as (here, _):  # which has yet to learn that looking is in vain
                    here.roams = True
                    here._more_soon()
            found.append(where() != first)
            found.append(os.sched_getaffinity(0) == allowed)
        except BaseException as error:
            found.append(error)

    first = min(allowed)
    code = f"import os\nos.sched_setaffinity(0, {{{first}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        finally:
            busy.kill()
    assert found == [True, True]


@pytest.mark.skipif(native is None, reason="only the part in C goes to another processor")
@pytest.mark.skipif(processors() < 2, reason="there is no other one")
def test_what_others_take_of_the_processor_adds_up() -> None:
    """Over looks: a peer that sends a MiB has it for 80 µs in each, and never sees this thread
    wait. Until a look that waits, and in which nobody had it."""
    allowed, first = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    before, found = 10**9, list[object]()

    def look() -> None:
        try:
            with ends() as (here, there):
                stream: Any = here
                os.sched_setaffinity(0, {first})  # there is no other place to go to
                stream.roams, stream._gap_looks = True, 1
                added = 0
                deadline = time.monotonic() + 10
                while added < 3 and time.monotonic() < deadline:
                    stream._taken = before
                    there.send(b"x")
                    assert here._more_soon()  # at once: that says nothing, and looks go on
                    assert stream._taken == before
                    assert here.receive() is not None
                    assert not here._more_soon()
                    assert stream._taken == 0 or stream._taken > before
                    added += stream._taken > before
            found.append(added)
        except BaseException as error:
            found.append(error)
        finally:
            os.sched_setaffinity(0, allowed)

    code = f"import os\nos.sched_setaffinity(0, {{{first}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        finally:
            busy.kill()
    assert found == [3]
    deadline, taken = time.monotonic() + 10, 1
    while taken and time.monotonic() < deadline:  # others may run here just now
        with ends() as (here, _):
            stream: Any = here
            stream.roams, stream._gap_looks, stream._taken = True, 1, before
            assert not here._more_soon()
            taken = stream._taken
    assert taken == 0


def test_no_byte_comes_after_a_discard() -> None:
    """However the receiving thread waits for the next one: the memory is the program's again."""
    data = bytes(range(256)) * (8 << 12)
    for turn in range(40):
        with ends() as (here, there):
            _discard_after(turn, data, here, there)


def _discard_after(steps: int, data: bytes, here: TcpConnection, there: TcpConnection) -> None:
    there.send(b"header", [Region(data)])
    incoming = None
    while incoming is None:
        incoming = here.receive(1.0)
    buffer = bytearray(len(data))
    arrived, over = threading.Event(), threading.Event()

    def done(_: Incoming) -> None:
        arrived.set()

    def receive() -> None:
        while not over.is_set():
            here.receive(1.0)

    incoming.into([memoryview(buffer)], done)
    receiver = threading.Thread(target=receive)
    receiver.start()
    try:
        for _ in range(steps):
            there.flush()
            time.sleep(0.0001)
        incoming.discard(done)
        found = bytes(buffer)
        while not there.flush():
            time.sleep(0.0001)
        assert arrived.wait(10)
        assert bytes(buffer) == found
    finally:
        over.set()
        there.send(b"the last one")
        receiver.join()


def test_a_look_does_not_lose_why_it_broke() -> None:
    """The kernel tells of an error once: to whoever receives, or looks, next."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = TcpConnection(socket.create_connection(listener.getsockname()), blocking=True)
        there, _ = listener.accept()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    there.close()
    assert select.select([here.fileno()], [], [], 5)[0]
    assert here._more_soon()
    with pytest.raises(ConnectionLost, match="reset"):
        here.receive(1.0)
    here.abort()
