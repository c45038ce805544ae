"""The hook by which every kind comes in, built-in or from another distribution, and the report of what came."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pluggy

from atn_norms.registry import FAMILIES, Registry, Source, disputed, hint, registry

PROJECT = "atn_norms"  # of pluggy, and the group of entry points
OWN = "atn-norms"
BUILT_IN = "built-in"
DISABLE, LOAD = "ATN_NORMS_DISABLE_PLUGINS", "ATN_NORMS_LOAD_PLUGINS"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

log = logging.getLogger(__name__)


class Hooks:
    """What a plugin may implement, each with `@hookimpl` and under exactly this name and these arguments."""

    @hookspec
    def atn_norms_register(self, registry: Registry) -> None:
        """Register kinds: `registry.normalizer(Spec)`, and `.window`, `.cell`, `.task` alike."""


class BuiltIn:
    """The kinds of this package, through the same hook as everyone's."""

    @staticmethod
    @hookimpl
    def atn_norms_register(registry: Registry) -> None:
        """Register the built-in normalizers, windows, cells and tasks."""
        from atn_norms.cells import GRUSpec, LSTMSpec, RNNSpec
        from atn_norms.normalizers import BatchNormSpec, LayerNormSpec, RMSNormSpec
        from atn_norms.tasks import AddingSpec, CharLMSpec
        from atn_norms.windows import CumulativeSpec, ExponentialSpec, SlidingSpec

        for normalizer in (LayerNormSpec, BatchNormSpec, RMSNormSpec):
            registry.normalizer(normalizer)
        for window in (SlidingSpec, CumulativeSpec, ExponentialSpec):
            registry.window(window)
        for cell in (LSTMSpec, GRUSpec, RNNSpec):
            registry.cell(cell)
        for task in (AddingSpec, CharLMSpec):
            registry.task(task)


class PluginError(Exception):
    """A plugin that cannot be used as it is, and why."""


@dataclass(frozen=True)
class PluginRecord:
    """What became of one plugin.

    Symbols: `name` of its entry point; `status` `"loaded"`, `"blocked"` or `"failed"`; `reason` why it is not
    loaded, or what of it is unusable; `kinds` what it registered, as `family:kind`; `traceback` of a failure.
    """

    name: str
    distribution: str
    version: str
    status: str
    reason: str = ""
    kinds: tuple[str, ...] = ()
    traceback: str = ""


def report() -> tuple[PluginRecord, ...]:
    """Load all plugins, unless that has happened, and say what became of each; a disputed kind is a reason."""
    records: tuple[PluginRecord, ...] = registry.load()
    disputes = {
        f"{family}:{kind}": disputed(family, kind, entries)
        for family in FAMILIES
        for kind, entries in registry.conflicts(family).items()
    }
    return tuple(
        replace(record, reason="; ".join(disputes[kind] for kind in record.kinds if kind in disputes))
        if record.status == "loaded"
        else record
        for record in records
    )


def load(into: Registry) -> tuple[PluginRecord, ...]:
    """Register the built-in kinds, then every installed plugin's, one by one.

    A plugin that raises leaves nothing behind and is recorded as failed; the rest load. Two environment variables
    take entry-point names, separated by commas: `ATN_NORMS_DISABLE_PLUGINS` blocks these,
    `ATN_NORMS_LOAD_PLUGINS` blocks all others (empty: all).
    """
    # Unguarded: an installation whose own kinds do not load is broken, and nothing useful can follow.
    records = [_register(BuiltIn, Source(BUILT_IN, OWN, _own_version()), into)]
    found = list(_discover())
    for source, point in found:
        reason = _blocked(source.plugin)
        if reason:
            record = PluginRecord(source.plugin, source.distribution, source.version, "blocked", reason)
        else:
            record = _guarded(source, point, into)
        records.append(record)
    return (*records, *_unknown_names({source.plugin for source, _ in found}))


def _discover() -> Iterator[tuple[Source, Any]]:
    """Yield every entry point of the group with its source; a distribution that cannot be read yields its error."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = str(getattr(distribution, "_path", "a nameless distribution"))
        try:
            if PROJECT not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, version = distribution.name, distribution.version
            points = [] if name in seen else list(distribution.entry_points.select(group=PROJECT))
        except Exception as error:  # noqa: BLE001  one unreadable distribution must not hide the others' plugins
            yield Source(name, name, ""), PluginError(f"its metadata cannot be read: {_reason(error)}")
            continue
        seen.add(name)  # the same one further down the path is not what an import would find
        for point in points:
            yield Source(point.name, name, version), point


def _own_version() -> str:
    try:
        return importlib.metadata.version(OWN)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return ""


def _guarded(source: Source, point: Any, into: Registry) -> PluginRecord:
    try:
        if isinstance(point, Exception):
            raise point
        return _register(point.load(), source, into)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin may raise anything, and may even exit
        reason = _reason(error)
        log.warning("plugin %r of %s failed and is left out: %s", source.plugin, source, reason)
        trace = "".join(traceback.format_exception(error))
        return PluginRecord(source.plugin, source.distribution, source.version, "failed", reason, traceback=trace)


def _register(plugin: Any, source: Source, into: Registry) -> PluginRecord:
    # One manager for each plugin: calling its hook then calls nobody else's, and a failed one is simply dropped.
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    _refuse_misspelt(plugin)
    manager.register(plugin, source.plugin)
    with into.transaction(source) as claimed:
        manager.hook.atn_norms_register(registry=into)
    return PluginRecord(source.plugin, source.distribution, source.version, "loaded", kinds=tuple(claimed))


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
                raise PluginError(f"implements an unknown hook {name!r}; known: {', '.join(hooks)}{hint(name, hooks)}")
            implemented.append(hook)
        elif name.startswith("atn_norms_") and _is_own_function(function, plugin):
            known = f"known: {', '.join(hooks)}{hint(name, hooks)}"
            raise PluginError(f"has a function {name!r} that lacks `@atn_norms.hookimpl`, so it does nothing; {known}")
    if not implemented:
        raise PluginError("implements no hook; it needs `@atn_norms.hookimpl def atn_norms_register(registry)`")


def _is_own_function(function: Any, plugin: Any) -> bool:
    # What a module merely imports may have any name; what it defines under our prefix was meant as a hook.
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


def _unknown_names(found: set[str]) -> Iterator[PluginRecord]:
    for variable in (DISABLE, LOAD):
        for name in _names(variable) or ():
            if name == BUILT_IN and variable == DISABLE:
                reason = f"named in {variable}, but the kinds of atn-norms itself cannot be blocked"
                log.warning("plugin %r: %s", name, reason)
                yield PluginRecord(name, "", "", "failed", reason)
            elif name not in found and name != BUILT_IN:
                reason = f"named in {variable}, but no plugin of this name is installed{hint(name, found)}"
                log.warning("plugin %r: %s", name, reason)
                yield PluginRecord(name, "", "", "failed", reason)


def _reason(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    says = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    place = f" ({last.filename}:{last.lineno})" if last is not None and not isinstance(error, PluginError) else ""
    return " ".join(says.split()) + place
