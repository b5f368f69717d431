"""``local://``: a device server on this machine, as a child of this process.

The child holds one end of a pipe whose other end only this process has: when this process
ends, however it does (SIGKILL included), the child reads the end of the pipe and ends too.
Sessions with equal options share one child; it ends with the last of them.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Final

from gpuremote import _clock
from gpuremote.config import Target
from gpuremote.errors import ConnectionFailed, ServerUnavailable

__all__ = ["LocalServer", "acquire"]

START_TIMEOUT: Final = 30.0
STOP_TIMEOUT: Final = 5.0


@dataclass
class LocalServer:
    """A child process that serves this one.

    Attributes
    ----------
    host, port
        Where it listens (loopback).
    users : int
        Sessions that need it.
    """

    key: tuple[object, ...]
    process: subprocess.Popen[bytes]
    lifeline: int
    host: str
    port: int
    users: int = 0

    def ended(self) -> str | None:
        """How it ended, or None while it runs."""
        code = self.process.poll()
        return None if code is None else f"ended with status {code}"

    def release(self) -> None:
        """One session less; without any the server ends."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            _servers.pop(self.key, None)
        self.stop()

    def stop(self) -> None:
        """End the child and wait for it."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_lock = threading.Lock()
_servers: dict[tuple[object, ...], LocalServer] = {}


def acquire(target: Target) -> LocalServer:
    """The server for ``target``, started if there is none. Blocks up to ``START_TIMEOUT``.

    Raises
    ------
    ConnectionFailed
        It did not start; the text holds what it printed.
    """
    key = (target.backend, target.devices, os.getpid())
    with _lock:
        server = _servers.get(key)
        if server is not None and server.ended() is not None:
            server.stop()
            server = None
        if server is None:
            server = _servers[key] = _start(key, target)
        server.users += 1
        return server


def _start(key: tuple[object, ...], target: Target) -> LocalServer:
    lifeline_child, lifeline = os.pipe()
    ready, ready_child = os.pipe()
    command = [
        sys.executable,
        "-m",
        "gpuremote",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--ready-fd",
        str(ready_child),
        "--lifeline-fd",
        str(lifeline_child),
        "--drain",
        "0",
    ]
    if target.backend is not None:
        command += ["--backend", target.backend]
    if target.devices is not None:
        command += ["--devices", str(target.devices)]
    try:
        process = subprocess.Popen(
            command,
            pass_fds=(lifeline_child, ready_child),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        os.close(lifeline)
        raise ConnectionFailed(f"the local server can't be started: {error}") from error
    finally:
        os.close(lifeline_child)
        os.close(ready_child)
    try:
        said = _read_line(ready, START_TIMEOUT)
        if not said:
            code = process.poll()
            raise ServerUnavailable(
                f"the local server did not come up (status {code}); run "
                f"'{' '.join(command[1:5])}' to see why"
            )
        facts = json.loads(said)
    except BaseException:
        os.close(lifeline)
        process.kill()
        process.wait()
        raise
    finally:
        os.close(ready)
    return LocalServer(key, process, lifeline, facts["host"], facts["port"])


def _read_line(descriptor: int, timeout: float) -> bytes:
    """What the child says when it listens; nothing if it ended or took too long."""
    deadline = _clock.now() + timeout
    said = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    while not said.endswith(b"\n"):
        if not poller.poll(max(0.0, 1000 * (deadline - _clock.now()))):
            return b""
        data = os.read(descriptor, 4096)
        if not data:
            return b""
        said += data
    return said


def _forget_in_child() -> None:
    """After a fork without exec: the copy must not keep the parent's servers alive."""
    for server in _servers.values():
        if server.lifeline >= 0:
            os.close(server.lifeline)
            server.lifeline = -1
    _servers.clear()


os.register_at_fork(after_in_child=_forget_in_child)
