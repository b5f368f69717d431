"""The process that worker processes are forked from.

It has loaded what each of them needs, which takes up to seconds (PyTorch), and nothing else: it has
no thread, no device and no session, so that a fork is whole, and takes milliseconds. Workers share
the memory of what is loaded until they write to it.

It is told to fork by the daemon, and tells it how workers end, as they are its children. Should it
end, they live on. (``multiprocessing`` calls its own, which are started for other reasons, so too.)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import select
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Final, NoReturn

import numpy as np

from gpuremote.backend import registry
from gpuremote.server import control
from gpuremote.server.worker import work

__all__ = ["main", "serve"]

_NAME: Final = "gpuremote-work"
"""Of a worker, where the system shows names: up to 15 letters."""


def serve(channel: socket.socket, become: Callable[[socket.socket, int], NoReturn]) -> None:
    """Fork whenever the daemon asks for it; until it has gone.

    Parameters
    ----------
    channel : socket.socket
        To the daemon. It hears ``loaded`` first. It sends ``start`` with the ends of a worker's
        channels, and hears ``started`` (with a descriptor of the process; ``pid`` is 0 if there is
        none, and ``error`` says why) and ``ended`` (``status`` is below 0 for a signal, as in
        ``subprocess``).
    become : callable
        What a child does, with its channel, and the one for uploads that are kept or -1.
    """
    children: dict[int, int] = {}
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    try:
        control.send(channel, {"event": "loaded"})
        while True:
            for descriptor, _ in poller.poll():
                if descriptor not in children:
                    child = _start(channel, children, become)
                    if child >= 0:
                        poller.register(child, select.POLLIN)
                    continue
                poller.unregister(descriptor)
                os.close(descriptor)
                pid = children.pop(descriptor)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                control.send(channel, {"event": "ended", "pid": pid, "status": status})
    except (EOFError, OSError):
        return  # the daemon has gone, and workers see that by themselves


def _start(
    channel: socket.socket,
    children: dict[int, int],
    become: Callable[[socket.socket, int], NoReturn],
) -> int:
    """Fork as the daemon asks; a descriptor of the child, which is noted, or -1."""
    request, ends = control.receive_files(channel)
    answer = {"event": "started", "number": request["number"], "pid": 0}
    pid, error = -1, ""
    try:
        pid = os.fork()
    except OSError as failure:  # no memory, or too many processes
        error = str(failure)
    if pid == 0:
        try:
            channel.close()
            for other in children:
                os.close(other)
            become(socket.socket(fileno=ends[0]), ends[1] if len(ends) > 1 else -1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    for end in ends:
        os.close(end)
    child = -1
    if pid > 0:
        try:
            child = os.pidfd_open(pid)
        except OSError as failure:  # too many files
            error = str(failure)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if child < 0:
        control.send(channel, {**answer, "error": error})
        return -1
    children[child] = pid
    control.send_files(channel, {**answer, "pid": pid}, [child])
    return child


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m gpuremote.server.forkserver``; started by the daemon only."""
    parser = argparse.ArgumentParser(prog="gpuremote-forkserver")
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--memory-limit", type=int, required=True)
    parser.add_argument("--grace", type=float, required=True)
    for name in ("--certfile", "--keyfile", "--client-ca", "--cafile", "--weights"):
        parser.add_argument(name, default="")
    parser.add_argument("--allow-ops", action="append", default=[])
    parser.add_argument("--allow-kernels", action="store_true")
    parser.add_argument("--software", default="gpuremote")
    options = parser.parse_args(arguments)
    registry.find(options.backend)
    # What is loaded by now stays, and a look of the collector would write to all of it.
    gc.collect()
    gc.freeze()

    def become(channel: socket.socket, contents: int) -> NoReturn:
        os.setsid()
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
            file.write(_NAME)
        np.random.seed()  # or it would be one for all, where somebody's op draws from it
        options.contents = contents
        work(channel, options)

    serve(socket.socket(fileno=options.channel), become)
    os._exit(0)  # to take down what was loaded takes as long as a fork


if __name__ == "__main__":
    main()
