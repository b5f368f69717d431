"""Sends what blocking sessions leave behind when their program does something else.

A blocking session has no event loop: the last ops of a burst lie in its batch until the next op or
wait, and what the kernel did not take of an upload until somebody sends on. One thread for all
sessions of a process sees to both, so that the device works while the program computes, reads
files or sleeps. While a session issues, the thread looks every two milliseconds; when none has for
a while, it sleeps until one does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from gpuremote._speed import native

__all__ = ["TAIL", "Tail"]

log = logging.getLogger("gpuremote.client")

PAUSE: Final = 0.002
"""Seconds between two looks."""
BLIND: Final = 10
"""Looks in a row that are left out while nobody says that something is left. What a session owes
the server (word that a payload came) it does not say."""
LINGER: Final = 250
"""Looks in a row that found nothing, before the thread sleeps until it is woken: to wake it takes
whoever leaves something some 40 µs, where its processor sleeps too."""


def _python_doze(left: bytearray, pause: float, looks: int) -> int:
    """Sleep ``pause`` seconds, again while ``left`` is 0, up to ``looks`` times; how often."""
    count = 0
    while count < looks and not (count and left[0]):
        time.sleep(pause)  # which takes the interpreter's lock less than waiting for an event
        count += 1
    return count


doze = _python_doze
if not TYPE_CHECKING and native is not None:
    doze = native.doze  # without the interpreter's lock, which the program may be about to need


class Leaver(Protocol):
    """What may leave something unsent."""

    def send_rest(self) -> bool:
        """Send what has waited long enough, without blocking; whether something is or may soon be
        left."""


class Tail:
    """The thread, and the sessions that it looks after. It runs while there are any."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: a forked child has no thread, and its sessions are the parent's."""
        self._guard = threading.RLock()
        self._leavers: list[weakref.ref[Leaver]] = []
        self._called = threading.Event()
        self._asleep = False
        self._left = bytearray(1)
        self._thread: threading.Thread | None = None

    def add(self, leaver: Leaver) -> Callable[[], None]:
        """Look after a session, as long as it is there; gives what it calls whenever it has left
        something."""
        with self._guard:
            self._leavers = [*self._leavers, weakref.ref(leaver, self._gone)]
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run,
                    args=(self._called, self._left),
                    name="gpuremote-tail",
                    daemon=True,
                )
                self._thread = thread
                try:
                    thread.start()
                except BaseException:
                    self._thread = None
                    raise
        return self._call

    def remove(self, leaver: Leaver) -> None:
        """No longer; with the last session the thread ends, which is waited for."""
        thread = self._without(leaver)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _gone(self, _: object) -> None:
        self._without(None)

    def _without(self, leaver: Leaver | None) -> threading.Thread | None:
        """Drop one, and those that were collected; the thread if it is to end now."""
        with self._guard:
            left = [there for there in self._leavers if there() not in (None, leaver)]
            self._leavers = left
            thread = self._thread
            if left or thread is None:
                return None
            self._thread = None
            self._left[0] = 1
            self._called.set()
            self._called = threading.Event()
            return thread

    def _call(self) -> None:
        """On the hot path: two flags, unless the thread is asleep."""
        self._left[0] = 1
        if self._asleep:
            self._called.set()

    def _run(self, called: threading.Event, left: bytearray) -> None:
        me, idle, looks = threading.current_thread(), 0, 1
        while self._thread is me:
            if idle >= LINGER:
                self._asleep = True
                # Who left something before it saw the flag is seen here.
                if not self._send():
                    called.wait()
                called.clear()
                self._asleep = False
                idle, looks = 0, 1
            slept = doze(left, PAUSE, looks)
            left[0] = 0
            if self._send():
                idle, looks = 0, 1
            else:
                idle, looks = idle + slept, BLIND

    def _send(self) -> bool:
        left = False
        for there in self._leavers:
            leaver = there()
            try:
                left = (leaver is not None and leaver.send_rest()) or left
            except Exception:
                # The others' is to be sent all the same.
                log.exception("a session is not looked after any more")
                self._without(leaver)
        return left


TAIL: Final = Tail()
"""That of this process."""

os.register_at_fork(after_in_child=TAIL.reset)
