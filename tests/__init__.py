"""The tests: one file a part, `laws` for what must hold of every combination."""
