"""Check that parameters fit into the memory of the machine."""

from __future__ import annotations

from atn_norms.errors import SpecError
from atn_norms.files import physical_memory

FLOAT = 4  # bytes of a float32 number


def check_memory(path: str, sizes: str, parameters: float, *, copies: int = 1, note: str = "") -> None:
    """Raise `SpecError` if `copies` of float32 parameters exceed the memory of the machine.

    | symbol | meaning | unit |
    |---|---|---|
    | `path`, `sizes` | the option and the sizes that the error names | |
    | `parameters` | number of parameters | |
    | `copies` | 1 for the parameters alone, 2 with their gradients | |
    | `note` | text to add after the size | |
    """
    memory, size = physical_memory(), copies * FLOAT * parameters
    if memory is not None and size > memory:
        got = f"{sizes}: {parameters:.3g} parameters ({size / 2**30:.3g} GiB in float32{note})"
        raise SpecError(path, got, f"what fits this machine's {memory / 2**30:.3g} GiB of memory")
