"""Turn the recurrent layers of an existing model into ours, weights kept."""

from __future__ import annotations

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
    """Put our layer in the place of every `nn.LSTM`, `nn.GRU` and `nn.RNN` inside a model.

    The parameters are the very objects the model had, so optimizers and `state_dict` keep working; norms come in
    fresh beside them. `model` is changed in place and returned; if it is itself such a layer, the new one is returned.
    A module that stands in several places is replaced by one. Options are those of `LSTM`.

    Errors: `TypeError` for what is no module, and for a layer whose own behaviour a replacement would drop: a subclass,
    a parametrized or pruned one, one with hooks or with modules inside; `SpecError` for options that do not fit, also
    where there is no layer to replace. The model is untouched then.

    >>> import torch, atn_norms as an
    >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 5))
    >>> an.replace(model, norm="layer", window=10)
    Sequential(
      (0): LSTM(3, 5, norm=layer, window=10)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}; allowed: a torch.nn.Module")
    options = {"norm": norm, "window": window, "backend": backend} | ({"placement": placement} if placement else {})
    ours: dict[nn.Module, Recurrent] = {}
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        _check_options(options)
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            ours[module] = _ours(name or type(module).__name__, module, options)
    if model in ours:
        return ours[model]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in ours:
                setattr(parent, name, ours[child])
        for name, child in list(parent._modules.items()):  # named_children shows a shared module only once
            if child in ours:
                parent._modules[name] = ours[child]
    return model


def _check_options(options: dict[str, Any]) -> None:
    """Options without a layer to put them on must fit one kind of layer at least."""
    errors = []
    for kind in _KINDS.values():
        try:
            make_layer_spec(cell={"kind": kind}, input_size=1, hidden_size=8, **options)
        except ValueError as error:
            errors.append(error)
    if len(errors) == len(_KINDS):
        raise errors[0]


def _ours(name: str, module: nn.RNNBase, options: dict[str, Any]) -> Recurrent:
    kind = _KINDS.get(type(module))
    if parametrize.is_parametrized(module):
        raise TypeError(f"{name}: a parametrized {module._get_name()}; allowed: remove its parametrizations first")
    if kind is None:
        raise TypeError(f"{name}: a {type(module).__name__}; allowed: exactly nn.LSTM, nn.GRU or nn.RNN")
    names = {weight for cell in module._all_weights for weight in cell}
    if names != set(dict(module.named_parameters(recurse=False))):  # pruning and the old weight_norm rename them
        raise TypeError(f"{name}: a parametrized {module._get_name()}; allowed: remove its parametrizations first")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise TypeError(f"{name}: a {kind.upper()} with hooks; allowed: remove its hooks first")
    if module._modules or module._buffers:
        inside = ", ".join([*module._modules, *module._buffers])
        raise TypeError(f"{name}: a {kind.upper()} with modules or buffers inside ({inside}); allowed: none")
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
