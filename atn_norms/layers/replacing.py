"""Turn the recurrent layers of an existing model into ours, weights kept."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from atn_norms.layers.recurrent import Recurrent
from atn_norms.layers.skins import skin_of
from atn_norms.layers.spec import specified

_KINDS: dict[type[nn.RNNBase], str] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}


def replace(
    model: nn.Module, *, norm: Any = None, window: Any = 1, placement: Any = None, backend: str = "auto"
) -> nn.Module:
    """Put our layer in the place of every `nn.LSTM`, `nn.GRU` and `nn.RNN` inside a model.

    The parameters are the very objects the model had, so optimizers and `state_dict` keep working; norms come in
    fresh beside them. `model` is changed in place and returned; if it is itself such a layer, the new one is returned.
    A module that stands in several places is replaced by one. Options are those of `LSTM`.

    Errors: `TypeError` for a subclass or a parametrized layer, whose own behaviour a replacement would drop;
    `SpecError` for options that do not fit. The model is untouched then.

    >>> import torch, atn_norms as an
    >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 5))
    >>> an.replace(model, norm="layer", window=10)
    Sequential(
      (0): LSTM(3, 5, norm=layer, window=10)
    )
    """
    options = {"norm": norm, "window": window, "backend": backend} | ({"placement": placement} if placement else {})
    ours: dict[nn.Module, Recurrent] = {}
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


def _ours(name: str, module: nn.RNNBase, options: dict[str, Any]) -> Recurrent:
    kind = _KINDS.get(type(module))
    if parametrize.is_parametrized(module):
        raise TypeError(f"{name}: a parametrized {module._get_name()}; allowed: remove its parametrizations first")
    if kind is None:
        raise TypeError(f"{name}: a {type(module).__name__}; allowed: exactly nn.LSTM, nn.GRU or nn.RNN")
    cell: dict[str, Any] = {"kind": kind}
    if kind == "lstm":
        cell["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        cell["nonlinearity"] = module.nonlinearity
    spec = specified(
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
