"""A module that owns the parameters and norms of cells, under torch's names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from atn_norms.assorted_time import SiteNorm
from atn_norms.cells import Cell, CellWeights
from atn_norms.errors import mismatch, short_repr, with_article
from atn_norms.layers.spec import LayerSpec, NormSites, WindowSites, forget_shift
from atn_norms.normalizers import Normalizer
from atn_norms.normalizers.base import KeyWithCure, parameter_of
from atn_norms.normalizers.batch import synchronized
from atn_norms.options import Options, changed_options, kind_label, spec_kind
from atn_norms.windows import SlidingSpec


class CellHost(nn.Module):
    """Register `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh` and `norm_<site>`, each with the suffix of its cell.

    The module of a norm is the `Normalizer` itself. Cells and windows are plain values. A window that is a module is
    registered as `window_<site>` with the same suffix.
    """

    spec: LayerSpec
    _fixed: frozenset[str] = frozenset()  # options that cannot be assigned

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self._take_options(spec)
        self.cell: Cell = spec.equations()
        self._fixed = _FIXED | type(spec.cell).model_fields.keys() - {"kind"}
        windows = {site: spec.window_at(site).build() for site in self.cell.sites}
        self._windows = {site: window for site, window in windows.items() if not isinstance(window, nn.Module)}
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
        """True if the layer has `bias_ih` and `bias_hh`; the shifts of norms do not depend on it."""
        return self.spec.bias

    def reset_parameters(self) -> None:
        """Initialize weights and biases by the option `init`, in the order of torch, then every norm."""
        with torch.no_grad():
            for suffix in self._suffixes:
                for name in self.cell.shapes(1, self.bias):
                    self._initialize(name, getattr(self, name + suffix))
            for suffix in self._suffixes:
                modules = [self._modules.get(f"{kind}_{site}{suffix}") for site in self._sites for kind in OWNED]
                for owner in filter(None, modules):
                    for module in owner.modules():
                        if callable(reset := getattr(module, "reset_parameters", None)):
                            reset()
                if self.spec.forget_bias is not None:
                    self._open_forget_gate(suffix, self.spec.forget_bias)

    def _register(
        self, cells: Mapping[str, int], given: Mapping[str, nn.Parameter] | None, factory: dict[str, Any]
    ) -> None:
        """Register the parameters of every cell (suffix -> input features) in the order of torch, then the norms."""
        dtype = factory.get("dtype")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(mismatch("dtype", str(dtype), "a floating-point type, such as torch.float32"))
        self._suffixes = list(cells)
        for suffix, inputs in cells.items():
            for name, shape in self.cell.shapes(inputs, self.bias).items():
                parameter = nn.Parameter(torch.empty(shape, **factory)) if given is None else given[name + suffix]
                self.register_parameter(name + suffix, parameter)
        with _default_device(factory.get("device")):
            for suffix in cells:
                for site in self.cell.sites:
                    norm = self.spec.normalizer(self.cell, site)
                    if norm is not None:
                        self.add_module(f"norm_{site}{suffix}", _converted(norm, **factory))
                        if site not in self._windows:
                            window: Any = self.spec.window_at(site).build()
                            self.add_module(f"window_{site}{suffix}", _converted(window, **factory))
        if given is None:
            self.reset_parameters()

    def _normalizers(self, suffix: str) -> dict[str, Normalizer]:
        found = {site: self._modules.get(f"norm_{site}{suffix}") for site in self._sites}
        return {site: norm for site, norm in found.items() if norm is not None}  # type: ignore[misc]

    def cell_weights(self, suffix: str, tensors: Mapping[str, Tensor] | None = None) -> CellWeights:
        """Return the weights and norms of one cell, for one call: parameters and modules may be replaced between calls.

        `suffix` is the end of torch's parameter names, such as `_l0` or `_l0_reverse`; it is empty for a step cell.
        With `tensors` no weight is read, and so no parametrization is computed.
        """
        modules, windows, norms = self._modules, self._windows, {}
        for site in self._sites:
            name = f"norm_{site}{suffix}"
            norm = modules.get(name)
            if norm is not None:
                window = windows[site] if site in windows else modules[f"window_{site}{suffix}"]
                norms[site] = SiteNorm(norm, window)  # type: ignore[arg-type]
        if tensors is None:
            tensors = {name: parameter_of(self, name + suffix) for name in self._tensors}
        return CellWeights(tensors, norms)

    def recompute_weights(self) -> None:
        """Run the pre-hooks of pruning, `weight_norm` and `spectral_norm`, which torch runs before `forward` alone.

        Methods other than `forward` that compute with the weights call this method first.
        """
        if self._forward_pre_hooks:
            for hook in self._forward_pre_hooks.values():
                if isinstance(hook, _RECOMPUTE_WEIGHTS):
                    hook(self, ())

    def _take_options(self, spec: LayerSpec) -> None:
        self.__dict__["spec"] = spec  # an assignment is an error

    def _initialize(self, name: str, parameter: Tensor) -> None:
        if self.spec.init == "torch":
            bound = self.hidden_size**-0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif name == "weight_hh":
            gates = len(self.cell.gates)
            sizes = parameter.shape[0] // gates, parameter.shape[1]
            identity = torch.eye(*sizes, dtype=parameter.dtype, device=parameter.device)
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
            assert shift is not None  # LayerSpec rejects other options
            shift.fill_(value)
            return
        place = self.cell.gates.index("f")
        for name, content in (("bias_ih", value), ("bias_hh", 0.0)):
            getattr(self, name + suffix).view(len(self.cell.gates), -1)[place].fill_(content)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Register a submodule; `nn.SyncBatchNorm.convert_sync_batchnorm` synchronizes the norm that it replaces."""
        super().add_module(name, synchronized(self._modules.get(name), module))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed:
            cure = _CURES.get(name, "Build a new layer with the option")
            expected = f"no assignment, since the options of a layer are fixed. {cure}"
            raise AttributeError(mismatch(f"{type(self).__name__}.{name}", short_repr(value), expected))
        replaced = self.__dict__.get("_modules", {}).get(name)
        if isinstance(replaced, Normalizer) and isinstance(value, nn.Module) and not isinstance(value, Normalizer):
            expected = "a Normalizer, or None for a site without a norm"
            raise TypeError(mismatch(f"{type(self).__name__}.{name}", type(value).__name__, expected))
        if name == "qconfig":
            warnings.warn(
                f"{type(self).__name__}: got a quantization config; the layer stays in floating point. "
                "torch quantizes no recurrent layer with norms",
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        unexpected_keys: list[str] = arguments[3]
        norms = [place for place, key in enumerate(unexpected_keys) if key.startswith(f"{prefix}norm_")]
        for place in norms[:1]:
            unexpected_keys[place] = KeyWithCure(unexpected_keys[place])

    def __prepare_scriptable__(self) -> Any:
        raise TypeError(
            f"torch.jit.script: got {with_article(type(self).__name__)}; expected a module of plain TorchScript. "
            "Use torch.export.export, torch.compile or torch.jit.trace"
        )

    def _described(self) -> str:
        """Return sizes and the options that differ from their defaults, for `repr`."""
        parts = [str(self.input_size), str(self.hidden_size)]
        parts += [f"{name}={value}" for name, value in changed_options(self.spec).items() if name in _TORCH_OPTIONS]
        parts += [f"{name}={value}" for name, value in changed_options(self.spec.cell).items()]
        parts.append(f"norm={_label(self.spec.norm)}")
        if self.spec.norm is not None:
            parts.append(f"window={_label(self.spec.window)}")
        return ", ".join(parts)

    def extra_repr(self) -> str:
        return self._described()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._described()})"


def _default_device(device: Any) -> AbstractContextManager[Any]:
    """Make `device` the default while norms are built, since constructors of plugins may not take one.

    The meta device is left out: a constructor may need numbers.
    """
    return nullcontext() if device is None or torch.device(device).type == "meta" else torch.device(device)


def _converted(module: nn.Module, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the module on a device and in a type; torch converts no module in a `FakeTensorMode`."""
    tensors = [*module.parameters(), *module.buffers()]
    fits = dtype is None or all(t.dtype == dtype for t in tensors if t.is_floating_point())
    there = device is None or all(t.device == torch.device(device) for t in tensors)
    return module if fits and there else module.to(device=device, dtype=dtype)


def torch_twin(name: str | None, **options: Any) -> Any:
    """Return torch.nn's module with these options on the meta device; torch's errors are raised."""
    return getattr(nn, str(name))(**options, device="meta")


def torch_options(spec: LayerSpec) -> dict[str, Any]:
    """Return the options of torch.nn's module in the options of a layer."""
    shared = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    own = {key: value for key, value in spec.cell.model_dump().items() if key != "kind"}
    return {name: getattr(spec, name) for name in shared} | own


_FIXED = frozenset(LayerSpec.model_fields) - {"batch_first", "dropout"} | {"nonlinearity", "proj_size", "spec"}
_CURES = {
    "backend": "Use atn_norms.with_backend for a copy",
    "cell": "Use another name for a cell state",
}
OWNED = ("norm", "window")  # what a layer registers for each site of each cell
_RECOMPUTE_WEIGHTS = (BasePruningMethod, WeightNorm, SpectralNorm)  # hooks that set a weight and read no input
_TORCH_OPTIONS = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")


def _label(spec: Any) -> str:
    """Return the shortest form of a norm or window, for `repr`."""
    if spec is None:
        return "none"
    if isinstance(spec, (NormSites, WindowSites)):
        return "{" + ", ".join(f"{site}: {_label(one)}" for site, one in spec.sites.items()) + "}"
    if isinstance(spec, SlidingSpec):
        return str(spec.steps)
    options = {
        name: _label(each) if isinstance(each, Options) else each for name, each in changed_options(spec).items()
    }
    return kind_label(spec_kind(spec), options)
