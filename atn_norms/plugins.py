"""The hook that registers every kind, built-in or from a plugin, and the report of all plugins."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email import message_from_string
from typing import Any

import pluggy

from atn_norms import __version__
from atn_norms.errors import did_you_mean, one_of
from atn_norms.options import Options
from atn_norms.registry import FAMILIES, Registry, Source, disputed, registry
from atn_norms.round_trip import unstorable_options

PROJECT = "atn_norms"  # project name of pluggy, and group of the entry points
OWN = "atn-norms"
BUILT_IN = "built-in"
DISABLE, LOAD = "ATN_NORMS_DISABLE_PLUGINS", "ATN_NORMS_LOAD_PLUGINS"
SLOW = 2.0  # seconds of loading after which a plugin is reported; torch is already loaded and does not count

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

log = logging.getLogger(__name__)


class Hooks:
    """Hooks of a plugin, implemented with `@hookimpl` and with exactly these names and arguments."""

    @hookspec
    def atn_norms_register(self, registry: Registry) -> None:
        """Register kinds with `registry.normalizer(Spec)`, `.window`, `.cell` and `.task`."""


class BuiltIn:
    """The kinds of this package, registered through the hook of plugins."""

    @staticmethod
    @hookimpl
    def atn_norms_register(registry: Registry) -> None:
        """Register the built-in normalizers, windows, cells and tasks."""
        from atn_norms.cells import GRUSpec, LSTMSpec, RNNSpec
        from atn_norms.normalizers import BatchNormSpec, LayerNormSpec, RMSNormSpec
        from atn_norms.tasks import (
            AddingSpec,
            CharLMSpec,
            CopyingSpec,
            DenoiseSpec,
            SequencesSpec,
            SeriesSpec,
            WordLMSpec,
        )
        from atn_norms.windows import CumulativeSpec, DetachedSpec, ExponentialSpec, SlidingSpec

        for normalizer in (LayerNormSpec, BatchNormSpec, RMSNormSpec):
            registry.normalizer(normalizer)
        for window in (SlidingSpec, CumulativeSpec, ExponentialSpec, DetachedSpec):
            registry.window(window)
        for cell in (LSTMSpec, GRUSpec, RNNSpec):
            registry.cell(cell)
        for task in (AddingSpec, CharLMSpec, CopyingSpec, DenoiseSpec, SequencesSpec, SeriesSpec, WordLMSpec):
            registry.task(task)


class PluginError(Exception):
    """A plugin that cannot be used, with the reason."""


@dataclass(frozen=True)
class PluginRecord:
    """Result of loading one plugin.

    | attribute | meaning |
    |---|---|
    | `name` | name of the entry point |
    | `status` | `"loaded"`, `"blocked"` or `"failed"` |
    | `reason` | reason why the plugin is not loaded, or the fault of a loaded plugin |
    | `kinds` | registered kinds, as `family:kind` |
    | `traceback` | traceback of a failure |
    | `seconds` | time of loading |
    | `disputed` | kinds that other plugins register too |
    """

    name: str
    distribution: str
    version: str
    status: str
    reason: str = ""
    kinds: tuple[str, ...] = ()
    traceback: str = ""
    seconds: float = 0.0
    disputed: tuple[str, ...] = ()

    @property
    def faulty(self) -> bool:
        """True for a plugin that failed, or that loaded with a fault."""
        return self.status == "failed" or (self.status == "loaded" and bool(self.reason))

    def __str__(self) -> str:
        source = " ".join(part for part in (self.distribution, self.version) if part)
        return f"plugin {self.name!r}{f' of {source}' if source else ''}"


def report(strict: bool = False) -> tuple[PluginRecord, ...]:
    """Load all plugins once, and return a record of each; a disputed kind is a fault.

    Errors: with `strict`, `PluginError` with a line for every faulty plugin.

    >>> [record.name for record in report() if record.name == "built-in"]
    ['built-in']
    """
    records = examined(registry.load(), registry)
    faults = [f"{record}: {record.reason}" for record in records if record.faulty]
    if strict and faults:
        raise PluginError("\n".join(faults))
    return records


def examined(records: tuple[PluginRecord, ...], into: Registry) -> tuple[PluginRecord, ...]:
    """Return the records of a `load`, with disputed kinds added to the reasons.

    A dispute is known after all plugins are loaded, and ends when one of the kinds is removed.
    """
    disputes = {
        f"{family}:{kind}": disputed(family, kind, entries)
        for family in FAMILIES
        for kind, entries in into.conflicts(family).items()
    }

    def with_disputes(record: PluginRecord) -> PluginRecord:
        shared = tuple(kind for kind in record.kinds if kind in disputes)
        reasons = [record.reason, *(disputes[kind] for kind in shared)]
        return replace(record, reason="; ".join(filter(None, reasons)), disputed=shared)

    return tuple(with_disputes(record) if record.status == "loaded" else record for record in records)


def load(into: Registry) -> tuple[PluginRecord, ...]:
    """Register the built-in kinds, then every installed plugin's, one by one.

    A plugin that raises registers nothing and is recorded as failed; the others load. A plugin that requires another
    version of this package is not imported. A plugin that takes more than 2 seconds is named while it loads and in its
    record. It is not interrupted, since an interrupted import leaves incomplete modules.

    Two environment variables take entry-point names, separated by commas: `ATN_NORMS_DISABLE_PLUGINS` blocks these,
    `ATN_NORMS_LOAD_PLUGINS` blocks all others (empty: all).
    """
    # Unguarded: an installation whose built-in kinds do not load is broken.
    own, began = Source(BUILT_IN, OWN, _own_version()), time.perf_counter()
    with into.transaction(own) as claimed:
        _register(BuiltIn, own, into)
    records = [replace(_loaded(own, claimed), seconds=_since(began))]
    entry_points = list(_discover())
    for source, point in entry_points:
        reason = _blocked(source.plugin)
        if reason:
            record = PluginRecord(source.plugin, source.distribution, source.version, "blocked", reason)
        else:
            record = _guarded(source, point, into)
        records.append(record)
    return (*records, *_unknown_names({source.plugin for source, _ in entry_points}))


def _discover() -> Iterator[tuple[Source, Any]]:
    """Yield every entry point of the group with its source; for a damaged distribution, yield an error instead."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        folder = str(getattr(distribution, "_path", "a nameless distribution"))
        damage, name, version, points = None, "", "", []
        try:
            if PROJECT not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, version, damage = _named(distribution)
            if name in seen:
                continue  # an import finds the first one on the path
            points = [(point.name, point) for point in distribution.entry_points.select(group=PROJECT)]
        except Exception as error:  # noqa: BLE001  one unreadable distribution must not hide the others' plugins
            damage = PluginError(f"its entry points cannot be read: {_reason(error)}")
            points = [(name or folder, damage)]
        if name:
            seen.add(name)
        for plugin, point in points:
            yield Source(plugin, name or folder, version), damage or point


def _named(distribution: importlib.metadata.Distribution) -> tuple[str, str, PluginError | None]:
    """Return name and version of a distribution, and an error if one is missing or another atn-norms is required."""
    try:
        # Read from the file: `distribution.metadata` treats missing fields differently between Pythons,
        # and where the backport of importlib.metadata is loaded, all distributions are the backport's.
        metadata = message_from_string(distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "")
        name, version = metadata["Name"] or "", metadata["Version"] or ""
    except Exception as error:  # noqa: BLE001  a file that cannot be read, or not as text
        return "", "", PluginError(f"its distribution's metadata cannot be read: {_reason(error)}")
    lacking = [field for field, value in (("Name", name), ("Version", version)) if not value]
    if lacking:
        what = f"its distribution's metadata has no {' and no '.join(lacking)}; install it again"
        return name, version, PluginError(what)
    try:
        return name, version, _version_refused(distribution.requires or [])
    except Exception as error:  # noqa: BLE001  an invalid requirement
        return name, version, PluginError(f"its distribution's requirements cannot be read: {_reason(error)}")


def _version_refused(requirements: list[str]) -> PluginError | None:
    """Return an error if a distribution requires another version of this package.

    The installation checked it, but either package may have changed since.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for requirement in map(Requirement, requirements):
        applies = canonicalize_name(requirement.name) == OWN
        applies = applies and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        if applies and not requirement.specifier.contains(__version__, prereleases=True):
            wanted = f"is written for {OWN}{requirement.specifier}, and this is {__version__}"
            return PluginError(f"{wanted}; install versions of the two that go together")
    return None


def _own_version() -> str:
    try:
        return importlib.metadata.version(OWN)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return ""


def _guarded(source: Source, point: Any, into: Registry) -> PluginRecord:
    began = time.perf_counter()
    try:
        if isinstance(point, Exception):
            raise point
        # The import is part of the transaction, since a module may register while it is imported.
        with _watched(source), into.transaction(source) as claimed:
            _register(point.load(), source, into)
            _refuse_indescribable(claimed)
    except KeyboardInterrupt:
        raise  # Ctrl-C of the user
    except BaseException as error:  # noqa: BLE001  a plugin may raise any exception, SystemExit included
        reason = _reason(error)
        log.warning("plugin %r of %s failed and is left out: %s", source.plugin, source, reason)
        trace = "".join(traceback.format_exception(error))
        record = PluginRecord(source.plugin, source.distribution, source.version, "failed", reason, traceback=trace)
    else:
        record = _loaded(source, claimed)
    seconds = _since(began)
    slow = seconds > SLOW and record.status == "loaded"
    reason = f"took {seconds:.1f} s to load, and every program that uses plugins waits for it" if slow else ""
    return replace(record, seconds=seconds, reason="; ".join(filter(None, [record.reason, reason])))


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


@contextmanager
def _watched(source: Source) -> Iterator[None]:
    """Log the name of a plugin that is still loading after `SLOW` seconds, so that users can block it."""
    message = "plugin %r of %s is still loading after %g s; %s=%s leaves it out"
    timer = threading.Timer(SLOW, log.warning, (message, source.plugin, source, SLOW, DISABLE, source.plugin))
    timer.daemon = True
    timer.start()
    log.debug("loading plugin %r of %s", source.plugin, source, extra={"loading": f"{source.plugin!r} of {source}"})
    try:
        yield
    finally:
        log.debug("end of plugin %r", source.plugin, extra={"loading": ""})
        timer.cancel()


def _loaded(source: Source, claimed: dict[str, type[Options]]) -> PluginRecord:
    reason = "" if claimed else "registers no kind"
    return PluginRecord(source.plugin, source.distribution, source.version, "loaded", reason, tuple(claimed))


def _register(plugin: Any, source: Source, into: Registry) -> None:
    # One manager for each plugin: its hook is called alone, and a failed plugin is dropped.
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    _refuse_misspelt(plugin)
    manager.register(plugin, source.plugin)
    manager.hook.atn_norms_register(registry=into)


def _refuse_indescribable(claimed: dict[str, type[Options]]) -> None:
    """Reject options without a JSON schema or without a JSON form: `list` or every trial would fail."""
    for kind, spec in claimed.items():
        try:
            spec.model_json_schema()
        except Exception as error:
            raise PluginError(f"the options of {kind} have no JSON schema: {_one_line(error)}") from error
        problems = [str(problem) for problem in unstorable_options(spec)]
        if problems:
            raise PluginError(f"a study cannot store the options of {kind}: {'; '.join(problems)}")


def _refuse_misspelt(plugin: Any) -> None:
    hooks = [name for name in vars(Hooks) if name.startswith("atn_norms_")]
    implemented = []
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        function = getattr(function, "__func__", function)
        options = getattr(function, f"{PROJECT}_impl", None) if inspect.isroutine(function) else None
        if options is not None:
            hook = options.get("specname") or name
            if hook not in hooks and not options.get("optionalhook"):
                raise PluginError(
                    f"implements an unknown hook {name!r}; expected {one_of(hooks)}{did_you_mean(name, hooks)}"
                )
            if _is_deferred(function) and not (options.get("wrapper") or options.get("hookwrapper")):
                got = f"implements {name!r} as a generator or coroutine, whose body does not run"
                raise PluginError(f"{got}; expected a plain function")
            implemented.append(hook)
        elif name.startswith("atn_norms_") and _is_own_function(function, plugin):
            known = "" if name in hooks else f"; expected one of {', '.join(hooks)}{did_you_mean(name, hooks)}"
            raise PluginError(f"has a function {name!r} that lacks `@atn_norms.hookimpl`, so it does nothing{known}")
    if not implemented:
        raise PluginError("implements no hook; it needs `@atn_norms.hookimpl def atn_norms_register(registry)`")


def _is_deferred(function: Any) -> bool:
    tests = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
    return any(test(function) for test in tests)


def _is_own_function(function: Any, plugin: Any) -> bool:
    # An imported function may have any name; a function that the module defines under our prefix is meant as a hook.
    owner = plugin.__name__ if inspect.ismodule(plugin) else getattr(plugin, "__module__", None)
    return inspect.isroutine(function) and getattr(function, "__module__", None) == owner


def _blocked(name: str) -> str:
    if name in (_names(DISABLE) or ()):
        return f"named in {DISABLE}"
    only = _names(LOAD)
    return "" if only is None or name in only else f"not named in {LOAD}"


def _names(variable: str) -> list[str] | None:
    value = os.environ.get(variable)
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _unknown_names(installed: set[str]) -> Iterator[PluginRecord]:
    for variable in (DISABLE, LOAD):
        for name in _names(variable) or ():
            if name == BUILT_IN and variable == DISABLE:
                reason = f"named in {variable}, but the kinds of atn-norms itself cannot be blocked"
                log.warning("plugin %r: %s", name, reason)
                yield PluginRecord(name, "", "", "failed", reason)
            elif name not in installed and name != BUILT_IN:
                reason = f"named in {variable}, but no plugin of this name is installed{did_you_mean(name, installed)}"
                log.warning("plugin %r: %s", name, reason)
                yield PluginRecord(name, "", "", "failed", reason)


def _reason(error: BaseException) -> str:
    if isinstance(error, PluginError):
        return " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return _one_line(error) + place


def _one_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  an exception in `__str__` must not end the program
        text = "its message cannot be made"
    return " ".join(f"{type(error).__name__}: {text}".split())
