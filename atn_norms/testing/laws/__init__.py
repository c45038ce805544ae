"""The laws, each one named function; importing this folder registers them, in the order of the documentation."""

from atn_norms.testing.laws import every, statistic, normalizer, window, cell, layer, backend, task  # isort: skip

__all__ = ["backend", "cell", "every", "layer", "normalizer", "statistic", "task", "window"]
