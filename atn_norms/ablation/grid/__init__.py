"""A study file: options, axes, and the trials they expand to."""
