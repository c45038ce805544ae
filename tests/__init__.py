"""The tests: one file for each part; `laws` has the properties of every combination."""
