"""A folder on the import path for test distributions, and the source of these distributions."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from atn_norms import plugins
from atn_norms.registry import Registry

ROOT = Path(__file__).parents[2]

NORMALIZER = '''
"""Divide by the pooled p-mean of |x|."""
from typing import Literal
import torch
from pydantic import Field
from atn_norms.normalizers import Normalizer, NormSpec
from atn_norms.plugins import hookimpl
from atn_norms.statistics import Average


class PMean(Normalizer):
    def __init__(self, features, p):
        super().__init__()
        self.p = p
        self.weight = torch.nn.Parameter(torch.ones(features))

    def measure(self, x):
        return Average(x.abs().pow(self.p).mean(-1, keepdim=True))

    def normalize(self, x, pooled):
        return self.weight * x / (pooled.mean + 1e-5) ** (1 / self.p)


class PMeanSpec(NormSpec):
    kind: Literal["KIND"] = "KIND"
    p: float = Field(2.0, gt=0)

    def build(self, features):
        return PMean(features, self.p)


@hookimpl
def atn_norms_register(registry):
    registry.normalizer(PMeanSpec)
'''

HOOK = "from atn_norms.plugins import hookimpl\n@hookimpl\ndef atn_norms_register(registry):\n    "


class Site:
    """Folder on the import path into which tests install distributions."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(
        self, name: str, code: str, points: str | None = None, version: str = "1.0", metadata: str | None = None
    ) -> None:
        """Install a distribution `dist-NAME` with the module `plugin_NAME` and the entry point NAME.

        `metadata` replaces its METADATA file; an empty string omits the file.
        """
        info = self.folder / f"dist_{name}-{version}.dist-info"
        info.mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: {version}\n" if metadata is None else metadata
        if text:
            (info / "METADATA").write_text(text)
        (info / "entry_points.txt").write_text(points or f"[atn_norms]\n{name} = plugin_{name}\n")
        (self.folder / f"plugin_{name}.py").write_text(textwrap.dedent(code))

    def load(self) -> tuple[Registry, dict[str, plugins.PluginRecord]]:
        registry = Registry()
        return registry, {record.name: record for record in plugins.load(registry)}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments in a new interpreter that finds these distributions and this package."""
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        return subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": path, **variables},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
