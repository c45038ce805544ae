"""Replace the torch.nn recurrent layers of a model with ours and keep their weights."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from atn_norms.errors import did_you_mean, mismatch, one_of, typed_repr, with_article
from atn_norms.layers.base import CellHost
from atn_norms.layers.classes import class_of
from atn_norms.layers.explanation import explain
from atn_norms.layers.recurrent import Recurrent
from atn_norms.layers.spec import NormLike, PlacementLike, WindowLike, make_layer_spec
from atn_norms.normalizers import Normalizer

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_DISTRIBUTED = {"DistributedDataParallel", "FullyShardedDataParallel"}  # they read the parameters when they are built
_DEEPEST = 3  # nested containers that are searched for references to a layer
_KINDS: dict[type[nn.RNNBase], str] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}


def replace(
    model: nn.Module,
    *,
    norm: NormLike = None,
    window: WindowLike = 1,
    placement: PlacementLike = None,
    backend: str = "auto",
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
) -> nn.Module:
    """Replace every `nn.LSTM`, `nn.GRU` and `nn.RNN` inside a model with our layer of the same sizes.

    `model` is changed in place and returned. If `model` itself is such a layer, the new layer is returned. A module
    that the model uses in several places is replaced once.

    The parameters of torch stay the same objects. Norms add new parameters: build the optimizer after this call, or
    add `norm_parameters(model)` to it.

    | option | meaning |
    |---|---|
    | `norm`, `window`, `placement`, `backend` | those of `LSTM` |
    | `only`, `skip` | qualified names of layers to replace or to keep, `*` as in file names; default: replace all |

    A layer that cannot be replaced stays unchanged, and a warning names it with the reason: a subclass, a parametrized
    or pruned layer, a layer with hooks, a replaced `forward` or modules inside, or a single-step cell such as
    `nn.LSTMCell`. The other reasons are a layer that `torch.compile` has compiled, a layer inside
    `DistributedDataParallel`, and a layer in a plain attribute, such as a list. Two other cases give a warning: no
    layer is replaced, or an existing optimizer does not have the new parameters.

    Errors: `TypeError` if `model` is not a module, if none of its layers can be replaced, or if a layer of `only`
    cannot. `ValueError` for a name that matches no layer. `SpecError` for options that do not fit. The model is
    unchanged after an error.

    >>> import torch, atn_norms as an
    >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 5))
    >>> an.replace(model, norm="layer", window=10)
    Sequential(
      (0): LSTM(3, 5, norm=layer, window=10)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; expected a torch.nn.Module")
    options = {"norm": norm, "window": window, "backend": backend} | ({"placement": placement} if placement else {})
    recurrent = {name: m for name, m in model.named_modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))}
    if not any(isinstance(module, nn.RNNBase) for module in recurrent.values()):
        _check_options(options)
    wanted = _selected(recurrent, only, skip)
    ours: dict[nn.Module, nn.Module] = {}
    left: list[TypeError] = []
    pinned = pinned_modules(model)
    for name in wanted:
        try:
            ours[recurrent[name]] = replacement(name, recurrent[name], options, pinned)
        except TypeError as error:
            left.append(error)
    if left and (only is not None or not ours):
        raise left[0]
    _warn_about(left, ours, model)
    replaced = substitute(model, ours)
    _warn_about_optimizers(ours)
    return replaced


def _selected(recurrent: Mapping[str, nn.Module], only: Any, skip: Any) -> list[str]:
    """Return the names of the layers to replace; `ValueError` for a pattern that matches none."""
    patterns = {"only": [only] if isinstance(only, str) else only, "skip": [skip] if isinstance(skip, str) else skip}
    matched: dict[str, set[str]] = {}
    for option, names in patterns.items():
        matched[option] = set(recurrent) if names is None else set()
        for pattern in names or ():
            hits = {name for name in recurrent if fnmatchcase(name, pattern)}
            if not hits:
                known = one_of(map(repr, recurrent)) if recurrent else "no name, since the model has no recurrent layer"
                raise ValueError(f"{option}: got {pattern!r}; expected {known}{did_you_mean(pattern, recurrent)}")
            matched[option] |= hits
    return [name for name in recurrent if name in matched["only"] - matched["skip"]]


def _warn_about(left: Sequence[TypeError], ours: Mapping[nn.Module, nn.Module], model: nn.Module) -> None:
    if left:
        warnings.warn(f"replace: {len(left)} recurrent layer(s) unchanged. {'. '.join(map(str, left))}", stacklevel=3)
    if not ours:
        already = [name or "the model itself" for name, each in model.named_modules() if isinstance(each, CellHost)]
        got = f", which has layers of atn_norms already ({', '.join(already[:3])})" if already else ""
        warnings.warn(
            f"replace: got {type(model).__name__}{got}; expected a model with an nn.LSTM, nn.GRU or nn.RNN. "
            "The model is unchanged",
            stacklevel=3,
        )


def _warn_about_optimizers(ours: Mapping[nn.Module, nn.Module]) -> None:
    """Warn if an existing optimizer has the weights of a replaced layer, and so lacks its new norms."""
    norms = [parameter for layer in ours.values() for parameter in norm_parameters(layer).values()]
    if not norms:
        return
    weights = {id(parameter) for layer in ours for parameter in layer.parameters()}
    for optimizer in gc.get_objects():
        if issubclass(type(optimizer), torch.optim.Optimizer) and any(
            id(parameter) in weights for group in optimizer.param_groups for parameter in group["params"]
        ):
            warnings.warn(
                f"optimizer: got {type(optimizer).__name__} with the weights of the model, without its {len(norms)} "
                "norm parameters; expected all of them. Build the optimizer after replace, or call "
                'optimizer.add_param_group({"params": list(atn_norms.norm_parameters(model).values())})',
                stacklevel=3,
            )


def with_backend(model: nn.Module, backend: str) -> nn.Module:
    """Return a copy of a model whose layers run on one backend.

    `torch.export.export(with_backend(model, "reference"), ...)` gives a program with operators of torch alone. It runs
    without this package, and its number of steps is fixed.

    Errors: `ValueError` with the reason if the backend does not support one of the layers.

    >>> import torch, atn_norms as an
    >>> print(an.explain(an.with_backend(an.GRU(3, 5, norm="rms"), "reference")).splitlines()[1])
    cell _l0: backend 'reference'
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Recurrent):
            module._take_options(make_layer_spec(**dict(module.spec) | {"backend": backend}))
            explain(module)
    return copied


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the gains and shifts of every normalizer in a model, by qualified name.

    They are usually excluded from weight decay:

    >>> import torch, atn_norms as an
    >>> model = torch.nn.Sequential(an.LSTM(3, 5, norm="layer"))
    >>> norms = an.norm_parameters(model)
    >>> decayed = [p for name, p in model.named_parameters() if name not in norms and "bias" not in name]
    >>> plain = [p for name, p in model.named_parameters() if name in norms or "bias" in name]
    >>> optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}])
    >>> list(norms)[0], len(norms), len(decayed)
    ('0.norm_ih_l0.weight', 6, 2)
    """
    inside = {id(p) for module in model.modules() if isinstance(module, Normalizer) for p in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}


def load_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Load a checkpoint without norms into a model with norms, or a checkpoint with norms into a model without.

    Weights and biases have the names of torch.nn in both. Norms that the checkpoint lacks keep their values, and norms
    that the model lacks are dropped. Return the names of the entries that kept their values, and of the dropped ones.

    Errors: `RuntimeError` of `load_state_dict` for any other missing or unexpected entry. `TypeError` for a
    `state_dict` that is no mapping, such as the path of a file.

    >>> import torch, atn_norms as an
    >>> theirs, ours = torch.nn.LSTM(3, 5), an.LSTM(3, 5, norm="rms")
    >>> an.load_weights(ours, theirs.state_dict())
    (['norm_ih_l0.weight', 'norm_hh_l0.weight', 'norm_c_l0.weight'], [])
    >>> an.load_weights(theirs, ours.state_dict())
    ([], ['norm_ih_l0.weight', 'norm_hh_l0.weight', 'norm_c_l0.weight'])
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(mismatch("state_dict", typed_repr(state_dict), "a mapping, such as torch.load(path) returns"))
    own = model.state_dict()
    normalizers = {name for name, module in model.named_modules() if isinstance(module, Normalizer)}
    fresh = [key for key in own if key not in state_dict and any(key.startswith(f"{n}.") for n in normalizers)]
    dropped = [key for key in state_dict if key not in own and _belongs_to_a_norm(key, own)]
    entries = {key: value for key, value in state_dict.items() if key not in set(dropped)}
    model.load_state_dict(entries | {key: own[key] for key in fresh})
    return fresh, dropped


def _belongs_to_a_norm(key: str, own: Mapping[str, Any]) -> bool:
    """Return True if a key is an entry of a norm, in a layer whose weights the model has."""
    norms = re.finditer(r"(?:^|(?<=\.))norm_[a-z]+(_l\d+(?:_reverse)?)?\.", key)  # a module may have such a name too
    return any(f"{key[: norm.start()]}weight_hh{norm[1] or ''}" in own for norm in norms)


def substitute(model: nn.Module, ours: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules of a model in place, wherever they appear, and return the model or its replacement."""
    if model in ours:
        return ours[model]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in ours:
                setattr(parent, name, ours[child])
        for name, child in list(parent._modules.items()):  # named_children shows a shared module only once
            if child is not None and child in ours:
                parent._modules[name] = ours[child]
    return model


def pinned_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that some code would still use after `substitute`, each with the text of an error."""
    pinned: dict[nn.Module, str] = {}
    for parent in model.modules():
        if (compiled := parent._modules.get("_orig_mod")) is not None:  # the compiled function has the module itself
            pinned[compiled] = "that is compiled; expected a plain one. Call torch.compile after replace or load"
        for wrapper in _DISTRIBUTED & {base.__name__ for base in type(parent).__mro__}:
            text = f"inside {wrapper}; expected a plain model. Wrap the model after replace or load"
            pinned |= dict.fromkeys(parent.modules(), text)
        for name, value in vars(parent).items():
            for module in _modules_in(value) if name != "_modules" else ():
                text = f"that the attribute {name!r} of {type(parent).__name__} also holds; expected registered modules"
                pinned.setdefault(module, f"{text} only. Use nn.ModuleList or nn.ModuleDict, or delete the attribute")
    return pinned


def _modules_in(value: Any, depth: int = _DEEPEST) -> Iterator[nn.Module]:
    """Yield the modules to which a plain attribute refers: directly, by a bound method, or in containers."""
    kind = type(value)  # `isinstance` may raise an error for a weak proxy
    if issubclass(kind, nn.Module):
        yield value
    elif kind is MethodType:
        yield from _modules_in(value.__self__, 0)
    elif depth and issubclass(kind, dict | list | tuple | set):
        for each in value.values() if issubclass(kind, dict) else value:
            yield from _modules_in(each, depth - 1)


def _check_options(options: dict[str, Any]) -> None:
    """Raise `SpecError` for options that fit no kind of layer."""
    errors = []
    for kind in _KINDS.values():
        try:
            make_layer_spec(cell={"kind": kind}, input_size=1, hidden_size=8, **options)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(_KINDS):
        raise errors[0]


def replacement(name: str, module: nn.Module, options: Mapping[str, Any], pinned: Mapping[nn.Module, str]) -> Recurrent:
    """Build our layer on the parameters of a torch.nn layer; errors contain its `name` in the model.

    Errors: `TypeError` for a layer that must stay, such as one of `pinned_modules`.
    """
    name = name or type(module).__name__
    if not isinstance(module, nn.RNNBase):
        raise TypeError(
            f"{name}: got {type(module).__name__}, which runs single steps; expected nn.LSTM, nn.GRU or nn.RNN. "
            f"Use atn_norms.{type(module).__name__} in the code that passes its state"
        )
    kind = _KINDS.get(type(module))
    if parametrize.is_parametrized(module):
        raise TypeError(
            f"{name}: got a parametrized {module._get_name()}; expected plain parameters. Remove the parametrizations"
        )
    if kind is None:
        raise TypeError(f"{name}: got {type(module).__name__}; expected exactly nn.LSTM, nn.GRU or nn.RNN")
    names = {weight for cell in module._all_weights for weight in cell}
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))  # one may have several names
    if names != set(parameters):  # pruning and the old weight_norm rename them
        raise TypeError(
            f"{name}: got a parametrized {module._get_name()}; expected plain parameters. Remove the parametrizations"
        )
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError(f"{name}: got {with_article(kind.upper())} with hooks; expected no hooks. Remove the hooks")
    if "forward" in vars(module):
        raise TypeError(
            f"{name}: got {with_article(kind.upper())} with a replaced `forward`; expected none. Delete the attribute"
        )
    if module._modules or module._buffers:
        inside = ", ".join([*module._modules, *module._buffers])
        raise TypeError(
            f"{name}: got {with_article(kind.upper())} with modules or buffers inside ({inside}); expected none"
        )
    if module in pinned:
        raise TypeError(f"{name}: got {with_article(kind.upper())} {pinned[module]}")
    cell: dict[str, Any] = {"kind": kind}
    if kind == "lstm":
        cell["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        cell["nonlinearity"] = module.nonlinearity
    spec = make_layer_spec(
        cell=cell,
        input_size=module.input_size,
        hidden_size=module.hidden_size,
        num_layers=module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        dropout=float(module.dropout),
        bidirectional=module.bidirectional,
        **options,
    )
    like = next(module.parameters())
    layer = class_of(kind).from_spec(spec, like.device, like.dtype, parameters)
    return layer.train(module.training)
