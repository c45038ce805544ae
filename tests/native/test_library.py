"""The shared library: presence, instruction sets, threads, forks and signals."""

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import torch

import atn_norms as an
from atn_norms.backends.native import library as native
from atn_norms.cli import main
from atn_norms.pytree import tree_leaves
from tests.compare import compare

ROOT = Path(__file__).parents[2]
# Kernels that exist but do not load must fail, not skip.
needs_kernels = pytest.mark.skipif("not compiled" in str(native.load()), reason=f"{native.load()}")
CASES = [
    ("LSTM", "layer", 3),
    ("GRU", "rms", "cumulative"),
    ("RNN", "layer", {"kind": "exponential", "half_life": 2.0}),
]


@pytest.fixture
def library():
    """Load the kernels; remove the limit of the instruction set after the test."""
    kernels = native.load()
    assert isinstance(kernels, native.Library)
    yield kernels
    kernels.level(2)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Return the path of an empty installation whose kernels are not loaded yet."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(native, "_warned", [])
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def layer_of(case: tuple, backend: str = "native", dtype: torch.dtype = torch.float32, sizes: tuple = (5, 20)) -> Any:
    cell, norm, window = case
    torch.manual_seed(0)
    return getattr(an, cell)(*sizes, norm=norm, window=window, backend=backend, dtype=dtype)


def results(layer: Any, steps: int = 9, batch: int = 33) -> dict[str, Any]:
    """Return values, states and gradients of a layer on a fixed input."""
    dtype = next(layer.parameters()).dtype
    numbers = torch.arange(steps * batch * layer.input_size) * 37 % 101  # small: torch uses one thread here
    xs = (numbers.to(dtype) / 20 - 2.5).reshape(steps, batch, -1).requires_grad_()
    ys, state = layer.unroll(xs)
    leaves = list(tree_leaves(state))
    floating = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    wanted = [xs, *layer.parameters()]
    loss = (ys * torch.linspace(-1, 2, ys.numel(), dtype=dtype).reshape(ys.shape)).mean()
    gradients = torch.autograd.grad(loss + sum(leaf.mean() for leaf in floating), wanted)
    return {"values": ys, "state": leaves, "gradients": gradients}


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_every_instruction_set_agrees_with_the_reference(library, case, dtype, limit):
    names = ("baseline", "AVX2", "AVX-512")
    best = names.index(library.level(2))
    assert library.level(limit) == names[min(limit, best)]
    expected = results(layer_of(case, "reference", torch.float64))
    if dtype == torch.float64:
        compare(results(layer_of(case, dtype=dtype)), expected, tolerance=1e-12)  # sums of some 20 * 33 * 9 terms
        return
    actual = results(layer_of(case, dtype=dtype))
    narrow = results(layer_of(case, "reference", torch.float32))
    compare(actual, narrow, tolerance=2e-5)  # the same sums in float32, in another order


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_the_number_of_threads_changes_no_bit(case, two_threads):
    layer = layer_of(case)
    shared = results(layer, batch=40)
    torch.set_num_threads(1)
    compare(shared, results(layer, batch=40), tolerance=0)


@needs_kernels
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("lengths", [None, torch.arange(40) % 6], ids=["whole", "ragged"])
def test_threads_that_share_large_weights_change_no_bit(cell, lengths, two_threads):
    """Above a megabyte of recurrent weights, the threads share the work of each step."""
    hidden = {"LSTM": 184, "GRU": 212, "RNN": 364}[cell]
    layer, truth = (
        getattr(an, cell)(3, hidden, norm="layer", window=3, backend=backend, dtype=torch.float64)
        for backend in ("native", "reference")
    )
    truth.load_state_dict(layer.state_dict())

    def run(layer: Any) -> Any:
        xs = (torch.arange(5 * 40 * 3) * 37 % 101 / 50 - 1).double().reshape(5, 40, 3).requires_grad_()
        ys, state = layer.unroll(xs, lengths=lengths)
        loss = (ys * torch.linspace(-1, 2, ys.numel(), dtype=ys.dtype).reshape(ys.shape)).mean()
        return [ys, list(tree_leaves(state)), torch.autograd.grad(loss, [xs, *layer.parameters()])]

    shared = run(layer)
    torch.set_num_threads(1)
    compare(shared, run(layer), tolerance=0)
    compare(shared, run(truth), tolerance=1e-10)  # sums of up to 848 * 40 terms


@needs_kernels
def test_python_threads_may_call_at_once(two_threads):
    work = [layer_of(case, dtype=dtype) for case in CASES for dtype in (torch.float32, torch.float64)]
    expected = [results(layer, batch=40) for layer in work]
    with ThreadPoolExecutor(len(work)) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda layer: results(layer, batch=40), work))
            compare(actual, expected, tolerance=0)
        same = list(pool.map(lambda _: results(work[0], batch=40), range(len(work))))  # one layer for all threads
    compare(same, [expected[0]] * len(work), tolerance=0)


def run_script(body: str) -> str:
    """Run `body` in a new interpreter and return its output."""
    code = f"from tests.native.test_library import *\n{body}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Small enough that torch uses one thread: after a fork, its thread pool would deadlock.
FORKED = """
import multiprocessing, os, signal
torch.set_num_threads(2)
layer = layer_of(CASES[0])
alone = len(os.listdir("/proc/self/task"))
expected = results(layer, batch=40)
assert len(os.listdir("/proc/self/task")) > alone or not native.load().parallel, "the parent used one thread only"

def child():
    signal.alarm(30)  # kill a child that waits for missing threads
    compare(results(layer, batch=40), expected, tolerance=0)

def grandchild():
    again = multiprocessing.get_context("fork").Process(target=child)
    again.start(); again.join(); assert again.exitcode == 0

pid = os.fork()
if pid == 0:
    try:
        child()
        os._exit(0)
    finally:
        os._exit(1)
print("fork", os.waitpid(pid, 0)[1])
for target in (child, grandchild):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start(); process.join()
    print("process", process.exitcode)
child()  # the parent still works
print("parent")
"""


@needs_kernels
def test_a_child_forked_after_threads_were_used_works():
    assert run_script(FORKED).splitlines() == ["fork 0", "process 0", "process 0", "parent"]


INTERRUPTED = """
import os, signal, threading, time
layer = layer_of(CASES[0], sizes=(5, 64))
steps, took = 500, 0.0
with torch.no_grad():
    while took < 0.4:
        steps, started = 2 * steps, time.monotonic()
        layer(torch.zeros(steps, 16, 5))
        took = time.monotonic() - started
fired = []
def interrupt():
    fired.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
timer = threading.Timer(0.3 * took, interrupt)
xs = torch.zeros(2 * steps, 16, 5)
timer.start()
try:
    with torch.no_grad():
        layer(xs)
    print("lost")
except KeyboardInterrupt:
    assert time.monotonic() > fired[0] + 0.1, "nothing was running any more"
    print("delivered")
compare(results(layer), results(layer), tolerance=0)
print("continues")
"""


@needs_kernels
def test_ctrl_c_during_the_kernels_is_delivered_afterwards():
    assert run_script(INTERRUPTED).splitlines() == ["delivered", "continues"]


def test_without_kernels_the_reference_runs_with_one_warning(elsewhere, capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for window in (1, 5):
            layer = an.LSTM(2, 3, norm="layer", window=window)
            layer(torch.zeros(4, 1, 2))
        assert [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)] == [
            "the native backend could run this layer, but its kernels were not compiled when the package was installed "
            "(a C compiler was missing or failed); the reference runs it, many times slower. "
            "`atn-norms doctor` prints the cure."
        ]
    assert "native: unsupported: its kernels were not compiled" in " ".join(an.explain(layer).split())
    with pytest.raises(ValueError, match="'native' cannot run this layer: its kernels were not compiled"):
        an.LSTM(2, 3, norm="layer", backend="native")


def test_no_warning_where_kernels_would_not_help(elsewhere):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        an.LSTM(2, 3, norm=None)
        an.LSTM(2, 3, norm="layer", backend="reference")
        an.LSTM(2, 3, norm="layer", device="meta")


def test_doctor_reports_missing_kernels_and_the_cure(elsewhere, capsys):
    main(["doctor", "--json"])
    checks = {check["subject"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["native kernels"]["status"] == "missing"  # not "failed", since the kernels are optional
    assert "not compiled" in checks["native kernels"]["finding"]
    assert "C compiler" in checks["native kernels"]["advice"] and "pip install" in checks["native kernels"]["advice"]
    assert "backend native" not in checks and checks["backend reference"]["status"] == "ok"


@needs_kernels
def test_doctor_names_the_instruction_set(capsys, library, monkeypatch):
    from atn_norms.commands.doctor import _kernels

    found = _kernels()
    assert (found.status, found.advice) == ("ok", "")
    assert library.level() in found.finding and "OpenMP" in found.finding
    monkeypatch.setattr(native.Library, "parallel", False)
    found = _kernels()
    assert "one thread" in found.finding and "OpenMP" in found.advice


@needs_kernels
def test_kernels_of_another_interface_are_rejected(library, elsewhere, monkeypatch):
    copy(library.path, elsewhere / "_kernels.abi3.so")
    assert native.unavailable() is None
    native.load.cache_clear()
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert "kernels of another version" in str(native.unavailable())
    with pytest.raises(ValueError, match="install again"):
        an.LSTM(2, 3, norm="layer", backend="native")


def test_other_files_and_libraries_are_rejected(elsewhere):
    (elsewhere / "_kernels.so").write_text("text")
    assert "cannot be loaded" in str(native.unavailable())
    native.load.cache_clear()
    copy(torch._C.__file__, elsewhere / "_kernels.so")
    assert "cannot be loaded" in str(native.unavailable()) and "atn_norms_run" in str(native.unavailable())
