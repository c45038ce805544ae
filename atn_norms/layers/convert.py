"""Replace the torch.nn recurrent layers of a model with ours and keep their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from atn_norms.layers.recurrent import Recurrent
from atn_norms.layers.spec import make_layer_spec
from atn_norms.layers.torch_api import skin_of

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
_KINDS: dict[type[nn.RNNBase], str] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}


def replace(
    model: nn.Module, *, norm: Any = None, window: Any = 1, placement: Any = None, backend: str = "auto"
) -> nn.Module:
    """Replace every `nn.LSTM`, `nn.GRU` and `nn.RNN` inside a model with our layer of the same sizes.

    The parameters stay the same objects, so `state_dict` keeps working. Norms add new parameters: build the optimizer
    after this call, or it will not train them. `model` is changed in place and returned. A model that is itself such
    a layer is returned as the new layer. A module used in several places is replaced once. Options are those of `LSTM`.

    Errors: `TypeError` for what is not a module, and for a layer whose own behaviour would be lost: a subclass, a
    parametrized or pruned layer, a layer with hooks or modules inside. `SpecError` for options that do not fit, also
    where the model has no layer to replace. The model is unchanged after an error.

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
    ours: dict[nn.Module, nn.Module] = {}
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        _check_options(options)
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            ours[module] = replacement(name, module, options)
    return substitute(model, ours)


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


def replacement(name: str, module: nn.RNNBase, options: Mapping[str, Any]) -> Recurrent:
    """Build our layer on the parameters of a torch.nn layer; `name` is its place in the model, for errors."""
    name = name or type(module).__name__
    kind = _KINDS.get(type(module))
    if parametrize.is_parametrized(module):
        raise TypeError(
            f"{name}: got a parametrized {module._get_name()}; expected plain parameters. Remove the parametrizations"
        )
    if kind is None:
        raise TypeError(f"{name}: got a {type(module).__name__}; expected exactly nn.LSTM, nn.GRU or nn.RNN")
    names = {weight for cell in module._all_weights for weight in cell}
    if names != set(dict(module.named_parameters(recurse=False))):  # pruning and the old weight_norm rename them
        raise TypeError(
            f"{name}: got a parametrized {module._get_name()}; expected plain parameters. Remove the parametrizations"
        )
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError(f"{name}: got a {kind.upper()} with hooks; expected no hooks. Remove the hooks")
    if module._modules or module._buffers:
        inside = ", ".join([*module._modules, *module._buffers])
        raise TypeError(f"{name}: got a {kind.upper()} with modules or buffers inside ({inside}); expected none")
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
    layer = skin_of(kind).from_spec(spec, like.device, like.dtype, dict(module.named_parameters()))
    return layer.train(module.training)
