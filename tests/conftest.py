"""Import Triton in interpreter mode where there is no GPU; fail a test that leaves a setting of torch changed."""

import os
from importlib.util import find_spec

import pytest
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


def settings():
    """Return the settings of torch that change later tests in the same process."""
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def unchanged_settings():
    before = settings()
    yield
    assert settings() == before
