"""Traced normalizers: recording, lowering, programs, and the kernels that interpret them."""
