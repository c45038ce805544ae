"""Import Triton in interpreter mode where there is no GPU, before any other module imports it."""

import os
from importlib.util import find_spec

import torch

# Triton chooses the interpreter or a GPU at its first import. torch's compiler imports Triton,
# and the order of tests is not fixed.
if find_spec("triton") is not None and not torch.cuda.is_available():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
