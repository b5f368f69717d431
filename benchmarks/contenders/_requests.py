"""How a client tells a peer that knows no protocol what comes next."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["ACK", "ECHO", "FORGET", "GET", "MESSAGES", "PUT", "REQUEST"]

REQUEST: Final = struct.Struct("<IIQ")
"""What, how often, and of how many bytes."""

ECHO: Final = 1
PUT: Final = 2
GET: Final = 3
MESSAGES: Final = 4
FORGET: Final = 5

ACK: Final = b"received"
"""What says that all bytes of a put, or all messages, are there."""
