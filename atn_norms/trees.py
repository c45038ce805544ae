"""Deprecated name of `atn_norms.pytree`."""

from atn_norms.deprecation import renamed_module

__getattr__ = renamed_module(
    __name__,
    "atn_norms.pytree",
    {"hold": "where_mask", "rows": "expand_mask", "outline": "describe_structure"},
)
