"""Deprecated name of `atn_norms.errors`."""

from atn_norms.deprecation import renamed_module

__getattr__ = renamed_module(
    __name__,
    "atn_norms.errors",
    {"hint": "did_you_mean", "shown": "short_repr", "explained": "to_spec_error"},
)
