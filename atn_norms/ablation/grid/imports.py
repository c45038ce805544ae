"""The modules of a user that a Python file imports: find them, and import them as they are on disk."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from atn_norms.errors import SpecError, nearest_file
from atn_norms.files import read_regular

INSTALLED = {"site-packages", "dist-packages"}  # folders of installed modules
LARGEST = 10_000_000  # bytes of a Python file


@contextmanager
def local_modules(file: Path) -> Iterator[None]:
    """Inside the block, import the modules beside a file from its folder again, as they are on disk.

    `sys.argv` has the file alone: a trial does not depend on the command line of the process that runs it.
    Modules that the process imported before are put aside and come back afterwards.
    """
    _, root = module_name(file)
    tops = {_top(each.relative_to(root).as_posix()) for each in local_files(file) if root in each.parents}
    every = list(sys.modules.items())  # another thread may import at the same time
    aside = {name: module for name, module in every if _top(name) in tops and _is_own(name, module)}
    for name in aside:
        del sys.modules[name]
    before = {_top(name) for name, _ in every} - tops
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python would miss an edit within one second
    words, sys.argv = sys.argv, [str(file)]
    try:
        yield
    finally:
        sys.argv = words
        sys.dont_write_bytecode = writes
        with suppress(ValueError):  # the function may have changed it
            sys.path.remove(str(root))
        new = [(name, module) for name, module in list(sys.modules.items()) if _top(name) not in before]
        for name, module in new:
            if _is_own(name, module, root):
                del sys.modules[name]
        sys.modules.update(aside)


def _top(name: str) -> str:
    """Return the first part of a module's dotted name, or of the relative path of its file."""
    return name.partition("/")[0].partition(".")[0]


def _is_own(name: str, module: Any, root: Path | None = None) -> bool:
    """Check whether a module may be the user's, below `root` if it is given: neither installed nor of Python."""
    if _top(name) in sys.stdlib_module_names:
        return False
    file = getattr(module, "__dict__", {}).get("__file__")
    path = Path(file) if isinstance(file, str) else None
    return not (path and INSTALLED & set(path.parts)) and (root is None or (path is not None and root in path.parents))


def module_name(file: Path) -> tuple[str, Path]:
    """Return the importable name of a file, with its packages, and the folder to import it from."""
    names, folder = [file.stem], file.parent
    while (folder / "__init__.py").exists():
        names.insert(0, folder.name)
        folder = folder.parent
    return ".".join(names), folder


def text_of(file: Path) -> str:
    """Read a Python file; `SpecError` if it cannot be read."""
    try:
        return read_regular(file, LARGEST).decode("utf-8-sig")
    except FileNotFoundError:
        got = f"{file}, which does not exist"
        raise SpecError("file", got=got, expected="a Python file", nearest=nearest_file(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        got = f"{file}, which cannot be read ({_reason(error)})"
        raise SpecError("file", got=got, expected="a Python file") from None


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def syntax_tree(file: Path) -> ast.Module:
    """Parse a Python file.

    Errors: `SpecError` for a file that cannot be read or is not Python.
    """
    try:
        return ast.parse(text_of(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise SpecError("file", got=f"{file}{line}, which is not Python ({error})", expected="a Python file") from None


def local_files(file: Path) -> set[Path]:
    """Return a file and the modules beside it that it imports, directly or indirectly."""
    _, root = module_name(file)
    packages = [folder / "__init__.py" for folder in file.parents if root in folder.parents]  # run before the file
    seen: set[Path] = set()
    for each in (file, *packages):
        _add_local_files(each, root, seen)
    return seen


def _add_local_files(file: Path, root: Path, seen: set[Path]) -> None:
    """Add a file and all modules below `root` that it imports, directly or indirectly."""
    if file in seen:
        return
    seen.add(file)
    for node in ast.walk(syntax_tree(file)):
        for folder, name in _imported(node, file, root):
            steps = name.split(".")
            for length in range(1, len(steps) + 1):  # the import of a.b runs a first
                path = folder.joinpath(*steps[:length])
                for module in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
                    if module.is_file():
                        _add_local_files(module, root, seen)


def _imported(node: ast.AST, file: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the modules that a statement may import: the folder to search, and the dotted name."""
    if isinstance(node, ast.Import):
        yield from ((root, each.name) for each in node.names if _is_local(each.name, file, root))
    elif name := _called_import(node):
        yield from [(root, name)] if _is_local(name, file, root) else []
    elif isinstance(node, ast.ImportFrom) and not node.level and not _is_local(node.module or "", file, root):
        return
    elif isinstance(node, ast.ImportFrom) and node.level <= len(file.parents):
        folder = file.parents[node.level - 1] if node.level else root
        for each in node.names:  # a module, or a name inside one
            yield folder, f"{node.module}.{each.name}" if node.module else each.name


def _called_import(node: ast.AST) -> str:
    """Return the name that a call of `import_module` or `__import__` imports; empty for any other node."""
    if not isinstance(node, ast.Call) or not node.args:
        return ""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    name = getattr(node.args[0], "value", None)
    return name if called in ("import_module", "__import__") and isinstance(name, str) and name[:1] != "." else ""


def uncounted(function: Callable[..., Any], file: Path, others: Iterable[str]) -> list[str]:
    """Return a warning for each module of the user that a function's file uses and no hash of the study covers.

    The hashes cover the file, the modules of its folder or package that it imports, and the `others`.
    """
    counted = {*local_files(file), *map(Path, others)}
    counted |= {each.resolve() for each in counted}
    found: dict[Path, None] = {}
    for value in list(function.__globals__.values()):
        with suppress(Exception):  # an object may do anything when an attribute is read
            name = value.__name__ if isinstance(value, ModuleType) else value.__module__
            module = sys.modules[name]
            path = Path(module.__file__)  # type: ignore[arg-type]
            if _is_own(name, module) and _top(name) != _top(__name__):
                places = {path, *path.parents, path.resolve(), *path.resolve().parents}
                found |= {} if places & counted else {path: None}
    return [
        f"{path}: a change of this module makes no other study, because {file.name} does not import it from "
        "its own folder; name the module or its folder in `files`"
        for path in found
    ]


def _is_local(name: str, file: Path, root: Path) -> bool:
    """Check whether a module may be the user's: neither installed nor of this package."""
    top = name.partition(".")[0]
    if INSTALLED & set(root.parts) and top != module_name(file)[0].partition(".")[0]:
        return False
    return top != __name__.partition(".")[0]
