"""Batches in which runs of calls that repeat earlier ones are named instead of sent.

A program goes through the same ops again and again, on other intermediate results and the same
weights: what it issues in one step can be told from what it issued in the one before. On a way on
which bytes count, the ``arg`` of a BATCH says that it is to be expanded first::

    REPEAT  u32 25, u32 back, u32 count

stands for ``count`` calls. Each is the one that lies ``back`` calls before it, of those in such
batches, with its operands moved along: a handle that was result k of a call stands for result k of
the call that lies as far back now. Which operands move, and which are the same handle again, both
ends tell from what was sent: an operand of a call that is sent moves if it is a result of a call
that is kept, but not if the call ``back`` before it (of the latest REPEAT, which may have a count
of 0) is of the same plan, has the same handle there, and would not have moved to it. ::

    PATCH   u32 26, u32 n, n x (u16 first, u16 count, count x u32)

is a call that differs from what the one ``back`` before it predicts in some words, as from one step
to the next where a number counts them. A program that goes another way loses nothing: its calls are
sent as ever.

Both ends keep the same calls: 16,384 of them, or 1 MiB, or 131,072 operands; without room for one
more the older half goes. In such a batch can be calls of plans that were defined in batches before
(of up to 4,096 operands and 256 KiB), FREE, FREE_NEAR, and records of a fixed size other than
CLEAR_PLANS; any other record makes it an ordinary one.

The work is done in C only (``native/repeats.c``). A server without that part does not offer it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Final, Protocol

from gpuremote._speed import native
from gpuremote._types import BytesLike
from gpuremote.errors import ProtocolError
from gpuremote.wire.batch import FIRST_PLAN, Layout, fixed_sizes
from gpuremote.wire.caps import MAX_BATCH

__all__ = ["ANEW", "ON", "Expander", "Repeats", "learn", "new_repeats", "offered"]

ON: Final = 1
"""The ``arg`` of a BATCH that is to be expanded."""
ANEW: Final = 2
"""The same, after everything that was kept is forgotten."""

_FIELDS: Final = re.compile(r"(\d*)([a-zA-Z?])")


class Repeats(Protocol):
    """What both ends keep; in C.

    Attributes
    ----------
    fresh : bool
        The next batch that is squeezed begins anew. Squeezing sets it: who takes what it gave for
        sent sets it to False in the same step, so that whatever comes between is made good.
    repeated : int
        Calls that were named instead of sent.
    """

    fresh: bool
    repeated: int

    def learn(self, plan: int, size: int, results: int, offsets: bytes, /) -> None:
        """The record of a plan's call; ``offsets`` are u32, of its handles."""

    def forget(self) -> None:
        """Every plan, and every call."""

    def squeeze(self, body: BytesLike, /) -> tuple[bytes, int] | None:
        """What to send for a batch, and its ``arg``; None: the batch as it is."""

    def expand(self, body: BytesLike, anew: bool, most: int, /) -> bytes:
        """The batch as it was."""


def offered() -> bool:
    """Whether this process can take part."""
    return native is not None


def new_repeats() -> Repeats:
    """For one end of a session."""
    made: Repeats = native.Repeats(bytes(fixed_sizes().get(kind, 0) for kind in range(FIRST_PLAN)))
    return made


def learn(repeats: Repeats, ident: int, plan: Layout) -> None:
    """A plan was defined."""
    offsets, offset = [], 0
    for count, code in _FIELDS.findall(plan.layout.format):
        width = struct.calcsize(f"<{code}")
        for _ in range(int(count or 1)):
            if code == "Q":
                offsets.append(offset)
            offset += width
    handles = struct.pack(f"<{len(offsets)}I", *offsets)
    repeats.learn(ident, plan.layout.size, plan.n_out, handles)


class Expander:
    """The end that takes in.

    Parameters
    ----------
    charge : callable
        Told how many bytes a batch was expanded by: the sender has counted them.
    """

    def __init__(self, charge: Callable[[int], None]) -> None:
        self._repeats = new_repeats() if offered() else None
        self._charge = charge

    def learn(self, ident: int, plan: Layout) -> None:
        """A plan was defined."""
        if self._repeats is not None:
            learn(self._repeats, ident, plan)

    def forget(self) -> None:
        """Every plan was forgotten."""
        if self._repeats is not None:
            self._repeats.forget()

    def expand(self, body: BytesLike, arg: int) -> memoryview:
        """The batch as it was.

        Raises
        ------
        ProtocolError
            It can't be expanded.
        """
        if self._repeats is None or arg not in (ON, ANEW):
            raise ProtocolError(f"a batch of form {arg}, which is not known here")
        try:
            whole = self._repeats.expand(body, arg == ANEW, MAX_BATCH)
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        self._charge(len(whole) - len(body))
        return memoryview(whole)
