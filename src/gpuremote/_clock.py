"""The one place that reads a clock, so that a test can put another in its place."""

from __future__ import annotations

import time

now = time.monotonic
"""Seconds on a clock that only goes forward."""

now_ns = time.perf_counter_ns
"""Nanoseconds on the finest clock there is; only differences mean something."""
