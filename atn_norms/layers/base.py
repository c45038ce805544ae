"""A module that owns the parameters and norms of cells, under torch's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atn_norms.assorted_time import SiteNorm
from atn_norms.cells import Cell, CellWeights
from atn_norms.layers.spec import LayerSpec, forget_shift
from atn_norms.normalizers import Normalizer


class CellHost(nn.Module):
    """Registers `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`, ... and `norm_<site>`, each with a suffix per cell.

    The norm's module is the Normalizer itself; cell and windows are plain values.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.cell: Cell = spec.equations()
        self._windows = {site: spec.window_at(site).build() for site in self.cell.sites}
        self._suffixes: list[str] = []
        self._tensors = tuple(self.cell.shapes(1, spec.bias))
        self._sites = tuple(self.cell.sites)

    @property
    def input_size(self) -> int:
        """Features of the input."""
        return self.spec.input_size

    @property
    def hidden_size(self) -> int:
        """Features of the hidden state before any projection."""
        return self.spec.hidden_size

    @property
    def bias(self) -> bool:
        """Whether there are `bias_ih` and `bias_hh`; norms keep their own."""
        return self.spec.bias

    def reset_parameters(self) -> None:
        """Initialize weights and biases as `init` says, in torch's order, and every norm as it initializes itself."""
        with torch.no_grad():
            for suffix in self._suffixes:
                for name in self.cell.shapes(1, self.bias):
                    self._initialize(name, getattr(self, name + suffix))
            for suffix in self._suffixes:
                for norm in self._normalizers(suffix).values():
                    for module in norm.modules():
                        if callable(reset := getattr(module, "reset_parameters", None)):
                            reset()
                if self.spec.forget_bias is not None:
                    self._open_forget_gate(suffix, self.spec.forget_bias)

    def _register(
        self, cells: Mapping[str, int], given: Mapping[str, nn.Parameter] | None, factory: dict[str, Any]
    ) -> None:
        """Register the parameters of every cell (suffix -> input features), then their norms; torch's order."""
        dtype = factory.get("dtype")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: {dtype}; allowed: a floating-point type, such as torch.float32")
        self._suffixes = list(cells)
        for suffix, inputs in cells.items():
            for name, shape in self.cell.shapes(inputs, self.bias).items():
                parameter = nn.Parameter(torch.empty(shape, **factory)) if given is None else given[name + suffix]
                self.register_parameter(name + suffix, parameter)
        for suffix in cells:
            for site in self.cell.sites:
                norm = self.spec.normalizer(self.cell, site)
                if norm is not None:
                    self.add_module(f"norm_{site}{suffix}", norm.to(**factory))
        if given is None:
            self.reset_parameters()

    def _normalizers(self, suffix: str) -> dict[str, Normalizer]:
        names = {site: f"norm_{site}{suffix}" for site in self._sites}
        return {site: self._modules[name] for site, name in names.items() if name in self._modules}  # type: ignore[misc]

    def _weights(self, suffix: str) -> CellWeights:
        """What a cell computes with, gathered anew for every call: parameters and modules may be others by then."""
        norms = {
            site: SiteNorm(normalizer, self._windows[site]) for site, normalizer in self._normalizers(suffix).items()
        }
        own, tensors = self._parameters, {}
        for name in self._tensors:
            found = own.get(name + suffix)
            tensors[name] = getattr(self, name + suffix) if found is None else found  # it may be parametrized
        return CellWeights(tensors, norms)

    def _initialize(self, name: str, parameter: Tensor) -> None:
        if self.spec.init == "torch":
            bound = self.hidden_size**-0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif name == "weight_hh":
            gates = len(self.cell.gates)
            identity = torch.eye(parameter.shape[0] // gates, parameter.shape[1], dtype=parameter.dtype)
            parameter.copy_(identity.repeat(gates, 1))
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dtype in (torch.float32, torch.float64):
            nn.init.orthogonal_(parameter)
        else:  # LAPACK has no half precision
            parameter.copy_(nn.init.orthogonal_(torch.empty_like(parameter, dtype=torch.float32)))

    def _open_forget_gate(self, suffix: str, value: float) -> None:
        norms = self._normalizers(suffix)
        norm = norms.get("sum", norms.get("ih"))
        if norm is not None:
            shift = forget_shift(self.cell, norm)
            assert shift is not None  # the options were refused otherwise
            shift.fill_(value)
            return
        place = self.cell.gates.index("f")
        for name, content in (("bias_ih", value), ("bias_hh", 0.0)):
            getattr(self, name + suffix).view(len(self.cell.gates), -1)[place].fill_(content)

    def _described(self) -> str:
        """Sizes and what differs from the default, for `repr`."""
        shown = [str(self.input_size), str(self.hidden_size)]
        shown += [f"{name}={value}" for name, value in _changed(self.spec).items() if name in _TORCH_OPTIONS]
        shown += [f"{name}={value}" for name, value in _changed(self.spec.cell).items()]
        shown.append(f"norm={_label(self.spec.norm)}")
        if self.spec.norm is not None:
            shown.append(f"window={_label(self.spec.window)}")
        return ", ".join(shown)

    def extra_repr(self) -> str:
        return self._described()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._described()})"


_TORCH_OPTIONS = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")


def _changed(spec: Any) -> dict[str, Any]:
    """The options of a spec that differ from their defaults."""
    fields = type(spec).model_fields
    given = {name: getattr(spec, name) for name in fields if name != "kind"}
    return {name: value for name, value in given.items() if value != fields[name].default}


def _label(spec: Any) -> str:
    """A norm or window as a person would write it."""
    if spec is None:
        return "none"
    if hasattr(spec, "sites"):
        return "{" + ", ".join(f"{site}: {_label(one)}" for site, one in spec.sites.items()) + "}"
    options = _changed(spec)
    if spec.kind == "sliding":
        return str(options["steps"])
    return spec.kind + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")
