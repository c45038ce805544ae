"""Import matplotlib regardless of the backend that the environment names."""

from __future__ import annotations

import importlib
import os

VARIABLE = "MPLBACKEND"


def import_matplotlib() -> None:
    """Import matplotlib without `MPLBACKEND`, whose value may name a backend that is not installed here.

    Jupyter sets the variable for every process that it starts. The pictures of this package use no backend.

    Errors: `ModuleNotFoundError` where matplotlib is not installed.
    """
    backend = os.environ.pop(VARIABLE, None)
    try:
        importlib.import_module("matplotlib")
    finally:
        if backend is not None:
            os.environ[VARIABLE] = backend
