"""Normalizers written in PyTorch, recorded once and lowered to programs that the kernels interpret."""
