"""Every kernel compiles for an H100 without a device, in a fresh process without the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.strategies import needs_triton
from tests.triton.variants import RECURRENT, ROWS, USUAL, VARIANTS

pytestmark = needs_triton


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(USUAL, id="usual"),
        *(pytest.param([name], id=name, marks=pytest.mark.deep) for name in VARIANTS if name not in USUAL),
    ],
)
def test_kernels_compile(names, tmp_path, record_property):
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    surroundings["TRITON_CACHE_DIR"] = str(tmp_path)  # an empty cache of compiled kernels
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.compiling", *names],
        env=surroundings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for kernel, size, seconds in lines:
        record_property(kernel, f"{size} bytes after {seconds} s")
    wanted = set().union(*(VARIANTS[name][1] or RECURRENT for name in names))
    assert wanted <= {kernel for kernel, *_ in lines} <= RECURRENT | ROWS
    assert all(int(size) > 0 for _, size, _ in lines)
