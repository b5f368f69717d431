"""Which stream the present thread or task issues into."""

from __future__ import annotations

from contextvars import ContextVar

__all__ = ["current_stream"]

current_stream: ContextVar[dict[int, int]] = ContextVar("gpuremote_stream")
"""Stream number by the identity of the session's core; 0 or missing: the default stream."""
