"""`doctor` finds kernels that end their process, in a separate process."""

import ctypes
import json
import shutil
import subprocess

import pytest

import atn_norms as an
from atn_norms.backends.native import library as native
from atn_norms.cli import main

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="requires a C compiler")

AT_LOAD = "#include <signal.h>\n#include <unistd.h>\n__attribute__((constructor)) static void begin(void) { %s; }\n"
AT_WORK = f"""
#include <signal.h>
int atn_norms_run() {{ raise(SIGILL); return 0; }}
long atn_norms_timeline(long a, long b, long c, long d) {{ return 0; }}
int atn_norms_level(int limit) {{ return 0; }}
int atn_norms_interpret(void *words, int narrow, void *inputs, long rows, void *outputs) {{ return 0; }}
int atn_norms_openmp(void) {{ return 1; }}
long atn_norms_interface(void) {{ return {native.INTERFACE * 65536 + ctypes.sizeof(native.CallArgs)}; }}
"""


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Replace the kernels by kernels compiled from some source."""

    def compiled(source: str):
        (tmp_path / "broken.c").write_text(source, encoding="utf-8")
        path = tmp_path / "_kernels.so"
        command = [str(COMPILER), "-shared", "-fPIC", "-w", str(tmp_path / "broken.c"), "-o", str(path)]
        subprocess.run(command, check=True)
        return path

    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(native, "_deadly", {})
    native.load.cache_clear()
    yield compiled
    native.load.cache_clear()


@pytest.mark.parametrize(
    ("source", "fate"),
    [
        (AT_LOAD % "raise(SIGILL)", "a trial of them died of SIGILL"),
        (AT_LOAD % "_exit(3)", "a trial of them ended with exit code 3"),
        (AT_WORK, "a trial of them died of SIGILL"),
    ],
    ids=["illegal instruction at load", "exit at load", "illegal instruction at work"],
)
def test_doctor_survives_them_and_prints_the_cure(source, fate, kernels, capsys):
    path = kernels(source)
    assert main(["doctor", "--json"]) == 1
    checks = {check["subject"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    found = checks["native kernels"]
    assert found["status"] == "failed"
    assert found["finding"] == f"{path}: they crash the process; {fate}"
    assert "delete that file" in found["advice"] and "reinstall atn-norms" in found["advice"]
    assert "backend native" not in checks
    assert checks["backend reference"]["status"] == checks["backend torch"]["status"] == "ok"
    assert native.unavailable() == f"its kernels end the process that uses them: {fate}"
    with pytest.raises(ValueError, match="'native' cannot run this layer: its kernels end the process"):
        an.LSTM(2, 3, norm="layer", backend="native")


def test_kernels_that_hang_are_stopped(kernels, monkeypatch):
    monkeypatch.setattr(native, "PATIENCE", 2)
    kernels(AT_LOAD % "pause()")
    assert native.survives() == "a trial of them did not come back in 2 s"


def test_kernels_that_cannot_be_loaded_are_reported_with_the_reason(kernels):
    kernels("int nothing;")
    assert native.survives() is None
    assert "atn_norms_run" in str(native.unavailable())
