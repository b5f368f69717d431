"""Where remote devices are: a session and a device of it for each index."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

import gpuremote
from gpuremote.client.blocking import Session
from gpuremote.errors import ConfigError
from gpuremote.ops.torch_call import Views

__all__ = [
    "Home",
    "before_open",
    "close",
    "connect",
    "home",
    "is_forked",
    "on_new_plans",
    "on_open",
    "opened",
]

DEFAULT = "local://?backend=torch"


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
    views : Views
    plans : dict
        Plans by op and key.
    """

    def __init__(self, index: int, session: Session, number: int, facts: dict[str, Any]) -> None:
        self.index = index
        self.session = session
        self.core = session._core
        self.number = number
        self.kind = str(facts.get("device_type", "cpu"))
        self.device = torch.device("remote", index)
        self.views = Views()

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
    """Say where the remote devices are; sessions open with the first op."""
    with _lock:
        if _homes:
            raise ConfigError(
                "the remote devices are in use already: say where they are before the first op"
            )
        _urls[:] = urls


def home(index: int = 0) -> Home:
    """The device ``remote:index``.

    Raises
    ------
    RuntimeError
        There is none.
    """
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
        for url in _urls or [os.environ.get("GPUREMOTE_URL") or DEFAULT]:
            session = gpuremote.connect_sync(url)
            facts = session._link.welcome.devices
            if session.backend != "torch":
                backend = session.backend
                session.close()
                raise ConfigError(
                    f"the server at {url} runs the backend {backend}; torch needs one that was "
                    "started with --backend torch"
                )
            # An op belongs to the line of the program, often deep in torch's own modules.
            session._core._depth = 6
            session._core.on_plans_cleared = _plans_cleared
            _homes.append(Home(0, session, 0, dict(facts[0])))
            break
        opened = list(_homes)
    for place in opened:
        for start in on_open:
            start(place)


def _plans_cleared() -> None:
    for forget in on_new_plans:
        forget()


def close() -> None:
    """End the sessions; remote tensors can't be used any more."""
    with _lock:
        homes = list(_homes)
        _homes.clear()
    for found in homes:
        found.session.close()


def is_forked() -> bool:
    """Whether this process was forked from one that uses remote devices."""
    return bool(_forked)


def _in_child() -> None:
    if _homes:
        _forked.append(os.getpid())
        _homes.clear()


os.register_at_fork(after_in_child=_in_child)
