"""Import rules: one direction, late loading of heavy libraries, and no name of a package registry."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "atn_norms"

# A part may import itself and the parts in the rows above; not its neighbours in a row, and not the rows below.
ROWS = [
    {"deferred", "deprecation", "errors", "text"},
    {"drawing", "files", "modes", "options", "pytree", "trees", "problems"},
    {"statistics", "registry"},
    {"windows", "normalizers", "round_trip"},
    {"assorted_time"},
    {"cells"},
    {"backends"},
    {"layers"},
    {"formats"},
    {"specs"},
    {"tasks"},
    {"plugins"},
    {"testing"},
    {"ablation", "bench"},
    {"cli", "commands", "__main__"},
]
ROW = {part: number for number, row in enumerate(ROWS) for part in row}
NEIGHBOURS = {("cli", "commands"), ("commands", "cli"), ("__main__", "cli")}  # parts of the command line

# The parts that may load each third-party library. No part may load a library that is not listed.
LIBRARIES = {
    "torch": set(ROW) - {"errors", "deferred", "text", "options", "registry", "plugins", "cli", "__main__"},
    "pydantic": set(ROW),
    "pydantic_core": set(ROW),
    "pluggy": {"plugins"},
    "packaging": {"plugins", "backends"},
    "typing_extensions": set(),
    "ruamel": {"formats", "specs", "ablation", "cli", "commands"},
    "typer": {"cli", "commands"},
    "click": {"cli", "commands"},
    "rich": {"cli", "commands"},
    "distributed": {"ablation"},
    "dask": {"ablation"},
    "cryptography": {"ablation"},
    "jinja2": {"ablation"},
    "matplotlib": {"ablation", "bench"},
    "numpy": {"ablation", "tasks"},
    "pyarrow": {"tasks"},
    "regex": {"tasks"},
    "safetensors": {"layers"},
    "onnx_ir": {"layers"},
    "onnxruntime": {"layers"},
    "triton": {"backends"},
    "hypothesis": {"testing"},
    "pytest": {"testing"},
}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


class Imports(ast.NodeVisitor):
    """Collect every import of a file, also inside functions; TYPE_CHECKING blocks are skipped."""

    def __init__(self, path: Path):
        self.package = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
        self.found: list[tuple[int, str]] = []  # line, module
        self.names: list[tuple[int, str]] = []  # line, module.name
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]
        self.names += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) - node.level + 1] if node.level else ()
        module = ".".join([*base, *([node.module] if node.module else [])])
        self.names += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        if module == PACKAGE.name:  # `from atn_norms import layers` the part is the imported name
            self.found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        else:
            self.found.append((node.lineno, module))


def broken_rules(path: Path) -> Iterator[str]:
    mine = part(path)
    for line, name in Imports(path).found:
        where = f"{path.relative_to(PACKAGE)}:{line}: {mine} imports {name}"
        top, _, rest = name.partition(".")
        if top == PACKAGE.name:
            theirs = rest.partition(".")[0]
            if rest == "__version__":
                continue  # the only name that the package's __init__ defines
            if theirs not in ROW:
                yield f"{where}: import a name from the part that defines it, not from __init__"
            elif theirs != mine and ROW[theirs] >= ROW[mine] and (mine, theirs) not in NEIGHBOURS:
                yield f"{where}: got an import of a later row; expected one of an earlier row"
        elif top not in sys.stdlib_module_names and mine not in LIBRARIES.get(top, set()):
            yield f"{where}: this part may not load {top}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert part(path) in ROW, f"{part(path)} has no row yet"
    assert not list(broken_rules(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from atn_norms.layers import LSTM", "later row"),
        ("from atn_norms import layers", "later row"),
        ("from .layers import LSTM", "later row"),
        ("def late():\n    import atn_norms.cli", "later row"),
        ("from atn_norms.normalizers import LayerNorm", "later row"),
        ("from atn_norms import LSTM", "not from __init__"),
        ("import rich.table", "may not load rich"),
        ("import thirdparty", "may not load thirdparty"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import atn_norms.cli\nelse:\n    import yaml",
            "yaml",
        ),
    ],
)
def test_every_rule_can_fail(source, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "atn_norms")
    path = tmp_path / "atn_norms" / "windows.py"
    path.parent.mkdir()
    path.write_text(source, encoding="utf-8")
    (broken,) = broken_rules(path)
    assert message in broken


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES
}

ORDER = {"store": 0, "grid": 1, "analysis": 1, "execution": 2, "report": 2}  # sub-packages of ablation


def edges(names: Mapping[str, Path] = MODULES) -> dict[str, set[str]]:
    """Return the modules that each module imports, including late imports."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for _, target in Imports(path).names:
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and target != name:
                found[name].add(target)
    return found


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules that import each other."""
    reached = {name: _reached(graph, name) for name in graph}
    groups = {frozenset(other for other in below if name in reached[other]) for name, below in reached.items()}
    return [set(group) for group in groups if group]


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    stack = [start]
    while stack:
        below = graph[stack.pop()] - seen
        seen |= below
        stack += below
    return seen


def test_no_import_cycle_inside_a_part():
    assert [sorted(circle) for circle in circles(edges())] == []


def test_an_import_cycle_is_detected():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [{"a", "b", "c"}]


def test_the_sub_packages_of_ablation_import_one_way():
    """The order is store < grid < execution, and store < analysis < report."""
    upward = set()
    for name, targets in edges().items():
        for target in targets:
            mine, theirs = (_sub_package(each) for each in (name, target))
            if mine in ORDER and theirs in ORDER and mine != theirs and ORDER[theirs] >= ORDER[mine]:
                upward.add((name, target))
    assert upward == set()


def _sub_package(module: str) -> str:
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["ablation"] and len(parts) > 2 else ""


@pytest.mark.parametrize("module", ["atn_norms", "atn_norms.registry", "atn_norms.plugins", "atn_norms.cli"])
def test_torch_is_loaded_late(module):
    heavy = {"torch", "numpy", "pyarrow", "matplotlib", "distributed"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plain_layer_needs_no_third_party_code():
    code = (
        "import sys, atn_norms; atn_norms.LSTM(2, 3, norm=None); "
        "others = {'typer', 'rich', 'ruamel', 'regex', 'pyarrow', 'matplotlib', 'distributed', 'hypothesis'}; "
        "print(sorted(others & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_lazy_and_exists():
    import atn_norms

    assert set(atn_norms.__all__) <= set(dir(atn_norms))
    assert all(getattr(atn_norms, name) is not None for name in atn_norms.__all__)
    with pytest.raises(AttributeError, match="Layernorm"):
        atn_norms.Layernorm  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}


HOSTS = [
    ".".join(parts)
    for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download.pytorch", "org"), ("conda.anaconda", "org"))
]
PASSED_OVER = {".git", ".venv", ".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__", "_build", "html"}


def test_no_file_names_a_package_registry():
    """The source of packages is configured by the installer."""
    named = []
    for path in sorted(ROOT.rglob("*")):
        passed_over = any(piece in PASSED_OVER or piece.endswith(".egg-info") for piece in path.relative_to(ROOT).parts)
        if passed_over or not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        text = path.read_bytes()
        named += [f"{path.relative_to(ROOT)}: {host}" for host in HOSTS if host.encode() in text]
    assert not named
