"""Save a model with our layers to one file, and load it: options as JSON, tensors as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from atn_norms.errors import (
    Problem,
    SpecError,
    brief,
    mismatch,
    nearest_file,
    not_installed,
    to_spec_error,
    with_article,
)
from atn_norms.files import most_bytes, read_regular, write_whole
from atn_norms.layers.base import CellHost
from atn_norms.layers.convert import pinned_modules, replacement, substitute
from atn_norms.layers.structure import (
    changed_attributes,
    class_name,
    construct,
    describe,
    layer_of,
    layer_options,
    parts,
    restore_attributes,
    unregistered,
)
from atn_norms.registry import registry

FORMAT = 1  # version of the description in a file; raised when an older program cannot read it correctly
SHOWN = 5  # number of differences between a file and a model that an error lists
KEY = "atn-norms"  # key of the description in the metadata of a file


class _Every(BaseModel):
    """The part of a description that every format has."""

    model_config = ConfigDict(strict=True)
    format: int
    versions: dict[str, str]


class _Description(_Every):
    """The description of a model in a file."""

    plugins: dict[str, dict[str, str]]
    class_: str = Field(alias="class")
    structure: dict[str, Any] | None
    layers: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    frozen: list[str]
    sha256: str
    unregistered: dict[str, list[str]] = Field(default_factory=dict)
    attributes: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    preprocessing: dict[str, Any] = Field(default_factory=dict)


def save(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Save a module with the options of its layers to one safetensors file, and return the path.

    The file holds every parameter and buffer, the options of each layer of this package, the versions of their plugins,
    and a checksum. It holds no code: a model with a normalizer, window or cell that is not registered, with hooks, or
    with a method that is replaced on an object is loaded into a new model. The wrappers of `torch.compile`,
    `DataParallel` and `DistributedDataParallel` are not saved, the module inside is. After a crash the old file or the
    new file exists, never a part.

    Errors: `TypeError` for a module with state other than tensors, and for a layer with other norms than its options
    give: one of another class, or one that was added or deleted. `OSError` if the file cannot be written; `SpecError`
    for a missing folder, and if safetensors is not installed.

    >>> import torch, atn_norms as an
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), an.GRU(2, 4, norm="rms", window=5))
    >>> an.save(model, "model.safetensors")
    PosixPath('model.safetensors')
    >>> an.load("model.safetensors")
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): GRU(2, 4, norm=rms, window=5)
    )
    """
    target = Path(path)
    if not target.parent.is_dir():
        near = nearest_file(target.parent)
        raise SpecError(position=str(target.parent), got="no such folder", expected="a folder", nearest=near)
    content = to_bytes(module)
    write_whole(target, content)
    return target


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a module that `save` wrote, in evaluation mode.

    Layers of this package, classes of `torch.nn` and their containers are constructed from the file. For a class of
    your own, or an unregistered normalizer, window or cell, pass a new `model` with it. Its `torch.nn.LSTM`, `GRU` and
    `RNN` layers are replaced by the saved layers, and its parameters and buffers are loaded. `model` is changed in
    place and returned.

    Errors: `TypeError` for a `path` that is no path, and a `model` that is no module. `SpecError` for a file that is
    missing, damaged, of a newer format or not written by `save`. `SpecError` for a plugin that is not installed, and
    for a `model` with other layers, parameters or shapes than the file. A plugin of another version gives a
    `UserWarning`.
    """
    if not isinstance(path, str | os.PathLike):
        got, expected = type(path).__name__, "the path of a file; the model is the second argument"
        raise TypeError(mismatch("path", got, expected))
    if isinstance(model, type):
        raise TypeError(mismatch("model", f"the class {model.__name__}", f"an instance, such as {model.__name__}(...)"))
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(mismatch("model", type(model).__name__, "a torch.nn.Module"))
    file = Path(path)
    loaded = _loaded(file, *_read(file), model)
    return (model if model is not None and loaded is _unwrapped(model) else loaded).to(device).eval()


def foreign(path: str | os.PathLike[str]) -> str:
    """Return the class of a file whose code `load` lacks, with its unregistered kinds; empty if it needs no `model`."""
    description = _read(Path(path))[0]
    return _foreign(description) if description["structure"] is None else ""


def _foreign(description: Mapping[str, Any]) -> str:
    own = sorted({each for kinds in description.get("unregistered", {}).values() for each in kinds})
    return with_article(description["class"]) + (f" with the {', '.join(own)}" if own else "")


def from_bytes(
    content: bytes, file: Path, model: nn.Module | None = None, make: Callable[[], nn.Module] | None = None
) -> nn.Module:
    """Load a module from the content of a file that `save` wrote, in evaluation mode.

    `make` returns a new model; it is called if there is no `model` and the content has no structure. Errors: as `load`.
    """
    description, tensors = _parse(file, content)
    if model is None and make is not None and description["structure"] is None:
        model = make()
    return _loaded(file, description, tensors, model).eval()


def _loaded(file: Path, description: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module | None) -> nn.Module:
    try:
        _check_plugins(file, description["plugins"])
        built = _built(file, description, tensors) if model is None else _fitted(file, description, model)
        _fill(file, built, description, tensors)
    except ValidationError as error:
        raise to_spec_error(error, lambda path: str(file)) from error
    except SpecError as error:
        raise SpecError.of(replace(each, position=each.position or str(file)) for each in error.problems) from error
    except Exception as error:  # the file may name any arguments of any class of torch.nn
        got = f"a description of a model that cannot be built ({type(error).__name__}: {brief(_one_line(error))})"
        raise _error(file, got, "a file of atn_norms.save") from error
    return built


def preprocessing_of(content: bytes, file: Path) -> dict[str, Any]:
    """Return the `preprocessing` in the content of a file. Errors: as `load`."""
    return _parse(file, content)[0].get("preprocessing", {})


def to_bytes(module: nn.Module, preprocessing: Mapping[str, Any] | None = None) -> bytes:
    """Return the content of the file that `save` writes, with the `preprocessing` of the module's inputs, if any."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}; expected a torch.nn.Module")
    module = _unwrapped(module)
    tensors, aliases = _tensors(module)
    layers = {name: each for name, each in module.named_modules() if isinstance(each, CellHost)}
    description = {
        "format": FORMAT,
        "versions": {"atn-norms": _own_version(), "torch": str(torch.__version__)},
        "plugins": _plugins(layers.values()),
        "class": class_name(module),
        "structure": describe(module),
        "layers": {name: layer_options(layer) for name, layer in layers.items()},
        "unregistered": {name: found for name, layer in layers.items() if (found := unregistered(layer))},
        "attributes": {name: found for name, layer in layers.items() if (found := changed_attributes(layer))},
        "aliases": aliases,
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
    }
    if preprocessing:
        description["preprocessing"] = dict(preprocessing)
    data = _data(_serialized(tensors, {}))
    description["sha256"] = hashlib.sha256(data).hexdigest()
    return _serialized(tensors, {KEY: json.dumps(description)})


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    inner = module._modules.get("_orig_mod")  # of torch.compile
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    return module if inner is None else _unwrapped(inner)


def _tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor of a module once, and alias -> name for tensors with several names."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got state of type {type(value).__name__}; expected a tensor")
        if value.is_meta or not value.layout == torch.strided:
            raise TypeError(f"{name}: got a tensor of layout {value.layout} on {value.device}; expected a dense tensor")
        if id(value) in names:
            aliases[name] = names[id(value)]
            continue
        names[id(value)] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, aliases


def _serialized(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    try:
        from safetensors.torch import save as serialize
    except ModuleNotFoundError as error:
        raise not_installed("safetensors", "export") from error
    return serialize(tensors, metadata)


def _data(content: bytes) -> bytes:
    """Return the tensors of a safetensors file as bytes, without the header."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        content = read_regular(file, most_bytes())
    except FileNotFoundError:
        near = nearest_file(file)
        raise SpecError(position=str(file), got="no such file", expected="a file", nearest=near) from None
    except OSError as error:
        raise SpecError(position=str(file), got=str(error.strerror), expected="a readable file") from None
    return _parse(file, content)


def _parse(file: Path, content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load as deserialize
    except ModuleNotFoundError as error:
        raise not_installed("safetensors", "export") from error
    try:
        tensors = deserialize(content)
    except (SafetensorError, ValueError) as error:
        raise _error(file, f"a damaged or foreign file ({error})", "safetensors") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = header.get("__metadata__", {}).get(KEY)
    if text is None:
        raise _error(file, "safetensors without a description of a model", "a file of atn_norms.save")
    description = _description(file, text)
    if description["format"] > FORMAT:
        written = description["versions"].get(KEY, "")
        got = f"format {description['format']}, written by atn-norms {written}"
        expected = f"at most {FORMAT}, which atn-norms {_own_version()} reads"
        raise _error(file, got, expected, "Upgrade atn-norms")
    if hashlib.sha256(_data(content)).hexdigest() != description["sha256"]:
        raise _error(file, "damaged tensors", "tensors that match the checksum in the file")
    return description, tensors


def _description(file: Path, text: str) -> dict[str, Any]:
    """Parse a description, and check what every format has and, of a format that can be read, all of it."""
    try:
        description = json.loads(text)
        _Every.model_validate(description)
        if description["format"] <= FORMAT:
            _Description.model_validate(description)
    except ValidationError as error:
        raise to_spec_error(error, lambda path: str(file)) from error
    except (ValueError, RecursionError) as error:
        got = f"a damaged description of a model ({brief(_one_line(error))})"
        raise _error(file, got, "a file of atn_norms.save") from error
    return description


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _error(file: Path, got: str, expected: str, cure: str = "") -> SpecError:
    return SpecError(position=str(file), got=got, expected=expected, detail=cure)


def _built(file: Path, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    if description["structure"] is None:
        name = description["class"].rpartition(".")[2]
        got = f"{_foreign(description)}, whose code is not in the file"
        expected = f"a new model as the second argument: load({str(file)!r}, {name}(...))"
        raise _error(file, got, expected)
    with torch.random.fork_rng(devices=[]):
        if (shapes := _without_memory(description["structure"])) is not None:
            _restore(shapes, description)
            _refuse_differences(file, shapes, _state(description, tensors))  # before any memory is allocated
        return construct(description["structure"])


def _without_memory(structure: dict[str, Any]) -> nn.Module | None:
    """Construct a module on the meta device; None for a class that cannot be constructed there."""
    try:
        with torch.device("meta"):
            return construct(structure)
    except Exception:  # noqa: BLE001  a constructor may raise any error
        return None


def _fitted(file: Path, description: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of a model, with torch's layers replaced by the saved layers.

    Errors: `SpecError` for a layer that is missing, different, or cannot be replaced.
    """
    pinned, model = pinned_modules(model), _unwrapped(model)
    modules = dict(model.named_modules())
    ours: dict[nn.Module, nn.Module] = {}
    problems = []
    unknown: dict[str, list[str]] = description.get("unregistered", {})
    for name, saved in description["layers"].items():
        there, own = modules.get(name), unknown.get(name, [])
        wanted = None if own else layer_of(saved)  # without its code no layer can be built
        if wanted is not None and isinstance(there, nn.RNNBase):
            given = {option: getattr(wanted.spec, option) for option in ("norm", "window", "placement", "backend")}
            try:
                ours[there] = replacement(name, there, given, pinned)
            except TypeError as error:
                problems.append(str(error))
                continue
            there = ours[there]
        if not (isinstance(there, CellHost) and unregistered(there) == own and _same(there, wanted or saved)):
            got = "nothing" if there is None else repr(there) if isinstance(there, CellHost) else type(there).__name__
            shown = "cell", "input_size", "hidden_size", "norm", "window"
            options = {option: saved["layer"].get(option) for option in shown}
            expected = f"the {', '.join(own)} in a layer with {options}" if wanted is None else repr(wanted)
            problems.append(f"{name or 'model'}: got {got}; expected {expected}, as saved")
    if problems:
        raise SpecError.of(Problem(position=str(file), detail=each) for each in problems)
    return substitute(model, ours)


def _same(layer: CellHost, saved: CellHost | dict[str, Any]) -> bool:
    """Return True if a layer computes the same outputs as a saved one, or its description, from the same parameters."""
    described = layer_options(layer), layer_options(saved) if isinstance(saved, CellHost) else saved
    irrelevant = dict.fromkeys(("init", "forget_bias", "backend"))
    mine, theirs = ((each["layer"] | irrelevant, each["step"]) for each in described)
    return mine == theirs


def _fill(file: Path, model: nn.Module, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Load the saved tensors into a module, with their types, shared tensors and `requires_grad`."""
    aliases: dict[str, str] = description["aliases"]
    state = _state(description, tensors)
    _restore(model, description)  # before the comparison: a gain or shift may be None
    _refuse_differences(file, model, state)
    model.load_state_dict(state, assign=True)
    for name, first in aliases.items():
        path, _, leaf = name.rpartition(".")
        owner, _, source = first.rpartition(".")
        shared = getattr(model.get_submodule(owner), source)
        setattr(model.get_submodule(path), leaf, shared)
    for name in description["frozen"]:
        model.get_parameter(name).requires_grad_(False)


def _restore(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Set the attributes of norms and windows that differ from the options of their layer."""
    for name, changed in description.get("attributes", {}).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, CellHost)  # `layers` has it
        restore_attributes(layer, changed)


def _state(description: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {name: tensors[first] for name, first in description["aliases"].items()}


def _refuse_differences(file: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    problems = list(_differences(model, state))
    if problems:
        more = [f"{len(problems) - SHOWN} more like these"] if len(problems) > SHOWN else []
        raise SpecError.of(Problem(position=str(file), detail=each) for each in [*problems[:SHOWN], *more])


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
    here = model.state_dict()
    for name in [*state, *(name for name in here if name not in state)]:
        if name not in here:
            yield f"{name}: got no such parameter in the model; expected {list(state[name].shape)}, as saved"
        elif name not in state:
            yield f"{name}: got no such tensor in the file; expected {list(here[name].shape)}, as in the model"
        elif here[name].shape != state[name].shape:
            yield f"{name}: got {list(here[name].shape)} in the model; expected {list(state[name].shape)}, as saved"


def _plugins(layers: Any) -> dict[str, dict[str, str]]:
    """Return `family:kind` -> distribution and version, for each kind of a plugin."""
    kinds = {(spec.family, spec.kind) for layer in layers for spec in parts(layer.spec)}
    entries = {f"{family}:{kind}": registry.kinds(family).get(kind) for family, kind in sorted(kinds)}
    return {
        name: {"distribution": entry.distribution, "version": entry.version}
        for name, entry in entries.items()
        if entry is not None and entry.distribution != KEY
    }


def _check_plugins(file: Path, plugins: Mapping[str, Mapping[str, str]]) -> None:
    missing = []
    for name, saved in plugins.items():
        family, _, kind = name.partition(":")
        entry, wanted = registry.kinds(family).get(kind), f"{saved['distribution']} {saved['version']}".strip()
        if entry is None:
            missing.append(f"got no {family} {kind!r} here; expected the one of {wanted}. Install that plugin")
        elif (entry.distribution, entry.version) != (saved["distribution"], saved["version"]):
            warnings.warn(
                f"{file}: the {family} {kind!r} here is from {entry.distribution} {entry.version}; "
                f"the model was saved with {wanted}, and its results may differ",
                stacklevel=4,
            )
    if missing:
        raise SpecError.of(Problem(position=str(file), detail=each) for each in missing)


def _own_version() -> str:
    from atn_norms import __version__

    return __version__
