"""Where remote devices are: a session, and a device of it, for each index."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpuremote
from gpuremote import _clock
from gpuremote.client.blocking import Session
from gpuremote.errors import ConfigError
from gpuremote.ops.torch_call import Views
from gpuremote.torch._tier import native, needs_native

__all__ = [
    "Home",
    "before_open",
    "close",
    "connect",
    "current",
    "home",
    "is_forked",
    "on_new_plans",
    "on_open",
    "opened",
]

DEFAULT = "local://?backend=torch"
PATIENCE = 1.0
"""Seconds until a thread that was started has its name."""


class Home:
    """A remote device.

    Attributes
    ----------
    index : int
        In ``remote:index``.
    session : Session
    core : Core
        Of the session.
    number : int
        Of the device in its session.
    kind : str
        What torch calls the device there: results are predicted for it.
    inductor : str or None
        What the server makes code of graphs with; "" for nothing, None if it does not say.
    views : Views
    choices : dict
        Which kernel computes attention there, by kind of call.
    """

    def __init__(self, index: int, session: Session, number: int, facts: dict[str, Any]) -> None:
        self.index = index
        self.session = session
        self.core = session._core
        self.number = number
        self.kind = str(facts.get("device_type", "cpu"))
        self.inductor: str | None = facts.get("inductor")
        self.device = torch.device("remote", index)
        self.views = Views()
        self.choices: dict[Any, int] = {}

    def __repr__(self) -> str:
        return f"<remote:{self.index} {self.session.devices[self.number].name}>"


before_open: list[Callable[[], None]] = []
"""Called before the first session opens."""
on_open: list[Callable[[Home], None]] = []
"""Called with each device when its session has opened."""
on_new_plans: list[Callable[[], None]] = []
"""Called when a session forgets its plans: what was kept of them elsewhere goes too."""
_homes: list[Home] = []
_forked: list[int] = []
_urls: list[str] = []
_lock = threading.RLock()


def connect(*urls: str) -> None:
    """Say where the remote devices are; sessions open with the first op.

    The devices of the first server are ``remote:0`` and on, those of the others follow.
    """
    with _lock:
        if _homes:
            raise ConfigError(
                "the remote devices are in use already: say where they are before the first op"
            )
        _urls[:] = urls


def current() -> int:
    """Index of the current device of this thread."""
    return 0 if native is None else int(native.device(-1))


def home(index: int | None = None) -> Home:
    """The device ``remote:index``, or the current one.

    Raises
    ------
    RuntimeError
        There is none.
    """
    if index is None:
        index = current()
    if not _homes:
        if _forked:
            raise RuntimeError(
                "remote devices can't be used in a process that was forked from one that uses "
                "them; start it with the method 'spawn'"
            )
        _open()
    try:
        return _homes[index]
    except IndexError:
        if native is None:
            raise RuntimeError(needs_native(f"remote:{index}")) from None
        raise RuntimeError(
            f"there is no device remote:{index}; there are {len(_homes)} remote devices"
        ) from None


def opened() -> list[Home]:
    """The devices of which the sessions are open."""
    return list(_homes)


def _open() -> None:
    with _lock:
        if _homes:
            return
        for prepare in before_open:
            prepare()
        urls = _urls or [os.environ.get("GPUREMOTE_URL") or DEFAULT]
        found: list[Home] = []
        tapes: list[Any] = []
        try:
            for url in urls if native is not None else urls[:1]:
                session = _session(url)
                tape = None if native is None else session._core.use_tape(native.Tape)
                facts = session._link.welcome.devices
                for number in range(len(facts) if native is not None else 1):
                    found.append(Home(len(found), session, number, dict(facts[number])))
                    tapes.append(tape)
        except BaseException:
            for one in found:
                one.session.close()
            raise
        _homes[:] = found
        if native is not None:
            native.set_devices(list(zip(found, tapes, strict=True)))
    if native is None:
        _start_thread()
    for place in found:
        for start in on_open:
            start(place)


def _start_thread() -> None:
    """Have torch start its thread for gradients of a device, and say so where it does not."""
    torch.ones((), requires_grad=True).backward()
    deadline = _clock.now() + PATIENCE
    while not any(_thread_name(task).startswith("pt_autograd") for task in _tasks()):
        if _clock.now() < deadline:
            time.sleep(0.01)  # it gives itself its name
            continue
        warnings.warn(
            "a backward ran in this process before gpuremote.torch was imported, and torch has no "
            "thread for the gradients of remote tensors, which all but the thread of that import "
            "need: import gpuremote.torch first, or use its part in C++ (gpuremote torch build)",
            RuntimeWarning,
            stacklevel=2,
        )
        break


def _tasks() -> list[str]:
    return os.listdir("/proc/self/task")


def _thread_name(task: str) -> str:
    try:
        return Path(f"/proc/self/task/{task}/comm").read_text()
    except OSError:
        return ""  # it has ended


def _session(url: str) -> Session:
    session = gpuremote.connect_sync(url)
    if session.backend != "torch":
        backend = session.backend
        session.close()
        raise ConfigError(
            f"the server at {url} runs the backend {backend}; torch needs one that was started "
            "with --backend torch"
        )
    # An op belongs to the line of the program, often deep in torch's own modules.
    session._core._depth = 6
    session._core.on_plans_cleared = _plans_cleared
    return session


def _plans_cleared() -> None:
    for forget in on_new_plans:
        forget()


def close() -> None:
    """End the sessions; remote tensors can't be used any more."""
    with _lock:
        homes = list(_homes)
        _homes.clear()
        if native is not None:
            native.set_devices([])
        _plans_cleared()
    for found in homes:
        found.session.close()


def is_forked() -> bool:
    """Whether this process was forked from one that uses remote devices."""
    return bool(_forked)


def _in_child() -> None:
    if _homes:
        _forked.append(os.getpid())
        _homes.clear()
        if native is not None:
            native.set_devices([])


os.register_at_fork(after_in_child=_in_child)
