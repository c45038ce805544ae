"""Build of the optional C kernels; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

KERNEL = Path("atn_norms", "backends", "native", "kernel")

# No -ffast-math, which drops NaN and reorders sums; no -march=native, since the kernels choose at run time.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
THREADS = (["-fopenmp"], ["-fopenmp-simd"], ["-Wno-unknown-pragmas"])  # the first that the compiler takes


class BuildKernels(build_ext):
    """Compile with OpenMP, else with its vector loops only, else without; if all fail, install without kernels."""

    def build_extension(self, ext: Extension) -> None:
        """Try each set of flags in turn; report the last failure."""
        *ways, last = THREADS
        for way in ways:
            try:
                return self._build(ext, way)
            except (CompileError, LinkError):
                continue
        return self._build(ext, last)

    def _build(self, ext: Extension, way: list[str]) -> None:
        ext.extra_compile_args, ext.extra_link_args = FLAGS + way, way
        super().build_extension(ext)


# The kernels do not use the Python API (ctypes calls them), so one file serves every version.
kernels = Extension(
    "atn_norms.backends.native._kernels",
    sources=sorted(str(path) for path in KERNEL.glob("*.c")),
    depends=sorted(str(path) for path in KERNEL.glob("*.h")),
    libraries=["m"],
    optional=True,
    py_limited_api=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels}, options={"bdist_wheel": {"py_limited_api": "cp311"}})
