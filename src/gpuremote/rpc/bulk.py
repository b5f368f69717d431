"""Messages with a payload, as either end of a session keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpuremote._types import BytesLike
from gpuremote.transport.base import Incoming, Region, Target

__all__ = ["Arriving", "Entry", "skip"]


class Entry:
    """A message with a payload that this side sent and keeps until the other end has it.

    Attributes
    ----------
    started : bool
        A connection was given the payload.
    cancelled : bool
    """

    __slots__ = ("arg", "body", "cancelled", "kind", "on_delivered", "regions", "seq", "started")

    def __init__(
        self,
        seq: int,
        kind: int,
        arg: int,
        body: BytesLike,
        regions: Sequence[Region],
        on_delivered: Callable[[], None] | None,
    ) -> None:
        self.seq = seq
        self.kind = kind
        self.arg = arg
        self.body = body
        self.regions = regions
        self.on_delivered = on_delivered
        self.started = False
        self.cancelled = False

    def take_back(self) -> None:
        """Its payload is not to be sent any more."""
        self.cancelled = True
        self.regions = ()


class Arriving:
    """A message whose payload is on its way to this side."""

    __slots__ = ("base", "buffers", "incoming", "seq", "token", "total")

    def __init__(
        self, seq: int, token: object, buffers: Sequence[Target] | None, total: int
    ) -> None:
        self.seq = seq
        self.token = token
        self.buffers = buffers
        self.total = total
        self.base = 0
        self.incoming: Incoming | None = None

    @property
    def received(self) -> int:
        return self.base + (self.incoming.received if self.incoming is not None else 0)


def skip(views: Sequence[Target], offset: int) -> list[Target]:
    """The views without their first ``offset`` bytes; as many views as before."""
    rest: list[Target] = []
    for view in views:
        rest.append(view[min(offset, view.nbytes) :])
        offset = max(0, offset - view.nbytes)
    return rest
