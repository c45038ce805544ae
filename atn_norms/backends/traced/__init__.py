"""Normalizers written in PyTorch, recorded once and lowered to programs for the kernels' interpreter."""
