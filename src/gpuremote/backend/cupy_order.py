"""Arrays that several CUDA streams use: who waits for whom, and how long memory is kept.

CUDA orders nothing between streams, while a session promises that an op waits for the arrays it
takes. And CuPy's pool gives memory out again to the stream that allocated it, as soon as nothing
refers to it, though another stream may not be done with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

__all__ = ["Order"]

MOST: Final = 4096
"""Allocations that are remembered before those are forgotten whose work is over."""


class _Use(NamedTuple):
    """Of an allocation: the stream it belongs to, and the last one that used it up to an event."""

    owner: Any
    stream: Any
    event: Any


class Order:
    """The order between the streams of a session. Costs nothing until there is a second stream.

    Uses of one allocation follow each other, those too that only read it: the last one comes behind
    all that were before.

    Parameters
    ----------
    cuda : module
        ``cupy.cuda``.

    Attributes
    ----------
    active : bool
        There is more than the default stream.
    """

    def __init__(self, cuda: Any) -> None:
        self.active = False
        self._cuda = cuda
        self._uses: dict[int, _Use] = {}
        self._lent: deque[tuple[Any, Any]] = deque()

    def begin(self, stream: Any) -> None:
        """A stream was made, of the current device: it comes behind all that was issued so far."""
        self.active = True
        stream.wait_event(self._cuda.Stream.null.record())

    def run(self, function: Callable[[Sequence[Any]], Any], arguments: Sequence[Any]) -> Any:
        """Run an op on the current stream, behind what it needs."""
        stream = self._cuda.get_current_stream()
        self.enter(stream, arguments)
        results = function(arguments)
        self.leave(stream, arguments, results or ())
        return results

    def enter(self, stream: Any, arrays: Iterable[Any]) -> None:
        """What the stream is given next uses these arrays."""
        if not self.active:
            return
        for memory in _memory(arrays):
            use = self._uses.get(id(memory))
            if use is not None and use.stream != stream:
                stream.wait_event(use.event)

    def leave(self, stream: Any, used: Sequence[Any], made: Iterable[Any]) -> None:
        """It was given what uses these, and makes those (some may be views of the former)."""
        if not self.active:
            return
        uses, event = self._uses, stream.record()
        known = {id(memory): memory for memory in _memory(used)}
        foreign = False
        for key in known:
            use = uses.get(key)
            owner = self._cuda.Stream.null if use is None else use.owner
            foreign = foreign or owner != stream
            uses[key] = _Use(owner, stream, event)
        for memory in _memory(made):
            if id(memory) not in known:
                uses[id(memory)] = _Use(stream, stream, event)
        if foreign:
            self._lent.append((event, list(known.values())))
        self._tidy()

    def _tidy(self) -> None:
        lent = self._lent
        try:
            while lent[0][0].done:
                lent.popleft()
        except IndexError:
            pass  # empty, or another thread was faster
        if len(self._uses) > MOST:
            for key, use in list(self._uses.items()):
                if use.event.done:
                    self._uses.pop(key, None)


def _memory(arrays: Iterable[Any]) -> list[Any]:
    """The allocations of the arrays among these; the others are Python's numbers."""
    found = []
    for array in arrays:
        data = getattr(array, "data", None)
        if data is not None:
            found.append(data.mem)
    return found
