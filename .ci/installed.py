"""Check an installed atn-norms from outside its tree. Argument: threads of its kernels, none, one or many."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import atn_norms as an
from atn_norms.backends.native.library import load

expected, environment = sys.argv[1], Path(sys.prefix)
assert Path(an.__file__).is_relative_to(environment), f"{an.__file__} is not what was installed into {environment}"

command = [environment / "bin" / "atn-norms", "doctor", "--json"]
checks = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["checks"]
kernels = next(check for check in checks if check["subject"] == "native kernels")
print(f"{kernels['status']}: {kernels['finding']}")
library = load()
found = "none" if isinstance(library, str) else "many" if library.parallel else "one"
assert found == expected, f"{found}, expected {expected}"
assert (kernels["status"], bool(kernels["advice"])) == ("missing" if found == "none" else "ok", found != "many")

xs = torch.linspace(-1, 1, 210).reshape(14, 5, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for cell, norm, window in ((an.LSTM, "layer", 5), (an.GRU, "rms", "cumulative")):
        layer = cell(3, 17, norm=norm, window=window)
        truth = cell(3, 17, norm=norm, window=window, backend="reference")
        truth.load_state_dict(layer.state_dict())
        for actual, wanted in zip(
            torch.autograd.grad(layer(xs)[0].sum(), layer.parameters()),
            torch.autograd.grad(truth(xs)[0].sum(), truth.parameters()),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer(xs)[0], truth(xs)[0], rtol=1e-5, atol=1e-5)
        assert f"backend '{'reference' if found == 'none' else 'native'}'" in an.explain(layer)
messages = [str(warning.message) for warning in caught if "atn-norms doctor" in str(warning.message)]
assert len(messages) == (found == "none"), messages
