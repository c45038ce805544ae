"""Studies that are killed, starved, stopped and damaged; `registry.FAULTS` is what docs/failure-recovery.md shows."""
