"""Wait for conditions with a limit that does not depend on the load of the machine."""

import time
from collections.abc import Callable

PATIENCE = 240.0  # seconds: far longer than any condition takes, so that only missing events fail


def until(condition: Callable[[], object], limit: float = PATIENCE) -> bool:
    """Wait until a condition is true; return False after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
