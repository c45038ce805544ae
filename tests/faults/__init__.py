"""Studies that are killed, starved, stopped and damaged; `registry.FAULTS` is what docs/faults.md shows."""
