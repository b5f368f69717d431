"""Two ends of something, run at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable


def both(client: Callable[[], object], server: Callable[[], object]) -> list[object]:
    """Run the two ends at a time; what each gave or raised."""
    found: list[object] = [None, None]

    def run(number: int, end: Callable[[], object]) -> None:
        try:
            found[number] = end()
        except Exception as error:
            found[number] = error

    thread = threading.Thread(target=run, args=(1, server))
    thread.start()
    run(0, client)
    thread.join()
    return found
