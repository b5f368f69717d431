"""What differs on a machine with a GPU."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Not looked at here: the CUDA driver keeps descriptors and threads for the process, from the
    moment that a test first needs it."""
