"""Real device servers for tests: child processes on loopback, ended with the test."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from gpuremote import _clock

__all__ = ["RunningServer", "device_server"]

START_TIMEOUT: Final = 30.0


@dataclass
class RunningServer:
    """A server that runs as a child process.

    Attributes
    ----------
    host, port
        Where it listens.
    process : subprocess.Popen
        The daemon.
    """

    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"gpu://{host}:{self.port}"

    def terminate(self, timeout: float = 10.0) -> int:
        """SIGTERM, and wait for the end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(10.0)


def start_server(*arguments: str, host: str = "127.0.0.1", port: int = 0) -> RunningServer:
    """Start ``gpuremote serve`` with these arguments and wait until it listens."""
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    ready, theirs = os.pipe()
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "gpuremote",
                "serve",
                "--listen",
                listen,
                "--ready-fd",
                str(theirs),
                *arguments,
            ],
            pass_fds=(theirs,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    finally:
        os.close(theirs)
    try:
        facts = json.loads(_line(ready))
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        os.close(ready)
    return RunningServer(facts["host"], facts["port"], process)


def _line(descriptor: int) -> bytes:
    deadline = _clock.now() + START_TIMEOUT
    said = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while not said.endswith(b"\n"):
        if not poller.poll(max(0.0, 1000 * (deadline - _clock.now()))):
            raise TimeoutError(f"no server after {START_TIMEOUT:.0f} s")
        data = os.read(descriptor, 4096)
        if not data:
            raise RuntimeError("the server ended before it listened")
        said += data
    return said


@contextmanager
def device_server(*arguments: str, **where: Any) -> Iterator[RunningServer]:
    """A device server for the length of a ``with`` block.

    Parameters
    ----------
    *arguments : str
        More arguments of ``gpuremote serve``.
    host, port
        Where to listen; default a free port on 127.0.0.1.
    """
    server = start_server("--drain", "0", *arguments, **where)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(10.0)
            except subprocess.TimeoutExpired:
                server.kill()
