"""Install the distributions of plugins/ into a folder without running an installer."""

import shutil
import tomllib
from pathlib import Path

from tests.plugins.site import ROOT

PLUGINS = ROOT / "plugins"
NAMES = sorted(path.parent.name for path in PLUGINS.glob("*/pyproject.toml"))


def lay_out(source: Path, site: Path) -> dict:
    """Write the modules and metadata of a distribution into a folder; return its [project] table."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for module in (source / "src").glob("*.py"):
        shutil.copy(module, site)
    information = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in project["dependencies"]]
    (information / "METADATA").write_text("\n".join([*lines, ""]), encoding="utf-8")
    points = [f"{name} = {module}" for name, module in project["entry-points"]["atn_norms"].items()]
    (information / "entry_points.txt").write_text("\n".join(["[atn_norms]", *points, ""]), encoding="utf-8")
    return project
