"""What a session counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SessionStats"]


@dataclass(slots=True)
class SessionStats:
    """Counters of one session, on the client; they only grow.

    Attributes
    ----------
    ops : int
        Plan calls issued.
    records : int
        Records of any kind (ops, gets, puts, frees, ...).
    batches : int
        Messages that carried them.
    plans : int
        Plans sent.
    round_trips : Counter of str
        Waits for an answer, by what was asked for (``"get"``, ``"put"``, ``"synchronize"``, ...).
    messages_sent, messages_received : int
    bytes_sent, bytes_received : int
        On the wire, framing included, over all connections.
    repeated : int
        Of the ops, those that were named as what an earlier step did instead of sent, as they are
        on long ways.
    payload_sent, payload_received : int
        Array bytes, of the above.
    payload_copied : int
        Array bytes copied in user space on this side (small arrays that travel inside a message,
        first bytes that arrive together with a header, input that was not contiguous).
    payload_lent : int
        Of ``payload_sent``, array bytes that the kernel did not copy on this side either, but the
        other end only: over TCP within a host, where that was faster.
    payload_spared : int
        Array bytes that were not sent, as the server had them already.
    implicit_downloads : int
        Arrays that came to the host without ``get`` being called.
    freed : int
        Handles given back.
    withdrawn : int
        Of ``freed``, uploads through shared memory that nothing used: the server knows of the array
        and that it is gone, but was not told where its bytes lie. They are not in ``payload_sent``.
    reconnects : int
    fallbacks : int
        Times that a transport which both ends have did not work, or broke, and another was used.
    credit_waits : int
        Times that issuing had to wait until the server caught up.
    """

    ops: int = 0
    records: int = 0
    batches: int = 0
    plans: int = 0
    round_trips: Counter[str] = field(default_factory=Counter)
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    payload_sent: int = 0
    payload_received: int = 0
    payload_copied: int = 0
    payload_lent: int = 0
    payload_spared: int = 0
    implicit_downloads: int = 0
    freed: int = 0
    withdrawn: int = 0
    reconnects: int = 0
    fallbacks: int = 0
    credit_waits: int = 0
    repeated: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["round_trips"] = dict(self.round_trips)
        return values
