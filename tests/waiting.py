"""Waiting for what will come, however busy the machine is."""

import time
from collections.abc import Callable

PATIENCE = 240.0  # seconds: far beyond what anything here takes, so that only what never comes fails


def until(condition: Callable[[], object], limit: float = PATIENCE) -> bool:
    """Wait until a condition is true; False after the limit (seconds)."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
