"""The one comparison of the tests is that of the public laws: it raises with the worst element, and returns nothing."""

from atn_norms.testing.comparing import compare

__all__ = ["compare"]
