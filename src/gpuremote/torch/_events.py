"""Events and waiting, for the part in C++: a point in a device's order of work, by a number."""

from __future__ import annotations

import itertools
from typing import Any

from gpuremote.client.blocking import BlockingEvent
from gpuremote.torch._homes import home

__all__ = ["serve_event"]

_events: dict[int, BlockingEvent] = {}
_numbers = itertools.count(1)


def serve_event(action: str, index: int, number: int, other: int) -> Any:
    """What a ``torch.Event`` or a stream of a remote device is asked.

    Parameters
    ----------
    action : {"record", "query", "synchronize", "elapsed", "drop", "idle", "wait"}
        The last two are about all that was issued.
    index : int
        Of the device.
    number, other : int
        Events; 0: none yet.
    """
    match action:
        case "record":
            place = home(index)
            _events.pop(number, None)
            number = next(_numbers)
            _events[number] = BlockingEvent(place.core, None)
            return number
        case "query":
            return _events[number].query()
        case "synchronize":
            return _events[number].synchronize()
        case "elapsed":
            return _events[number].elapsed_time(_events[other])
        case "drop":
            _events.pop(number, None)
            return None
        case "idle":
            return BlockingEvent(home(index).core, None).query()
    return home(index).session.synchronize()
