"""Compare tensors like the public conformance tests: raise with the worst element, or return None."""

from atn_norms.testing.comparing import compare

__all__ = ["compare"]
