"""Fault injection: kill, stop, damage and starve studies. docs/failure-recovery.md lists these faults."""
