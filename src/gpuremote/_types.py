"""Types that more than one layer names."""

from __future__ import annotations

from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]
"""Lengths of an array's axes."""

BytesLike: TypeAlias = bytes | bytearray | memoryview
"""A flat run of bytes in host memory."""

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None
"""What ``--json`` prints."""
