"""Describe the construction of a module as JSON, and construct the module again without stored code."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from atn_norms.errors import SpecError, mismatch, with_article
from atn_norms.layers.base import OWNED, CellHost
from atn_norms.layers.classes import class_of
from atn_norms.layers.recurrent import Recurrent
from atn_norms.layers.spec import LayerSpec
from atn_norms.layers.steps import GRUCell, LSTMCell, RNNCell
from atn_norms.registry import registry
from atn_norms.windows import Window, WindowSpec

TRUSTED = ("torch.nn.", "atn_norms.")  # packages whose classes a file may name; every other class stays unimported
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STEPS = {"lstm": LSTMCell, "gru": GRUCell, "rnn": RNNCell}
_PLAIN = (bool, int, float, str, type(None))  # attributes that JSON keeps
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def describe(module: nn.Module) -> dict[str, Any] | None:
    """Return the description of a module as JSON, or None if it contains other code: a class, a hook, or a new method.

    Supported are the layers and normalizers of this package, and every class of `torch.nn` whose constructor arguments
    are attributes. The description is verified: `construct` must give a module with the same parameters, buffers and
    options.
    """
    if any(map(_has_own_code, module.modules())):
        return None
    try:
        described = _described(module)
        layers = iter([each for each in module.modules() if isinstance(each, CellHost)])
        with torch.random.fork_rng(devices=[]):
            same = _outline(construct(described, layers)) == _outline(module)
    except Exception:  # noqa: BLE001  a constructor may raise any error; the caller then provides the module
        return None
    return described if same else None


def construct(described: dict[str, Any], layers: Iterator[CellHost] | None = None) -> nn.Module:
    """Construct a module from its description, with new parameters; `layers` replace the layers of this package.

    Errors: `SpecError` for a class outside `torch.nn` and this package, and for options that do not fit.
    """
    if "layer" in described:
        return layer_of(described) if layers is None else next(layers)
    cls = _class(described["class"])
    if "children" in described:
        module = cls()
        for name, child in described["children"].items():
            module.add_module(name, construct(child, layers))
        return module
    return cls(**{name: _value(value, layers) for name, value in described["arguments"].items()})


def layer_of(described: dict[str, Any], **factory: Any) -> CellHost:
    """Construct a layer or cell of this package from the options in its description."""
    spec = LayerSpec.model_validate(described["layer"])
    if not described["step"]:
        return class_of(spec.cell.kind).from_spec(spec, **factory)
    own = spec.cell.model_dump(exclude={"kind"})
    shared = ("input_size", "hidden_size", "bias", "norm", "window", "placement", "init", "forget_bias")
    return _STEPS[spec.cell.kind](**{name: getattr(spec, name) for name in shared}, **own, **factory)


def layer_options(layer: CellHost) -> dict[str, Any]:
    """Describe a layer or cell of this package."""
    return {"layer": layer.spec.model_dump(mode="json"), "step": not isinstance(layer, Recurrent)}


def parts(spec: Any) -> Iterator[Any]:
    """Yield an options model that has a kind, and every such model inside it."""
    if getattr(spec, "family", None) and hasattr(spec, "kind"):
        yield spec
    values = vars(spec).values() if hasattr(type(spec), "model_fields") else spec
    for value in values.values() if isinstance(values, Mapping) else values:
        if hasattr(type(value), "model_fields") or isinstance(value, Mapping | tuple):
            yield from parts(value)


def unregistered(layer: CellHost) -> list[str]:
    """Return the normalizers, windows and cells of a layer that the registry does not have, such as `window 'mine'`."""
    found = set()
    for spec in parts(layer.spec):
        entry = registry.kinds(spec.family).get(spec.kind)
        if entry is None or _full_name(entry.spec) != _full_name(type(spec)):  # a module may have been imported again
            found.add(f"{spec.family} {spec.kind!r}")
    return sorted(found)


def changed_attributes(layer: CellHost) -> dict[str, dict[str, Any]]:
    """Return the attributes of norms and windows that no longer have the values of the layer's options.

    The result is module name -> attribute -> value, for numbers, texts and None, and for parameters that were set to
    None. `sync` is left out, since it belongs to a group of processes. Errors: `TypeError` for a module of another
    class than the options give, for a missing module, and for a norm where the options give none.
    """
    found: dict[str, dict[str, Any]] = {}
    for suffix in layer._suffixes:
        for site in layer._sites:
            with torch.random.fork_rng(devices=[]):
                norm = layer.spec.normalizer(layer.cell, site)
                built = {"norm": norm, "window": layer.spec.window_at(site).build() if norm is not None else None}
            for kind, fresh in built.items():
                name = f"{kind}_{site}{suffix}"
                module = layer._modules.get(name)
                if isinstance(fresh, nn.Module):
                    inside = {} if module is None else dict(module.named_modules(prefix=name, remove_duplicate=False))
                    for path, expected in fresh.named_modules(prefix=name):
                        changed = _changed(path, inside.get(path), expected)
                        found |= {path: changed} if changed else {}
                elif module is not None:
                    expected = "nothing, as in the options of the layer"
                    raise TypeError(mismatch(name, with_article(class_name(module)), expected))
    return found


def _changed(path: str, module: nn.Module | None, expected: nn.Module) -> dict[str, Any]:
    if module is None or type_before_parametrizations(module) is not type(expected):
        got = "nothing" if module is None else with_article(class_name(module))
        raise TypeError(mismatch(path, got, f"the {class_name(expected)} of the options of the layer"))
    mine, theirs = (
        {name: value for name, value in vars(each).items() if isinstance(value, _PLAIN) and name[0] != "_"}
        for each in (module, expected)
    )
    shared = [name for name in theirs if name in mine and name not in ("training", "sync")]
    absent = [name for name, value in module._parameters.items() if value is None]
    changed = {name: mine[name] for name in shared if mine[name] != theirs[name]}
    return changed | {name: None for name in absent if expected._parameters.get(name) is not None}


def restore_attributes(layer: CellHost, changed: dict[str, dict[str, Any]]) -> None:
    """Set the attributes that `changed_attributes` returned; `SpecError` for one that the norms of the layer lack."""
    known = {path: module for path, module in layer.named_modules() if path.startswith(OWNED)}
    for path, values in changed.items():
        for name, value in values.items():
            there = vars(known[path]) if path in known else {}
            if value is None and path in known:  # a gain or a shift may be absent
                there = there | dict.fromkeys(known[path]._parameters)
            if not (isinstance(value, _PLAIN) and isinstance(there.get(name, ...), _PLAIN) and name[0] != "_"):
                raise SpecError((path, name), repr(value), "a number, text or None of a norm of the layer")
            setattr(known[path], name, value)


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return _full_name(type(module))


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _has_own_code(module: nn.Module) -> bool:
    """Return True if a module has hooks, or attributes in place of methods of its class."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or any(
        inspect.isroutine(getattr(type(module), name, None)) for name in vars(module)
    )


def _described(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, CellHost):
        kind = module.spec.cell.kind
        if type(module) not in (class_of(kind), _STEPS.get(kind)):
            raise TypeError("a subclass may compute something else")
        if unregistered(module):
            raise TypeError("a kind that no other process knows")
        return layer_options(module)
    if not class_name(module).startswith(TRUSTED):
        raise TypeError("a class of the caller's own")
    if type(module) in _CONTAINERS:
        children = {name: _described(child) for name, child in module.named_children()}
        return {"class": class_name(module), "children": children}
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue  # `nn.Identity` takes and ignores any; where they matter, the check of `describe` finds out
        if name not in ("device", "dtype") and not name.startswith("_") and hasattr(module, name):
            arguments[name] = _stored(name, getattr(module, name))
    return {"class": class_name(module), "arguments": arguments}


def _stored(name: str, value: Any) -> Any:
    if name == "bias" and not isinstance(value, bool):  # torch keeps the parameter under the argument's name
        return value is not None
    if isinstance(value, nn.Module):
        return {"module": _described(value)}
    if isinstance(value, Window):
        return {"window": value.spec().model_dump(mode="json")}
    if isinstance(value, tuple | list):
        return [_stored("", each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name} is {with_article(type(value).__name__)}")


def _value(stored: Any, layers: Iterator[CellHost] | None) -> Any:
    if isinstance(stored, dict):
        return construct(stored["module"], layers) if "module" in stored else _window(stored["window"])
    return tuple(_value(each, layers) for each in stored) if isinstance(stored, list) else stored


def _window(stored: Any) -> Window[Any]:
    options = {"cell": "rnn", "input_size": 1, "hidden_size": 1, "norm": "layer", "window": stored}
    window = LayerSpec.model_validate(options).window  # the field that knows every registered window
    assert isinstance(window, WindowSpec)
    return window.build()


def _class(name: str) -> Any:
    path, _, qualname = name.rpartition(".")
    if not name.startswith(TRUSTED):
        raise SpecError("class", name, "a class of torch.nn or atn_norms")
    found = getattr(importlib.import_module(path), qualname, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SpecError("class", name, "a torch.nn.Module")
    return found


def _outline(module: nn.Module) -> list[Any]:
    """Return what must be equal in two modules that compute the same: names, types, options and shapes."""
    simple = (bool, int, float, str, tuple, type(None))
    options = [
        (name, type(each), {k: v for k, v in vars(each).items() if isinstance(v, simple) and k != "training"})
        for name, each in module.named_modules()
    ]
    tensors = [(name, tuple(each.shape)) for name, each in module.state_dict().items()]
    return [repr(module), options, tensors]
