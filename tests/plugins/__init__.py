"""Tests of plugins: loading, isolation of faults, the bundled plugins, and `new-plugin`."""
