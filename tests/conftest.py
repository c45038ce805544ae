"""Triton is imported for its interpreter where there is no GPU, before anything else can import it for one."""

import os
from importlib.util import find_spec

import torch

# Triton's own library is written in its language, and made for the interpreter or for a GPU when it is first imported.
# torch's compiler imports it, and any test may come first.
if find_spec("triton") is not None and not torch.cuda.is_available():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
