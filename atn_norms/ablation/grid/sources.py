"""Hash the source code that a trial runs: plugins, and the user's functions."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atn_norms.errors import SpecError, short_repr, with_article
from atn_norms.files import sha256
from atn_norms.options import Options
from atn_norms.registry import FAMILIES, Entry, registry

OWN = "atn-norms"  # the distribution of the built-in kinds: the version of a trial covers their meaning
UNKNOWN = "unknown"  # replaces the hash of a kind that no file defines, such as one of a notebook
COMPILED = {".pyc", ".pyo", ".so", ".pyd", ".dylib"}  # made from sources, and different from machine to machine
DIGITS = 16
CURE = "Install the versions of the study, or make a new study."

Sources = dict[str, dict[str, str]]  # distribution -> {"version": ..., "source": ...}


def hash_files(path: Path) -> str:
    """Compute a hash of a file's bytes, or of the names and bytes of all files of a folder; 16 hexadecimal digits.

    Caches, compiled files and hidden files of a folder do not count. The content of a linked folder counts.

    Errors: `SpecError` naming a file or a folder that cannot be read.

    >>> Path("code.py").write_text("x = 1")
    5
    >>> hash_files(Path("code.py"))
    'eb6cad6109434d62'
    """
    total = hashlib.sha256()
    for file in sorted(_files(path)) if path.is_dir() else [path]:
        try:
            content = sha256(file)
        except OSError as error:
            raise SpecError(position=str(file), got=str(error.strerror), expected="a readable file") from error
        name = "" if file == path else file.relative_to(path).as_posix()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()[:DIGITS]


def hash_source(thing: Callable[..., Any] | type) -> str:
    """Compute a hash of the file that defines a function or a class, or of its source text where no file does.

    Errors: `SpecError` where there is no source, such as for a built-in function or one made by `exec`.

    >>> hash_source(hash_source) == hash_files(Path(inspect.getfile(hash_source)))
    True
    >>> hash_source(len)
    Traceback (most recent call last):
    ...
    atn_norms.errors.SpecError: len: got a builtin_function_or_method without source; expected a function or class ...
    """
    try:
        file = inspect.getsourcefile(thing)
        if file is not None and Path(file).is_file():
            return hash_files(Path(file))
        return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()[:DIGITS]
    except (TypeError, OSError):
        name = getattr(thing, "__qualname__", short_repr(thing))
        got, expected = f"{with_article(type(thing).__name__)} without source", "a function or class defined in a file"
        raise SpecError(name, got, expected) from None


def plugin_sources(*specs: Any) -> Sources:
    """Return the version and the source hash of every plugin whose kinds some options use, by distribution.

    The hash of a distribution covers the packages that define its kinds. A kind that a program registers itself belongs
    to a distribution named like its module. A kind that no file defines, such as in a notebook, has the source
    `"unknown"`, and a change of it is not detected.

    >>> from atn_norms.layers import LayerSpec
    >>> plugin_sources(LayerSpec(cell="lstm", input_size=2, hidden_size=3, norm="layer"))
    {}
    """
    entries = _entries()
    used = [entries[type(spec)] for spec in _options(specs) if type(spec) in entries]
    return _sources(used, entries.values())


def installed_sources(distributions: Iterable[str]) -> Sources:
    """Return the version and the source hash of those of some distributions that registered kinds here."""
    entries, wanted = _entries().values(), set(distributions)
    return _sources([each for each in entries if each.distribution in wanted], entries)


def describe_changes(recorded: Mapping[str, Mapping[str, str]], here: Mapping[str, Mapping[str, str]]) -> str:
    """Describe how the plugins here differ from the recorded ones; empty where they do not.

    >>> describe_changes({"p": {"version": "1", "source": "a"}}, {"p": {"version": "1", "source": "b"}})
    'p: got version 1 with changed source (b); expected the recorded source (a)'
    >>> describe_changes({"p": {"version": "1", "source": "a"}}, {"p": {"version": "2", "source": "b"}})
    'p: got version 2; expected version 1'
    >>> describe_changes({"p": {"version": "1", "source": "a"}}, {})
    'p: not installed; expected version 1'
    """
    return "; ".join(
        _change(name, recorded.get(name), here.get(name))
        for name in sorted({*recorded, *here})
        if recorded.get(name) != here.get(name)
    )


def refuse_changed_plugins(folder: Path, trials: Iterable[Mapping[str, Any]]) -> None:
    """Raise `SpecError` where an installed plugin differs from the one that a study's trials record."""
    recorded = [trial.get("plugins", {}) for trial in trials]
    here = installed_sources(name for plugins in recorded for name in plugins)
    changes = {
        describe_changes({name: plugin}, {name: here[name]} if name in here else {})
        for plugins in recorded
        for name, plugin in plugins.items()
    }
    if text := "; ".join(sorted(filter(None, changes))):
        raise SpecError("plugins", position=str(folder), detail=f"{text}. {CURE}")


def _change(name: str, recorded: Mapping[str, str] | None, here: Mapping[str, str] | None) -> str:
    if recorded is None:
        return f"{name}: used, but the trial records no version of it"
    if here is None:
        return f"{name}: not installed; expected version {recorded['version']}"
    if here["version"] != recorded["version"]:
        return f"{name}: got version {here['version']}; expected version {recorded['version']}"
    text = f"got version {here['version']} with changed source ({here['source']})"
    return f"{name}: {text}; expected the recorded source ({recorded['source']})"


def _entries() -> dict[type[Options], Entry]:
    """Return every registered kind of a plugin by its options model."""
    kinds = (entry for family in FAMILIES for entry in registry.kinds(family).values())
    return {entry.spec: entry for entry in kinds if entry.distribution != OWN}


def _options(value: Any) -> Iterator[Options]:
    """Yield every options model within a value."""
    if isinstance(value, Options):
        yield value
        for name in type(value).model_fields:
            yield from _options(getattr(value, name))
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _options(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _options(each)


def _sources(used: Iterable[Entry], entries: Iterable[Entry]) -> Sources:
    versions = {entry.distribution: entry.version for entry in used}
    sources: Sources = {}
    for name in sorted(versions):
        specs = [entry.spec for entry in entries if entry.distribution == name]
        hashes = sorted({_hash_package(spec) for spec in specs})
        source = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:DIGITS]
        sources[name] = {"version": versions[name], "source": source}
    return sources


@cache  # by class: an imported module keeps running when its file changes, and a second import makes new classes
def _hash_package(spec: type[Options]) -> str:
    """Compute a hash of the regular package, or the module, that defines a class."""
    if getattr(sys.modules.get(spec.__module__), spec.__qualname__.partition(".")[0], None) is None:
        return UNKNOWN
    names = spec.__module__.split(".")
    for length in range(1, len(names) + 1):  # the outermost package with a file; a namespace package has no file
        location = _location(".".join(names[:length]))
        if location is not None:
            return hash_files(location)
    return UNKNOWN


def _location(module: str) -> Path | None:
    """Return the file of a module, or the folder of a regular package; None where it has none."""
    try:
        spec = find_spec(module)
    except ValueError:  # `__main__`, which has no specification
        file = getattr(sys.modules[module], "__file__", None)
        return Path(file) if file is not None else None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    origin = Path(spec.origin)
    if not origin.is_file():  # such as a module in a zip archive
        return None
    return origin.parent if spec.submodule_search_locations is not None else origin


def _files(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield the files of a folder that count; `above` are the folders around it, which a link may repeat."""
    try:
        status, paths = folder.stat(), list(folder.iterdir())
    except OSError as error:
        raise SpecError(position=str(folder), got=str(error.strerror), expected="a readable folder") from error
    here = status.st_dev, status.st_ino
    if here in above:
        return
    for path in paths:
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _files(path, (*above, here))
        elif path.is_file() and path.suffix not in COMPILED:
            yield path
